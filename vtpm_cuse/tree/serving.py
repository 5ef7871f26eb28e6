"""The life of the tree's process: from its mount to its end."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from vtpm_cuse.acquire.mount import FuseMount
from vtpm_cuse.errors import FrontendError
from vtpm_cuse.service.confine import capabilities
from vtpm_cuse.service.process import notify
from vtpm_cuse.service.process.held import HeldSignals
from vtpm_cuse.service.process.signals import ending_signals
from vtpm_cuse.tree.source import Source

if TYPE_CHECKING:
    from vtpm_cuse.tree.mount import Tree


def serve(folder: str, manager: str | None, *, allow_other: bool = False) -> None:
    """Shows the TPMs of a manager in a folder, until it is unmounted or the process is to end.

    Args:
        folder: Absolute path of an empty one; made if there is none, and then removed again.
        manager: Path of its socket, by default the user's own or root's.
        allow_other: Other users see what is theirs, too.

    Raises:
        FrontendError: It cannot be mounted, no manager answers, or pyfuse3 is missing.
    """
    try:
        from vtpm_cuse.tree.mount import Tree
    except ImportError as exc:
        hint = "'pip install pyfuse3' where vtpm is, or install the package python3-pyfuse3"
        raise FrontendError(f"The tree needs pyfuse3: {exc}", hint) from exc
    held = HeldSignals()
    source = Source(manager)
    mount = FuseMount(folder, allow_other=allow_other, read_only=True)
    try:
        source.connect()
        mount.take_folder()
        mount.mount()
        capabilities.drop_capabilities(())  # the process that unmounts has its own
        capabilities.gain_nothing()
        trio.run(_serve, Tree(source), mount, held)
    finally:
        mount.close()
        source.close()
        held.release()


async def _serve(tree: Tree, mount: FuseMount, held: HeldSignals) -> None:
    import pyfuse3

    pyfuse3.init(tree, f"/dev/fd/{mount.give_away()}", set())
    service = notify.connect()
    try:
        with ending_signals(pyfuse3.terminate, held.release):
            service.ready(in_background=False)
            await pyfuse3.main()
            held.hold()
        service.stopping()
    finally:
        pyfuse3.close(unmount=False)
