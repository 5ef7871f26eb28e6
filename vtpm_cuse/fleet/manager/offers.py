"""TPMs that containers may ask for: CDI documents of each, while its devices are there.

Runtimes read all documents of the folder whenever they start a container, and give what they say to
whoever names it: so there are only those of TPMs that are on.
"""

from __future__ import annotations

import contextlib
import json
import os
from typing import TYPE_CHECKING, Final

from vtpm_cuse.containers import cdi
from vtpm_cuse.errors import FrontendError
from vtpm_cuse.faults import sentence
from vtpm_cuse.files import make_folder, write_output
from vtpm_cuse.programs import own_program

if TYPE_CHECKING:
    from vtpm_cuse.fleet.base import Interface, Offer, Tpm

_FOLDER_MODE: Final = 0o755
_FILE_MODE: Final = 0o644
"""Users' own runtimes read them, too; they say no more than names and paths."""
_PROGRAM: Final = "vtpm"


class Offers:
    """The documents of one manager.

    Args:
        folder: Where they are; None for a manager that offers nothing.
        socket: Where the manager is asked, by which a container's end removes its TPM.
    """

    def __init__(self, folder: str | None, socket: str) -> None:
        self._folder, self._socket = folder, socket
        self._there: set[str] = set()

    def need(self, offer: Offer, interface: Interface) -> None:
        """Raises FrontendError where such a TPM cannot be offered in this way."""
        if offer == "off":
            return
        if self._folder is None:
            raise FrontendError("This manager offers no TPM", "start it with --cdi DIR")
        if interface == "socket":
            reason = "Only a TPM that is a device is offered to containers"
            raise FrontendError(reason, "make it with --interface cuse")
        if interface == "vtpm-proxy":  # a document that outlives it would be about another one
            reason = "A TPM of the kernel's is not offered to containers, for its number changes"
            raise FrontendError(reason, "make it with --interface cuse")
        if offer == "remove":
            _own_program()

    def put(self, tpm: Tpm) -> None:
        """Has the document of a TPM that is on, if it is offered. Raises FrontendError."""
        if tpm.cdi == "off" or self._folder is None:
            return
        if not (tpm.device and tpm.managed_device):
            return
        words = ("rm", "--force", "--socket", self._socket, tpm.id)
        hook = (_own_program(), *words) if tpm.cdi == "remove" else ()
        nodes_of = {cdi.KIND: tpm.interface != "fuse"}
        if tpm.interface != "fuse":
            nodes_of[cdi.ROOTLESS] = False
        self._there.add(tpm.id)
        for kind, nodes in nodes_of.items():
            text = cdi.document(
                (tpm.name, tpm.id),
                (tpm.device, tpm.managed_device),
                tpm.owner,
                nodes=nodes,
                at_the_end=hook,
                kind=kind,
            )
            path = os.path.join(self._folder, cdi.file_name(tpm.id, kind))
            try:
                make_folder(self._folder, _FOLDER_MODE, umask=False)
                write_output(path, (json.dumps(text, indent=1) + "\n").encode(), _FILE_MODE)
            except OSError as exc:
                raise FrontendError(f"It cannot be offered to containers: {sentence(exc)}") from exc

    def drop(self, number: str, *, left: bool = False) -> None:
        """It is not offered any more; nor, if it may have been *left*, as by a manager that died."""
        if self._folder is None or not (left or number in self._there):
            return
        self._there.discard(number)
        for kind in (cdi.KIND, cdi.ROOTLESS):
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(self._folder, cdi.file_name(number, kind)))

    def close(self) -> None:
        """Nothing is offered any more."""
        for number in tuple(self._there):
            self.drop(number)


def _own_program() -> str:
    """The program ``vtpm`` that is installed with this one. Raises FrontendError."""
    if path := own_program(_PROGRAM):
        return path
    raise FrontendError("The program vtpm, which removes it in the end, is not beside vtpmd")
