"""A FIFO where a file of ours is to be: one line, before anything is served, and no hang."""

from __future__ import annotations

import os
import stat
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.support import sockets as s
from tests.support.waiting import PATIENCE_SECONDS, wait_until

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("more", [(), ("--daemon",)], ids=["foreground", "background"])
@pytest.mark.parametrize(
    "option",
    [
        "--log=file={}",
        "--log=file={},truncate",
        "--pid=file={}",
        "--pcap=file={}",
        "--key=file={}",
        "--key=pwdfile={}",
        "--migration-key=file={}",
        "--profile=file={}",
    ],
)
def test_fifo(option: str, more: tuple[str, ...], tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    (tmp_path / "state").mkdir()
    done = s.run_swtpm(
        *("--tpm2", "--tpmstate", f"dir={tmp_path / 'state'}", *s.RUNNING),
        *("--ctrl", f"type=unixio,path={tmp_path / 'c'}", *more, option.format(fifo)),
    )
    assert done.returncode == 1
    assert "it is a pipe" in done.stderr
    assert done.stderr.count("\n") == 1
    assert stat.S_ISFIFO(fifo.stat().st_mode)
    wait_until(lambda: not (tmp_path / "c").exists(), "its end")


def test_pid_file_that_is_no_file_stays(tmp_path: Path) -> None:
    """It is written to, and not removed at the end: that could be /dev/null."""
    ours, theirs = os.openpty()
    path = os.ttyname(theirs)
    words = [*s.OURS, "socket", "--tpm2", "--tpmstate", f"dir={tmp_path}", *s.RUNNING]
    words += ["--ctrl", f"type=unixio,path={tmp_path / 'c'}", "--pid", f"file={path}"]
    with subprocess.Popen(words, env=s.environment()) as process:
        assert s.readable(ours, PATIENCE_SECONDS)
        assert int(os.read(ours, 100)) == process.pid
        process.terminate()
        assert process.wait(PATIENCE_SECONDS) == 0
    assert os.path.exists(path)
    os.close(ours)
    os.close(theirs)


@pytest.mark.parametrize("option", ["--key=file={}", "--key=pwdfile={}"])
def test_key_through_a_pipe_of_the_shell(option: str, tmp_path: Path) -> None:
    """As <(...) passes it."""
    read_end, write_end = os.pipe()
    os.write(write_end, b"00112233445566778899aabbccddeeff")
    os.close(write_end)
    with s.Server(
        tmp_path, *s.RUNNING, option.format(f"/dev/fd/{read_end}"), pass_fds=[read_end]
    ) as server:
        assert server.request(s.GET_CONFIG, size=8) == s.u32(0, 1)
    os.close(read_end)
