"""A plugin of pytest for the suite of tpm2-pytss: its TPM is the one of ``vtpm run`` around it.

Nothing of this package is imported: it runs in an environment of that suite's own. That suite wants a
new TPM for each test, so this one is reset and cleared by its platform in between.
"""

from __future__ import annotations

import os
import socket
import struct
from typing import Any, Final

# At once: a test of theirs leaves imports broken.
from tpm2_pytss import ESAPI, ESYS_TR, TPM2_SU, TCTILdr  # type: ignore[import-not-found]

_PTM_INIT_DELETE_VOLATILE: Final = struct.pack(">II", 2, 1)


class BelowRun:
    """A simulator, as that suite calls it."""

    def __init__(self) -> None:
        self.tcti_name_conf = os.environ["TPM2TOOLS_TCTI"]

    def start(self) -> None:
        """As new, but for its seeds, and not started up."""
        _reset()
        with ESAPI(self.tcti_name_conf) as esapi:
            esapi.startup(TPM2_SU.CLEAR)
            esapi.clear(ESYS_TR.RH_PLATFORM)
        _reset()

    def close(self) -> None:
        """It goes on."""

    # Any: of a package without types.
    def get_tcti(self) -> Any:  # noqa: ANN401
        return TCTILdr(*self.tcti_name_conf.split(":", 1))

    def __str__(self) -> str:
        return "swtpm"


def _reset() -> None:
    with socket.socket(socket.AF_UNIX) as control:
        control.connect(f"{os.environ['VTPM_RAW_PATH']}.ctrl")
        control.sendall(_PTM_INIT_DELETE_VOLATILE)
        assert control.recv(4) == bytes(4)


def pytest_configure() -> None:
    """Puts it into the place of theirs, which start a program."""
    from test.TSS2_BaseTest import TpmSimulator  # type: ignore[import-not-found]

    TpmSimulator.getSimulator = staticmethod(BelowRun)
