"""A TPM whose state is a block device: a loop device of the lab's kernel."""

from __future__ import annotations

import contextlib
import os
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.integration.test_state_interchange import PEER, life, states
from tests.support import sockets as s
from vtpm_cuse.errors import StateDamaged
from vtpm_cuse.storage.linear import LinearStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("warm")

MIB = 1 << 20


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Callable[[int], str]]:
    """Makes devices of a size in bytes, full of zeros; gives their paths."""
    with contextlib.ExitStack() as stack:

        def make(size: int) -> str:
            image = tmp_path / f"{size}.img"
            with open(image, "wb") as file:
                file.truncate(size)
            words = ["losetup", "--find", "--show", str(image)]
            run = subprocess.run(words, capture_output=True, text=True, check=True)
            device = run.stdout.strip()
            stack.callback(subprocess.run, ["losetup", "--detach", device], check=True)
            return device

        yield make


def state(device: str) -> tuple[str, str]:
    return "--tpmstate", f"backend-uri=file://{device}"


@pytest.mark.parametrize(
    ("tpm2", "first"),
    [(True, s.OURS), (True, PEER), (False, s.OURS)],
    ids=["tpm2, ours first", "tpm2, peer first", "tpm12, ours first"],
)
def test_device_in_turns(
    tpm2: bool, first: tuple[str, ...], loop: Callable[[int], str], tmp_path: Path
) -> None:
    device = loop(MIB)
    second = PEER if first == s.OURS else s.OURS
    for turn, program in enumerate((first, second, first)):
        with life(tmp_path, turn, program, *state(device), tpm2=tpm2) as one:
            one.go_on(turn)
            one.end()
    place = f"file://{device}"
    assert states(s.OURS, place, tpm2=tpm2) == states(PEER, place, tpm2=tpm2)


def test_link_to_a_device(loop: Callable[[int], str], tmp_path: Path) -> None:
    """As in /dev/disk/by-id."""
    device, link = loop(MIB), tmp_path / "by-id"
    link.symlink_to(device)
    with life(tmp_path, 0, s.OURS, *state(str(link)), tpm2=True) as one:
        one.write(0)
        one.end()
    with life(tmp_path, 1, s.OURS, *state(device), tpm2=True) as one:
        one.check(0)
        one.end()


@pytest.mark.parametrize("option", ["backend-uri=file://{folder}/state.bin", "dir={folder},backup"])
def test_other_stores_in_the_sandbox(option: str, tmp_path: Path) -> None:
    """This kernel has Landlock: what a store does is permitted, with its files new and old."""
    words = ("--tpmstate", option.format(folder=tmp_path))
    for turn in range(2):
        with life(tmp_path, turn, s.OURS, *words, tpm2=True) as one:
            one.go_on(turn)
            one.end()


def test_second_process_is_kept_out(loop: Callable[[int], str], tmp_path: Path) -> None:
    device = loop(MIB)
    with life(tmp_path, 0, s.OURS, *state(device), tpm2=True) as one:
        one.write(0)
        second = s.run_swtpm("--tpm2", *state(device), *s.RUNNING)
        assert second.returncode == 1
        assert "Resource temporarily unavailable" in second.stderr
        one.write(1)
        one.end()


def test_file_system_is_not_overwritten(loop: Callable[[int], str]) -> None:
    device = loop(4 * MIB)
    subprocess.run(["mkfs.ext4", "-q", device], check=True)
    with open(device, "rb") as file:
        before = file.read()
    assert before[:192] == bytes(192), "ext4 leaves the place of our header free"
    run = s.run_swtpm("--tpm2", *state(device), *s.RUNNING)
    assert run.returncode == 1
    assert "not a linear TPM store" in run.stderr
    with open(device, "rb") as file:
        assert file.read() == before


@pytest.mark.parametrize("at", [0, 7, 4096, 100_000, 2 * MIB - 512])
def test_any_byte_makes_a_device_somebodys(at: int, loop: Callable[[int], str]) -> None:
    device = loop(2 * MIB)
    with open(device, "rb+") as file:
        file.seek(at)
        file.write(b"x")
    store = LinearStore(device)
    with pytest.raises(StateDamaged, match="not a linear TPM store"):
        store.store("permall", b"x")
    store.close()


def test_mode_of_the_device_node_is_not_touched(loop: Callable[[int], str]) -> None:
    device = loop(MIB)
    before = os.stat(device).st_mode
    store = LinearStore(device, mode=0o604)
    store.store("permall", b"x")
    store.close()
    assert os.stat(device).st_mode == before


def test_device_that_is_too_small(loop: Callable[[int], str], tmp_path: Path) -> None:
    """Volatile state does not fit: 0x17, as the C suite answers; the TPM and its state go on."""
    device = loop(10 << 10)
    with life(tmp_path, 0, s.OURS, *state(device), tpm2=True) as one:
        one.write(0)
        assert one.control.result(s.STORE_VOLATILE) == 0x17
        one.write(1)
        one.server.process.kill()
    with life(tmp_path, 1, s.OURS, *state(device), tpm2=True) as one:
        one.check(0)
        one.check(1)


def test_device_without_room_for_a_tpm(loop: Callable[[int], str]) -> None:
    device = loop(512)
    run = s.run_swtpm("--tpm2", *state(device), *s.RUNNING)
    assert run.returncode == 1
    assert "512 bytes of the device have no room" in run.stderr
