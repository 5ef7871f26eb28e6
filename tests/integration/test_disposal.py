"""A running server on a file system that takes long to free files: nothing of it is noticed."""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING, Final

from tests.support import commands as tpm
from tests.support import sockets as s

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

SLOW: Final = """
import os, sys, threading
from vtpm_cuse.cli.swtpm import main
from vtpm_cuse.storage import disposal

def close(fd):
    if not os.fstat(fd).st_nlink:
        os.write(2, b"%d " % (threading.current_thread() is threading.main_thread()))
    os.close(fd)

disposal._LONG_SECONDS = 0.0
disposal.os = type(os)("os")
vars(disposal.os).update({**vars(os), "close": close})
sys.exit(main())
"""
"""Says of each replaced file whether the main thread had to free it."""


def test_the_worker_frees_files_below_the_sandbox(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    program = (sys.executable, "-c", SLOW)
    with s.Server(tmp_path, *s.RUNNING, program=program) as server, server.data() as client:
        client.command(tpm.nv_define(tpm.NV_INDEX, 64))
        before = server.descriptors()
        for number in range(500):
            command = tpm.nv_write(tpm.NV_INDEX, number.to_bytes(64, "big"))
            assert tpm.code_of(client.command(command)) == 0
            assert server.descriptors() <= before + 66
        found = tpm.nv_data(client.command(tpm.nv_read(tpm.NV_INDEX, 64)))
        assert int.from_bytes(found, "big") == 499
        os.kill(server.process.pid, signal.SIGTERM)
        assert server.wait() == 0
    said = capfd.readouterr().err.split()
    assert len(said) >= 499
    assert said.count("0") > said.count("1")
