"""The attacks from inside on the kernel of the lab, over sockets and over CUSE."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.integration.test_sandbox import (  # noqa: F401  the same tests on another kernel
    DEADLY,
    SURVIVED,
    test_a_state_file_that_is_not_there_yet_opens_no_folder,
    test_another_root,
    test_every_system_call,
    test_every_thread_has_no_rights,
    test_refused,
    test_runs_as_another_user,
    test_what_it_still_can,
    test_without_landlock_all_files_of_its_user_are_open_and_nothing_else,
)
from tests.integration.test_sandbox_start import (  # noqa: F401
    test_an_orderly_end_removes_sockets_and_pid_file,
    test_what_the_caller_left_open_is_closed,
    test_who_is_killed_leaves_no_socket_and_no_process,
)
from tests.kernel.harness import opened
from tests.kernel.proxy import LINE
from tests.support import sockets as s
from tests.support.attacks import ATTACKS, WITNESS, attack, subverted
from tests.support.commands import get_random
from tests.support.waiting import PATIENCE_SECONDS, wait_until
from tests.unit.test_callback_memory import (  # noqa: F401
    test_a_server_has_no_memory_that_is_both,
    test_a_tpm_works_and_its_process_ends_well,
    test_no_memory_is_writable_and_executable,
    test_what_calls_us_cannot_be_written_over,
)
from vtpm_cuse.service.confine import landlock

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

NAME = "vtpm-attacked"


@contextlib.contextmanager
def started(folder: Path, program: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A TPM on CUSE, whose device is there."""
    words = ["cuse", "-n", NAME, "--tpm2", "--tpmstate", f"dir={folder / 'state'}"]
    words += ["--log", f"file={folder / 'log'}", "--flags", "startup-clear", "--foreground"]
    with subprocess.Popen(
        [*program, *words], env=s.environment(), stderr=subprocess.PIPE
    ) as process:
        try:
            wait_until(Path(f"/dev/{NAME}").exists, "the device is there", process=process)
            yield process
        finally:
            process.kill()
            process.wait()
            wait_until(lambda: not Path(f"/dev/{NAME}").exists(), "the device is gone")


@pytest.fixture
def victim(tmp_path: Path, cuse: None) -> Iterator[subprocess.Popen[bytes]]:
    """A subverted TPM on CUSE."""
    for name in ("secret", "spare"):
        (tmp_path / name).touch()
    for name in ("folder", "folder2", "below"):
        (tmp_path / name).mkdir()
    (tmp_path / "below" / "thesis").touch()
    with started(tmp_path, subverted(str(tmp_path / "secret"))) as process:
        yield process


def suffer(name: str) -> str:
    with opened(Path(f"/dev/{NAME}")) as device:
        os.write(device, attack(name))
        return os.read(device, 1000).decode().removeprefix("refused: ")


def test_this_kernel_has_landlock() -> None:
    assert landlock.version() >= 1


def test_refused_on_cuse(victim: subprocess.Popen[bytes]) -> None:
    found = {name: suffer(name) for name in SURVIVED}
    assert found == {name: ATTACKS[name].inside for name in SURVIVED}
    assert suffer("nothing") == "done"
    victim.send_signal(signal.SIGTERM)
    assert victim.wait(PATIENCE_SECONDS) == 0


@pytest.mark.parametrize("name", DEADLY[::4])  # all of them over sockets
def test_deadly_on_cuse(name: str, victim: subprocess.Popen[bytes]) -> None:
    with pytest.raises(OSError, match=r"abort|not connected|No such device|I/O error"):
        suffer(name)
    assert victim.wait(PATIENCE_SECONDS) == -signal.SIGSYS


def test_no_state_is_touched_outside_the_sandbox_on_cuse(
    tmp_path: Path, cuse: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does a TPM that may be subverted say to the kernel what device it wants."""
    monkeypatch.setenv("DEVICE", f"/dev/{NAME}")
    with started(tmp_path, WITNESS) as process:
        with opened(Path(f"/dev/{NAME}")) as device:
            os.write(device, get_random(8))
            assert len(os.read(device, 100)) == 20
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=PATIENCE_SECONDS)
    assert set(told.decode().splitlines()) == {
        "libtpms: in the sandbox",
        "state: in the sandbox",
        "device: made",
    }


def test_no_state_is_touched_outside_the_sandbox_on_a_device_of_the_kernels(tmp_path: Path) -> None:
    words = ["chardev", "--vtpm-proxy", "--tpm2", "--tpmstate", f"dir={tmp_path}"]
    with subprocess.Popen(
        [*WITNESS, *words], env=s.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert LINE.fullmatch(process.stdout.readline().decode())
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=PATIENCE_SECONDS)
    assert set(told.decode().splitlines()) == {
        "libtpms: in the sandbox",
        "state: in the sandbox",
    }


def test_no_process_is_left_beside_a_device(tmp_path: Path, cuse: None) -> None:
    """It has no file to remove, and so nothing that removes any."""
    with started(tmp_path, s.OURS) as process:
        assert not Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_SECONDS) == 0
