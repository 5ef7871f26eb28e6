"""What the kernel shows of a TPM under /sys/class/tpm, as texts of the same form.

The TPM is asked when a text is read, between two commands of a client (`facts`); while one
runs, the reader waits.
"""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Final

from vtpm_cuse.errors import VtpmError
from vtpm_cuse.vtpm.facts import PCR_COUNT, TpmFacts

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from vtpm_cuse.vtpm.file import TpmDeviceFile
    from vtpm_cuse.vtpm.vtpm import Vtpm


_PCRS: Final = tuple(str(index) for index in range(PCR_COUNT))

_TOP: Final = ("tpm_version_major", "caps", "durations", "timeouts", "log", "status")


def is_attribute(name: str) -> bool:
    """Whether a name at the top is taken."""
    return name in _TOP or name.startswith("pcr-")


class TpmAttributes:
    """Text files of one TPM, by path.

    Args:
        vtpm: The TPM.
        file: The device, which knows whether a command runs.
        log: Makes the text of ``log``.
        status: Facts for ``status`` besides those that are known here.
    """

    def __init__(
        self,
        vtpm: Vtpm,
        file: TpmDeviceFile,
        log: Callable[[], bytes],
        status: Mapping[str, str | int],
    ) -> None:
        self._vtpm = vtpm
        self._file = file
        self._status = status
        self._at_once = {"log": log, "status": self._status_text}
        self._facts = TpmFacts(vtpm)
        self._banks: tuple[str, ...] = ()

    def files(self, folder: str) -> tuple[str, ...]:
        """The files in a folder; "" is the top."""
        if folder:
            return _PCRS if folder in self.folders() else ()
        return _TOP

    def folders(self) -> tuple[str, ...]:
        """The folders at the top: one for each PCR bank, as of the last time it could be seen."""
        if not self._file.must_wait:
            with contextlib.suppress(VtpmError):  # the TPM is off, say
                self._banks = self._facts.active_banks()
        return self._banks

    def size(self, path: str) -> int | None:
        """Bytes of a text that is there without the TPM; None for the others."""
        make = self._at_once.get(path)
        return None if make is None else len(make())

    def read(self, path: str) -> bytes | None:
        """The text; None where that is to be tried again when the running command has ended.

        Raises:
            VtpmError: The TPM cannot be asked now, or there is no such file.
        """
        if path in self._at_once:
            return self._at_once[path]()
        return None if self._file.must_wait else self._facts.read(path)

    def _status_text(self) -> bytes:
        facts = {
            **self._status,
            "tpm_version": "2.0" if self._vtpm.tpm2 else "1.2",
            "running": self._vtpm.running,
            "open": self._file.is_open,
            "busy": self._file.busy,
            "locality": self._vtpm.locality,
        }
        return f"{json.dumps(facts)}\n".encode()
