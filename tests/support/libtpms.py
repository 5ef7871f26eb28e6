"""The real engine on libtpms, as tests use it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support import commands as tpm
from tests.support.stores import FailingStore
from vtpm_cuse.engine.libtpms import LibtpmsEngine
from vtpm_cuse.storage.directory import DirectoryStore
from vtpm_cuse.storage.sealed import SealedStore

if TYPE_CHECKING:
    from pathlib import Path

BOTH = pytest.mark.parametrize("tpm2", [True, False], ids=["tpm2", "tpm12"])
READ_PCR_10 = tpm.pcr_read(10)


def make(*, tpm2: bool = True, store: FailingStore | None = None) -> LibtpmsEngine:
    return LibtpmsEngine(tpm2=tpm2, nvram=SealedStore(store or FailingStore()))


def started(*, tpm2: bool = True, store: FailingStore | None = None) -> LibtpmsEngine:
    """Powered on and past Startup."""
    engine = make(tpm2=tpm2, store=store)
    engine.start()
    assert run(engine, tpm.TPM2_STARTUP_CLEAR if tpm2 else tpm.TPM12_STARTUP_CLEAR) == 0
    return engine


def on_directory(directory: Path, *, tpm2: bool = True) -> LibtpmsEngine:
    return LibtpmsEngine(tpm2=tpm2, nvram=SealedStore(DirectoryStore(str(directory), tpm2=tpm2)))


def is_running(engine: LibtpmsEngine) -> bool:
    return engine.running


def run(engine: LibtpmsEngine, command: bytes) -> int:
    return tpm.code_of(engine.process(command))


def nv_commands(*, tpm2: bool) -> tuple[bytes, bytes, bytes]:
    """To define an index, to write "persists" into it, and to read it."""
    if tpm2:
        index = tpm.NV_INDEX
        return (
            tpm.nv_define(index, 8),
            tpm.nv_write(index, b"persists"),
            tpm.nv_read(index, 8),
        )
    index = 0x1101
    return (
        tpm.tpm12_nv_define(index, 8),
        tpm.tpm12_nv_write(index, b"persists"),
        tpm.tpm12_nv_read(index, 8),
    )
