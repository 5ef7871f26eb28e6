"""What a TPM says of itself when it is asked between two commands, as texts; no client notices.

They have the form that the kernel's have under /sys/class/tpm. Where it has such a file for TPM 1.2
only (``caps``, ``durations``, ``timeouts``), a TPM 2.0's says it in the same form.
Source: Documentation/ABI/stable/sysfs-class-tpm in Linux; TCG EK Credential Profile, for the certificate.
"""

from __future__ import annotations

import contextlib
import errno
import re
import struct
from typing import TYPE_CHECKING, Final

from vtpm_cuse.errors import DeviceError, TpmError
from vtpm_cuse.wire import tpm2, tpm12
from vtpm_cuse.wire.tpm import TpmCc, TpmOrdinal
from vtpm_cuse.wire.tpm2 import TpmAlg, TpmaNv

if TYPE_CHECKING:
    from collections.abc import Callable

    from vtpm_cuse.vtpm.vtpm import Vtpm
    from vtpm_cuse.wire.marshal import TpmStruct

_BANKS: Final = {
    "pcr-sha1": TpmAlg.TPM_ALG_SHA1,
    "pcr-sha256": TpmAlg.TPM_ALG_SHA256,
    "pcr-sha384": TpmAlg.TPM_ALG_SHA384,
    "pcr-sha512": TpmAlg.TPM_ALG_SHA512,
    "pcr-sm3": TpmAlg.TPM_ALG_SM3_256,
}
PCR_COUNT: Final = 24
_PCR_PATH: Final = re.compile(r"(pcr-\w+)/(\d{1,2})")
_EK_CERTIFICATES: Final = (0x01C00002, 0x01C0001C, 0x01C0000A, 0x01C00016)
"""NV indices of the certificates of RSA keys, of 2048 and 3072 bits, and of P-256 and P-384."""
_NV_PART: Final = 512
_READABLE: Final = TpmaNv.AUTHREAD | TpmaNv.NO_DA | TpmaNv.WRITTEN
_KINDS: Final = 0xF0
"""TPM_NT, 0 for an ordinary index. Of others, and without NO_DA, an attempt to read may count."""

# What a driver goes by with a TPM 2.0, in microseconds (TCG PC Client Platform TPM Profile).
_TIMEOUTS2: Final = (750_000, 2_000_000, 200_000, 30_000)
_DURATIONS2: Final = (20_000, 750_000, 2_000_000)


class TpmFacts:
    """The texts of one TPM."""

    def __init__(self, vtpm: Vtpm) -> None:
        self._vtpm = vtpm
        self._made: dict[str, Callable[[], bytes]] = {
            "tpm_version_major": lambda: self._version().encode(),
            "caps": lambda: self._caps().encode(),
            "durations": lambda: self._durations().encode(),
            "timeouts": lambda: self._timeouts().encode(),
            "ek.crt": self._ek_certificate,
        }

    def read(self, path: str) -> bytes:
        """The text at a *path*, such as ``pcr-sha256/10`` or ``caps``; no command may run.

        Raises:
            DeviceError: ENOENT where there is no such thing, EBUSY and EIO as `Vtpm.query`.
            VtpmError: The TPM fails.
        """
        found = _PCR_PATH.fullmatch(path)
        if found and int(found[2]) < PCR_COUNT and found[1] in self.active_banks():
            return f"{self._pcr(found[1], int(found[2])).hex().upper()}\n".encode()
        make = self._made.get(path)
        if make is None:
            raise DeviceError(errno.ENOENT)
        return make()

    def active_banks(self) -> tuple[str, ...]:
        """Folders of the PCR banks that the TPM has. Raises as `read`."""
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

    def _ek_certificate(self) -> bytes:
        """The first that there is, in DER."""
        for index in _EK_CERTIFICATES if self._vtpm.tpm2 else ():
            with contextlib.suppress(TpmError):  # there is none
                return self._nv(index)
        raise DeviceError(errno.ENOENT)

    def _nv(self, index: int) -> bytes:
        """All that is in an index that anybody may read."""
        answer = self._query2(TpmCc.TPM_CC_NV_ReadPublic, handles=(index,))
        public = tpm2.NvPublic.unpack_untrusted(
            tpm2.NvReadPublicResult.unpack_untrusted(answer).nvPublic
        )
        if public.attributes & (_READABLE | _KINDS) != _READABLE:
            raise DeviceError(errno.ENOENT)
        found = b""
        while len(found) < public.dataSize:
            size = min(_NV_PART, public.dataSize - len(found))
            part = self._query2(
                TpmCc.TPM_CC_NV_Read,
                tpm2.NvReadParameters(size, len(found)),
                handles=(index, index),
                session=tpm2.PasswordSession(),
            )
            found += (data := tpm2.NvReadResult.unpack_untrusted(part).data)
            if not data:
                raise DeviceError(errno.EIO)
        return found

    def _property2(self, which: int) -> int:
        body = self._capability2(tpm2.TPM_CAP_TPM_PROPERTIES, which)
        for found in tpm2.PropertyCapability.unpack_untrusted(body).tpmProperty:
            if found.property == which:
                return found.value
        raise DeviceError(errno.EIO)

    def _capability2(self, capability: int, which: int) -> bytes:
        asked = tpm2.GetCapabilityParameters(capability, which, 1)
        return self._query2(TpmCc.TPM_CC_GetCapability, asked)

    def _query2(
        self,
        code: TpmCc,
        parameters: TpmStruct | None = None,
        handles: tuple[int, ...] = (),
        session: tpm2.PasswordSession | None = None,
    ) -> bytes:
        response = self._vtpm.query(tpm2.command(code, handles, parameters, session))
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
