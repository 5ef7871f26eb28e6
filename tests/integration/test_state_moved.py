"""The state is replaced below a running program: INIT looks it up again, or says why it cannot."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, Final

import pytest

from tests.support import commands as tpm
from tests.support import sockets as s
from tests.support.files import umask
from vtpm_cuse.service.confine import landlock

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FIRST, SECOND = tpm.NV_INDEX, tpm.NV_INDEX + 1
FREE: Final = ("--seccomp", "action=none")  # no Landlock either
confined = pytest.mark.skipif(not landlock.version(), reason="this kernel has no Landlock")


def command(server: s.Server, words: bytes) -> int:
    with server.data() as data:
        return tpm.code_of(data.command(words))


def serve(folder: Path, uri: str, *words: str) -> s.Server:
    return s.Server(folder, "--tpmstate", f"backend-uri={uri}", *words)


def define(server: s.Server, index: int) -> None:
    assert command(server, tpm.TPM2_STARTUP_CLEAR) in {0, 0x100}
    assert command(server, tpm.nv_define(index, 8)) == 0


def is_defined(server: s.Server, index: int) -> bool:
    assert command(server, tpm.TPM2_STARTUP_CLEAR) in {0, 0x100}
    return command(server, tpm.nv_write(index, b"8 octets")) == 0


def tpm_with(folder: Path, uri: str, index: int) -> None:
    """Makes a TPM there in which *index* is defined."""
    with serve(folder, uri) as server:
        assert server.init() == 0
        define(server, index)
        assert server.request(s.SHUTDOWN) == bytes(4)
        assert server.wait() == 0


def by_renaming(path: Path, other: Path) -> None:
    path.rename(path.with_name("away"))
    other.rename(path)


def by_a_copy(path: Path, other: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
        shutil.copytree(other, path)
    else:
        path.unlink()
        shutil.copy(other, path)


CHANGES: Final[dict[str, Callable[[Path, Path], None]]] = {
    "renamed": by_renaming,
    "made anew": by_a_copy,
}
kinds = pytest.mark.parametrize("kind", ["dir", "file"])


def places(tmp_path: Path, kind: str) -> tuple[Path, Path]:
    """Two places with a TPM each."""
    made = []
    for name, index in (("state", FIRST), ("other", SECOND)):
        path = tmp_path / name
        if kind == "dir":
            path.mkdir()
        tpm_with(tmp_path / f"made-{name}", f"{kind}://{path}", index)
        made.append(path)
    return made[0], made[1]


@pytest.mark.parametrize("change", CHANGES)
@kinds
def test_init_serves_the_state_that_is_there_now(kind: str, change: str, tmp_path: Path) -> None:
    state, other = places(tmp_path, kind)
    with serve(tmp_path / "server", f"{kind}://{state}", *FREE) as server:
        assert server.init() == 0
        assert is_defined(server, FIRST)
        assert server.request(s.STOP) == bytes(4)
        CHANGES[change](state, other)
        assert server.init() == 0
        assert is_defined(server, SECOND)
        assert not is_defined(server, FIRST)
        assert "is another one than before" in server.log_text()
        # The lock has moved along.
        rival = s.run_swtpm(
            *("--tpm2", *s.RUNNING, "--tpmstate", f"backend-uri={kind}://{state}"),
            *("--server", f"type=unixio,path={tmp_path}/rival"),
        )
        assert rival.returncode == 1
        assert "Could not lock access" in rival.stderr


def test_init_follows_a_link_to_another_snapshot(tmp_path: Path) -> None:
    state, other = places(tmp_path, "dir")
    link = tmp_path / "link"
    link.symlink_to(state)
    with serve(tmp_path / "server", f"dir://{link}", *FREE) as server:
        assert server.init() == 0
        assert is_defined(server, FIRST)
        link.unlink()
        link.symlink_to(other)
        assert server.init() == 0  # which stops the running one first
        assert is_defined(server, SECOND)


@confined
@pytest.mark.parametrize("change", CHANGES)
@kinds
def test_confined_program_says_why_init_fails(kind: str, change: str, tmp_path: Path) -> None:
    state, other = places(tmp_path, kind)
    uri = f"{kind}://{state}"
    with serve(tmp_path / "server", uri) as server:
        assert server.init() == 0
        assert is_defined(server, FIRST)
        assert server.request(s.STOP) == bytes(4)
        CHANGES[change](state, other)
        before = (state / "tpm2-00.permall" if kind == "dir" else state).read_bytes()
        for _ in range(2):
            assert server.init() != 0
        assert f"{state}: it was replaced since this program started" in server.log_text()
        assert "end the program and start it again" in server.log_text()
        assert (state / "tpm2-00.permall" if kind == "dir" else state).read_bytes() == before
        assert command(server, tpm.TPM2_STARTUP_CLEAR) == 0x101
    with serve(tmp_path / "after", uri) as server:
        assert server.init() == 0
        assert is_defined(server, SECOND)


@kinds
@pytest.mark.parametrize("words", [(), FREE], ids=["confined", "free"])
@pytest.mark.parametrize("lock", ["true", "false"])
def test_init_says_that_the_state_is_gone(
    lock: str, words: tuple[str, ...], kind: str, tmp_path: Path
) -> None:
    state, _ = places(tmp_path, kind)
    with serve(tmp_path / "server", f"{kind}://{state},lock={lock}", *words) as server:
        assert server.init() == 0
        assert server.request(s.STOP) == bytes(4)
        state.rename(tmp_path / "away")
        assert server.init() != 0
        assert str(state) in server.log_text()
        assert "put back what was there" in server.log_text()
        assert "mkdir" not in server.log_text(), "an empty one would begin another TPM"
        assert not state.exists()
        (tmp_path / "away").rename(state)
        assert server.init() == 0
        assert is_defined(server, FIRST)


def test_lock_file_that_was_removed_is_locked_again(tmp_path: Path) -> None:
    """By the next write: a lock on a file without a name keeps nobody off."""
    state, _ = places(tmp_path, "dir")
    with serve(tmp_path / "server", f"dir://{state}") as server:
        assert server.init() == 0
        assert is_defined(server, FIRST)
        (state / ".lock").unlink()
        assert command(server, tpm.nv_write(FIRST, b"a change")) == 0
        assert s.is_locked(state)
        (state / ".lock").unlink()
        assert server.init() == 0
        assert s.is_locked(state)


def test_nothing_is_written_once_another_has_the_lock(tmp_path: Path) -> None:
    state, _ = places(tmp_path, "dir")
    with serve(tmp_path / "server", f"dir://{state}") as server:
        assert server.init() == 0
        assert is_defined(server, FIRST)
        (state / ".lock").unlink()
        with serve(tmp_path / "second", f"dir://{state}") as second:
            assert second.init() == 0
            assert is_defined(second, FIRST)
            before = (state / "tpm2-00.permall").read_bytes()
            for _ in range(2):
                assert command(server, tpm.nv_write(FIRST, b"a change")) != 0
            assert (state / "tpm2-00.permall").read_bytes() == before


def test_nothing_is_written_into_a_file_without_a_name(tmp_path: Path) -> None:
    """It would be acknowledged, and gone when the program ends."""
    state, _ = places(tmp_path, "file")
    with serve(tmp_path / "server", f"file://{state}") as server:
        assert server.init() == 0
        assert is_defined(server, FIRST)
        os.unlink(state)
        assert command(server, tpm.nv_write(FIRST, b"a change")) != 0
        assert "was removed, or replaced" in server.log_text()


# -- rights that a umask or a mode takes ----------------------------------------------------


@kinds
def test_new_tpm_under_a_umask_that_takes_everything(kind: str, tmp_path: Path) -> None:
    """Its capabilities are gone when INIT opens the state: the owner must be able to."""
    state = tmp_path / "state"
    if kind == "dir":
        state.mkdir()
    folder = tmp_path / "server"
    folder.mkdir()
    (folder / "state").mkdir()
    with umask(0o777):
        server = serve(folder, f"{kind}://{state}")
    with server:
        for _ in range(2):
            assert server.init() == 0
            assert command(server, tpm.TPM2_STARTUP_CLEAR) == 0
            assert server.request(s.STOP) == bytes(4)


def test_mode_that_keeps_the_tpm_out_is_refused_in_one_line(tmp_path: Path) -> None:
    run = s.run_swtpm(
        *("--tpm2", *s.RUNNING, "--tpmstate", f"dir={tmp_path},mode=0000"),
        *("--server", f"type=unixio,path={tmp_path}/data"),
    )
    assert run.returncode == 1
    assert "The mode 0000 would keep the TPM from its own state" in run.stderr
    assert "Traceback" not in run.stderr
    assert [path.name for path in tmp_path.iterdir() if path.name != "data"] == []
