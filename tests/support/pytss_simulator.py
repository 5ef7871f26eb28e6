"""A plugin of pytest for the suite of tpm2-pytss: its TPM is ours, and not a program that it starts.

Either the one of `vtpm run`, around that suite, or one in a FUSE mount, whose device PYTSS_DEVICE
names, both cleared between two tests; or, where this package's own plugin is there, the fixture
`tpm`. It runs in an environment of that suite's own.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from typing import TYPE_CHECKING, Any, Final

import pytest

# At once: a test of theirs leaves imports broken.
from tpm2_pytss import ESAPI, ESYS_TR, TPM2_SU, TCTILdr

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vtpm_cuse.lab import Tpm

_PTM_INIT_DELETE_VOLATILE: Final = struct.pack(">II", 2, 1)
_PTM_INIT: Final = 0xC0045001
_STARTUP: Final = struct.pack(">HIIH", 0x8001, 12, 0x144, 0)
_MOUNTED: Final = os.environ.get("PYTSS_DEVICE")
_GIVEN: Final = _MOUNTED is not None or "VTPM_RAW_PATH" in os.environ


class Ours:
    """A simulator, as that suite calls it."""

    lent: Tpm | None = None

    def __init__(self) -> None:
        self._own = None
        if _GIVEN:
            self.tcti_name_conf = os.environ["TPM2TOOLS_TCTI"]
            self._raw_path = os.environ.get("VTPM_RAW_PATH")
            return
        if (tpm := self.lent) is None:  # for the tests of a whole class
            from vtpm_cuse.lab import Tpm

            tpm = self._own = Tpm().start()
        self.tcti_name_conf, self._raw_path = tpm.tcti, tpm.raw_path

    def start(self) -> None:
        """As new, but for the seeds of one that was given, and not started up."""
        if _GIVEN:
            self._reset()
            with ESAPI(self.tcti_name_conf) as esapi:
                esapi.startup(TPM2_SU.CLEAR)
                esapi.clear(ESYS_TR.RH_PLATFORM)
        self._reset()

    def close(self) -> None:
        """What is not its own goes on."""
        if self._own is not None:
            self._own.close()

    # Any: of a package without types.
    def get_tcti(self) -> Any:  # noqa: ANN401
        return TCTILdr(*self.tcti_name_conf.split(":", 1))

    def __str__(self) -> str:
        return "swtpm"

    def _reset(self) -> None:
        if _MOUNTED is not None:
            with open(_MOUNTED, "r+b", buffering=0) as device:
                result = bytearray(struct.pack("=I", 1))  # the volatile state goes
                fcntl.ioctl(device, _PTM_INIT, result, True)
                device.write(_STARTUP)  # or the TCTI waits a second for more than an error
                assert device.read(10)[6:] == bytes(4)
            assert result == bytes(4)
            return
        with socket.socket(socket.AF_UNIX) as control:
            control.connect(f"{self._raw_path}.ctrl")
            control.sendall(_PTM_INIT_DELETE_VOLATILE)
            assert control.recv(4) == bytes(4)


if not _GIVEN:

    @pytest.fixture(autouse=True)
    def _lent(request: pytest.FixtureRequest) -> Iterator[None]:
        if "simulator" not in request.fixturenames:  # else several tests have one together
            Ours.lent = request.getfixturevalue("tpm")
        yield
        Ours.lent = None


def pytest_configure() -> None:
    """Puts it into the place of theirs."""
    from test.TSS2_BaseTest import TpmSimulator  # type: ignore[import-not-found]

    TpmSimulator.getSimulator = staticmethod(Ours)
