"""A private TPM as a file, for what knows devices alone."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from vtpm_cuse.client.child import Nest
from vtpm_cuse.client.device import MANAGED, NEST_NAMES, RAW, DeviceEmulator, once_free
from vtpm_cuse.errors import LabError
from vtpm_cuse.lab.fapi import FAPI_NAMES
from vtpm_cuse.lab.tpm import IBM_VARIABLES, Client, Tpm
from vtpm_cuse.wire.tpm import TPM_RESPONSE_MAX

if TYPE_CHECKING:
    from vtpm_cuse.client.base import Control
    from vtpm_cuse.client.child import ChildEmulator
    from vtpm_cuse.lab.snapshot import Snapshot


class DeviceTpm(Tpm):
    """A `Tpm` in a FUSE mount of this user's, with files in the place of sockets.

    It belongs to the thread that called `start`, and is gone when that has ended. Snapshots and
    power are for moments in which no client has `raw_path` open. It has no faults.
    """

    def _words(self) -> list[str]:
        if self._faults:
            raise LabError("Faults are made between sockets: a device has none")
        return [*super()._words(), *([] if self._tpm2 else ["--tpm12"])]

    def _launch(self, words: list[str], fds: list[int]) -> ChildEmulator:
        self._nest = Nest((*NEST_NAMES, *FAPI_NAMES))
        return DeviceEmulator(words, self._nest, fds)

    def _return_to(self, control: Control, snapshot: Snapshot) -> None:
        if snapshot is self._begin:  # as always with a device, it is on
            control.stop()
        super()._return_to(control, snapshot)

    def _connect(self) -> Client:
        return _DeviceClient(self.path)

    def _path(self, name: str) -> str:
        folder = f"{os.path.dirname(super()._path(name))}.dev"
        return f"{folder}/{MANAGED if self._tpm2 and name == 'tpm' else RAW}"

    @property
    def folder(self) -> str:  # noqa: D102
        return os.path.dirname(super()._path(RAW))

    @property
    def clients(self) -> int:
        """Nobody counts those of a device."""
        return 0

    @property
    def tcti(self) -> str:  # noqa: D102
        return f"device:{self.path}"

    @property
    def raw_tcti(self) -> str:  # noqa: D102
        return f"device:{self.raw_path}"

    @property
    def env(self) -> dict[str, str]:
        """Those of a `Tpm`, but for its sockets, and those of the software by IBM."""
        found = {"VTPM_DEVICE": self.path, "VTPM_RAW_DEVICE": self.raw_path}
        if self._tpm2:
            found |= self._env_of_stacks
            found |= zip(IBM_VARIABLES, ("dev", self.path), strict=True)
        return found


class _DeviceClient(Client):
    def __init__(self, path: str) -> None:
        self._fd = once_free(lambda: os.open(path, os.O_RDWR | os.O_CLOEXEC))
        super(Client, self).__init__()

    def ask(self, command: bytes) -> bytes:
        os.write(self._fd, command)
        return os.read(self._fd, TPM_RESPONSE_MAX)

    def release(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
