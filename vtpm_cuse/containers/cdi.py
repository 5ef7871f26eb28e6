"""CDI documents: what a container's runtime gives to who asks for a TPM by its name.

Source: SPEC.md of the Container Device Interface, 0.5.0. That is the newest that podman 4.3 reads,
and a runtime passes over what has a field that it does not know, in silence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

KIND: Final = "vtpm-cuse.org/vtpm"
ROOTLESS: Final = "vtpm-cuse.org/rootless"
"""The same TPM, for a container that an ordinary user starts: its runtime can make no device nodes, and
mounts those of this machine in their place, but only under the names that they have here."""
INSIDE: Final = ("/dev/tpm0", "/dev/tpmrm0")
"""Where programs look for a TPM: the device for one client, and that for many."""

_VERSION: Final = "0.5.0"
_MODE: Final = 0o600
_HOOK_SECONDS: Final = 60


def file_name(number: str, kind: str = KIND) -> str:
    """That of the document about the TPM with this id; no two TPMs ever share it."""
    return f"{kind.replace('/', '-')}_{number}.json"


def document(
    names: Sequence[str],
    paths: Sequence[str],
    owner: int,
    *,
    nodes: bool,
    at_the_end: Sequence[str] = (),
    kind: str = KIND,
) -> dict[str, Any]:
    """A document about one TPM.

    Args:
        names: Under which it can be asked for, by each alone.
        paths: Of its two devices here, as in `INSIDE`.
        owner: Whose they are, in the container too, and nobody else's.
        nodes: Device nodes are made for them; else they are mounted there.
        at_the_end: A program and its arguments, run here when the container is no more.
        kind: What is asked for: `KIND` or `ROOTLESS`.
    """
    places = list(zip(INSIDE, paths, strict=True))
    edits: dict[str, Any] = {}
    if nodes:
        # Without a mode podman 4.3 makes them everybody's.
        rights = {"permissions": "rw", "fileMode": _MODE, "uid": owner, "gid": 0}
        edits["deviceNodes"] = [
            {"path": inside, "hostPath": path, **rights} for inside, path in places
        ]
    else:
        edits["mounts"] = [
            {"hostPath": path, "containerPath": inside, "options": ["bind", "rw", "nosuid"]}
            for inside, path in places
        ]
    if at_the_end:
        edits["hooks"] = [
            {
                "hookName": "poststop",
                "path": at_the_end[0],
                "args": list(at_the_end),
                "timeout": _HOOK_SECONDS,
            }
        ]
    devices = [{"name": name, "containerEdits": edits} for name in names]
    return {"cdiVersion": _VERSION, "kind": kind, "devices": devices}
