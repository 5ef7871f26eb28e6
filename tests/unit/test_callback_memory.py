"""No memory of a process with a TPM is writable and executable, and none becomes so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import sockets as s
from tests.support.processes import in_child
from vtpm_cuse.engine import callbacks
from vtpm_cuse.errors import EngineUnavailable

_ATTACKS = r"""
import ctypes, mmap, os, signal, sys
from vtpm_cuse.engine import libtpms
from tests.support import commands as tpm
from tests.support.libtpms import nv_commands, run, started

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
ROOM, ALL = 4096, mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
CODE = b"\xb8\x37\x13\x00\x00\xc3"  # x86-64: return 0x1337
engine = started(tpm2=sys.argv[2] == "2")


def protect(address, rights):
    if libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(ROOM), rights):
        raise OSError(ctypes.get_errno(), "mprotect")


def use():
    assert [run(engine, command) for command in nv_commands(tpm2=engine.tpm2)] == [0, 0, 0]
    engine.locality = 3
    assert run(engine, nv_commands(tpm2=engine.tpm2)[2]) == 0
    engine.stop()


def run_shellcode(rights):
    address = libc.mmap(None, ctypes.c_size_t(ROOM), rights, 0x22, -1, ctypes.c_long(0))
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), "mmap")
    ctypes.memmove(address, CODE, len(CODE))
    protect(address, mmap.PROT_READ | mmap.PROT_EXEC)


def alias():
    # Who can still write to the file that executable memory is a view of?
    for line in open("/proc/self/maps"):
        if "x" in line.split()[1] and "memfd" in line:
            inode = int(line.split()[4])
            for fd in os.listdir("/proc/self/fd"):
                try:
                    if os.fstat(int(fd)).st_ino == inode:
                        os.pwrite(int(fd), CODE, 0)
                        return
                except OSError:
                    pass
    raise OSError(1, "nobody")


ACTIONS = {
    "use": use,
    "map": lambda: run_shellcode(ALL),
    "turn": lambda: run_shellcode(mmap.PROT_READ | mmap.PROT_WRITE),
    "add": lambda: protect(next(iter(libtpms._ADDRESSES.values())) & -ROOM, ALL),
    "alias": alias,
    "overwrite": lambda: ctypes.memmove(next(iter(libtpms._ADDRESSES.values())), CODE, len(CODE)),
    "maps": lambda: sys.stdout.write(open("/proc/self/maps").read()),
    "told": lambda: print("told" if libc.prctl(66, 0, 0, 0, 0) > 0 else "not told"),
}
try:
    ACTIONS[sys.argv[1]]()
except OSError as exc:
    sys.exit(f"refused: {exc}")
"""


def _act(name: str, *, tpm2: bool = True) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", _ATTACKS, name, "2" if tpm2 else "1.2"]
    return subprocess.run(words, check=False, capture_output=True, text=True)


def _writable_code(maps: str) -> list[str]:
    """Mappings that are both, and those to write into what another one executes."""
    lines = [line.split(maxsplit=5) for line in maps.splitlines()]
    assert any("x" in line[1] for line in lines)
    run = {(line[3], line[4]) for line in lines if line[1][2:] == "xs"}
    return [
        " ".join(line)
        for line in lines
        if line[1][1:3] == "wx"
        or (line[1][1] == "w" and line[1][3] == "s" and (line[3], line[4]) in run)
    ]


@pytest.mark.parametrize("tpm2", [True, False], ids=["tpm2", "tpm12"])
def test_a_tpm_works_and_its_process_ends_well(tpm2: bool) -> None:
    ended = _act("use", tpm2=tpm2)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_no_memory_is_writable_and_executable() -> None:
    assert _writable_code(_act("maps").stdout) == []


def test_what_calls_us_cannot_be_written_over() -> None:
    assert _act("overwrite").returncode == -11
    assert _act("alias").returncode == 1


@pytest.mark.parametrize("name", ["map", "turn", "add"])
def test_nothing_new_becomes_code(name: str) -> None:
    if _act("told").stdout != "told\n":
        pytest.skip("this kernel is older than 6.3: only the sandbox refuses it")
    ended = _act(name)
    assert (ended.returncode, ended.stderr.partition(":")[0]) == (1, "refused")


@pytest.mark.parametrize("tpm2", [True, False], ids=["tpm2", "tpm12"])
def test_a_server_has_no_memory_that_is_both(tmp_path: Path, tpm2: bool) -> None:
    with s.Server(tmp_path, *s.RUNNING, tpm2=tpm2) as server:
        assert server.request(s.GET_CONFIG, size=8)
        maps = Path(f"/proc/{server.process.pid}/maps").read_text()
    assert _writable_code(maps) == []


def test_starts_where_such_memory_is_forbidden(tmp_path: Path) -> None:
    """As with MemoryDenyWriteExecute= of systemd."""
    denied = (
        "import ctypes, os, sys; ctypes.CDLL(None).prctl(65, 1, 0, 0, 0);"
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    with s.Server(tmp_path, *s.RUNNING, program=(sys.executable, "-c", denied, *s.OURS)) as server:
        assert server.request(s.STORE_VOLATILE) == s.u32(0)


@in_child
def test_says_where_no_callback_can_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: type) -> None:
        raise MemoryError

    monkeypatch.setattr("ctypes.CFUNCTYPE", refuse)
    with pytest.raises(EngineUnavailable, match="no memory for libtpms' callbacks; let it map"):
        callbacks.make({"nothing": (lambda: 0, ())})


def test_says_that_a_file_may_not_be_as_large(tmp_path: Path) -> None:
    """libffi maps a file. By -B: Python would leave halves of what it compiles in the checkout."""
    words = ["--tpm2", "--tpmstate", f"dir={tmp_path}", *s.RUNNING]
    program = ("bash", "-c", 'ulimit -f 1; exec "$@"', "bash", s.OURS[0], "-B", *s.OURS[1:])
    done = s.run_swtpm(*words, "--ctrl", f"type=unixio,path={tmp_path / 'c'}", program=program)
    assert done.returncode
    assert "a file may have no more than 1024 bytes" in done.stderr
    assert "'ulimit -f'" in done.stderr
    assert done.stderr.count("\n") == 1
