"""What the kernel shows of a TPM under /sys/class/tpm, as texts of the same form.

The TPM is asked when a text is read, between two commands of a client; while one
runs, the reader waits. Where the kernel has such a file for TPM 1.2 only
(``caps``, ``durations``, ``timeouts``), a TPM 2.0's says it in the same form.
Source: Documentation/ABI/stable/sysfs-class-tpm in Linux.
"""

from __future__ import annotations

import contextlib
import errno
import json
import re
import struct
from typing import TYPE_CHECKING, Final

from vtpm_cuse.errors import DeviceError, VtpmError
from vtpm_cuse.wire import tpm2, tpm12
from vtpm_cuse.wire.tpm import TpmCc, TpmOrdinal
from vtpm_cuse.wire.tpm2 import TpmAlg

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from vtpm_cuse.vtpm.file import TpmDeviceFile
    from vtpm_cuse.vtpm.vtpm import Vtpm
    from vtpm_cuse.wire.marshal import TpmStruct


_BANKS: Final = {
    "pcr-sha1": TpmAlg.TPM_ALG_SHA1,
    "pcr-sha256": TpmAlg.TPM_ALG_SHA256,
    "pcr-sha384": TpmAlg.TPM_ALG_SHA384,
    "pcr-sha512": TpmAlg.TPM_ALG_SHA512,
    "pcr-sm3": TpmAlg.TPM_ALG_SM3_256,
}
_PCR_COUNT: Final = 24
_PCRS: Final = tuple(str(index) for index in range(_PCR_COUNT))
_PCR_PATH: Final = re.compile(r"(pcr-\w+)/(\d+)")

# What a driver goes by with a TPM 2.0, in microseconds (TCG PC Client Platform TPM Profile).
_TIMEOUTS2: Final = (750_000, 2_000_000, 200_000, 30_000)
_DURATIONS2: Final = (20_000, 750_000, 2_000_000)


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
        self._top: dict[str, Callable[[], str]] = {
            "tpm_version_major": self._version,
            "caps": self._caps,
            "durations": self._durations,
            "timeouts": self._timeouts,
        }
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
                self._banks = self._active_banks()
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
        return None if self._file.must_wait else self._ask(path)

    def _ask(self, path: str) -> bytes:
        found = _PCR_PATH.fullmatch(path)
        if found is not None:
            return f"{self._pcr(found[1], int(found[2])).hex().upper()}\n".encode()
        make = self._top.get(path)
        if make is None:
            raise DeviceError(errno.ENOENT)
        return make().encode()

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

    def _active_banks(self) -> tuple[str, ...]:
        if not self._vtpm.tpm2:
            return ("pcr-sha1",)
        answer = tpm2.PcrCapability.unpack_untrusted(self._capability2(tpm2.TPM_CAP_PCRS, 0))
        active = {bank.hash for bank in answer.assignedPCR if any(bank.select)}
        return tuple(name for name, bank in _BANKS.items() if bank in active)

    def _pcr(self, bank: str, index: int) -> bytes:
        if not self._vtpm.tpm2:
            asked = tpm12.PcrReadParameters(index)
            body = self._query12(TpmOrdinal.TPM_ORD_PcrRead, asked)
            return tpm12.PcrReadResult.unpack_untrusted(body).outDigest
        selection = tpm2.PcrSelection(_BANKS[bank], (1 << index).to_bytes(3, "little"))
        body = self._query2(TpmCc.TPM_CC_PCR_Read, tpm2.PcrReadParameters((selection,)))
        values = tpm2.PcrReadResult.unpack_untrusted(body).pcrValues
        if len(values) != 1:  # the bank is not active any more
            raise DeviceError(errno.ENOENT)
        return values[0].buffer

    def _version(self) -> str:
        return "2\n" if self._vtpm.tpm2 else "1\n"

    def _caps(self) -> str:
        if self._vtpm.tpm2:
            maker = self._property2(tpm2.TPM_PT_MANUFACTURER)
            firmware = self._property2(tpm2.TPM_PT_FIRMWARE_VERSION_1)
            version, revision = "2.0", f"{firmware >> 16}.{firmware & 0xFFFF}"
        else:
            (maker,) = self._properties12(tpm12.TPM_CAP_PROP_MANUFACTURER, 1)
            body = self._capability12(tpm12.TPM_CAP_VERSION_VAL, b"")
            found = tpm12.VersionInfo.unpack_untrusted(body)
            version = f"{found.major}.{found.minor}"
            revision = f"{found.revMajor}.{found.revMinor}"
        return f"Manufacturer: 0x{maker:x}\nTCG version: {version}\nFirmware version: {revision}\n"

    def _durations(self) -> str:
        if self._vtpm.tpm2:
            return _times(_DURATIONS2)
        return _times(self._properties12(tpm12.TPM_CAP_PROP_DURATION, 3))

    def _timeouts(self) -> str:
        if self._vtpm.tpm2:
            return _times(_TIMEOUTS2)
        return _times(self._properties12(tpm12.TPM_CAP_PROP_TIS_TIMEOUT, 4))

    # -- questions ------------------------------------------------------------------------

    def _property2(self, which: int) -> int:
        body = self._capability2(tpm2.TPM_CAP_TPM_PROPERTIES, which)
        for found in tpm2.PropertyCapability.unpack_untrusted(body).tpmProperty:
            if found.property == which:
                return found.value
        raise DeviceError(errno.EIO)

    def _capability2(self, capability: int, which: int) -> bytes:
        asked = tpm2.GetCapabilityParameters(capability, which, 1)
        return self._query2(TpmCc.TPM_CC_GetCapability, asked)

    def _query2(self, code: TpmCc, parameters: TpmStruct) -> bytes:
        response = self._vtpm.query(tpm2.command(code, parameters=parameters))
        return tpm2.read_response_untrusted(code.name, response).parameters

    def _properties12(self, which: int, count: int) -> tuple[int, ...]:
        body = self._capability12(tpm12.TPM_CAP_PROPERTY, which.to_bytes(4, "big"))
        if len(body) != 4 * count:
            raise DeviceError(errno.EIO)
        return struct.unpack(f">{count}I", body)

    def _capability12(self, area: int, which: bytes) -> bytes:
        asked = tpm12.GetCapabilityParameters(area, which)
        body = self._query12(TpmOrdinal.TPM_ORD_GetCapability, asked)
        return tpm12.GetCapabilityResult.unpack_untrusted(body).resp

    def _query12(self, ordinal: TpmOrdinal, parameters: TpmStruct) -> bytes:
        response = self._vtpm.query(tpm12.command(ordinal, parameters))
        return tpm12.read_response_untrusted(ordinal.name, response)


def _times(microseconds: tuple[int, ...]) -> str:
    return f"{' '.join(map(str, microseconds))} [original]\n"
