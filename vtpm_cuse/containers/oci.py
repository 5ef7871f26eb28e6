"""What a container's runtime is told, so that the container has a TPM: podman, config.json."""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vtpm_cuse.containers.nodes import Node


def podman_options(nodes: list[Node]) -> list[str]:
    """The options of podman and docker."""
    return [f"--device={node.path}:{node.inside}:rw" for node in nodes]


def config(nodes: list[Node]) -> dict[str, Any]:
    """What config.json of an OCI runtime gets. Raises OSError."""
    devices, allowed = [], []
    for node in nodes:
        status = node.path.stat()
        device = {"type": "c", "major": node.major, "minor": node.minor}
        mode = stat.S_IMODE(status.st_mode)
        owner = {"fileMode": mode, "uid": status.st_uid, "gid": status.st_gid}
        devices.append({"path": node.inside, **device, **owner})
        allowed.append({"allow": True, **device, "access": "rw"})
    return {"linux": {"devices": devices, "resources": {"devices": allowed}}}
