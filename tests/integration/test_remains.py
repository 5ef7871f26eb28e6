"""What is left of a TPM: no other begins beside it, by no way; a backup is what it starts from."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Final

import pytest

from tests.support import commands as tpm
from tests.support import sockets as s
from tests.support.setups import OURS as SETUP
from tests.support.setups import Workshop
from tests.support.waiting import PATIENCE_SECONDS
from vtpm_cuse.config import StartupConfig, StateConfig, VtpmConfig
from vtpm_cuse.engine.base import StateType
from vtpm_cuse.errors import ResultError
from vtpm_cuse.service.compose import make_vtpm, make_vtpm_in_memory, power_on

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from vtpm_cuse.vtpm.vtpm import Vtpm

INDEX: Final = tpm.NV_INDEX
VOLATILE: Final = StateType.VOLATILE.blob_name
CHARDEV: Final = "import sys; from vtpm_cuse.cli.swtpm import main; sys.exit(main())"

# What is left, by the suffix of its name; the prefix of what was written aside is in capitals.
LEFT: Final = {
    "backup": "{tpm}-00.permall.bak",
    "half of a swap by the C suite": "{tpm}-00.permall.tmp",
    "written aside": "{TMP}-00.permall",
    "backup, aside": "{TMP}-00.permall.bak",
    "volatile state": "{tpm}-00.volatilestate",
    "saved state": "{tpm}-00.savestate",
}


def file_name(pattern: str, *, tpm2: bool) -> str:
    suffix = "2" if tpm2 else ""
    return pattern.format(tpm=f"tpm{suffix}", TMP=f"TMP{suffix}")


def vtpm_of(
    state: Path, *, tpm2: bool = True, backup: bool = False, incoming: bool = False
) -> tuple[Vtpm, VtpmConfig]:
    config = VtpmConfig(
        tpm2=tpm2,
        state=StateConfig(uri=f"dir://{state}", backup=backup),
        startup=StartupConfig(not_need_init=True, startup="clear"),
        incoming=incoming,
    )
    return make_vtpm(config), config


@contextlib.contextmanager
def running(state: Path, *, tpm2: bool = True, backup: bool = False) -> Iterator[Vtpm]:
    vtpm, config = vtpm_of(state, tpm2=tpm2, backup=backup)
    try:
        power_on(vtpm, config)
        yield vtpm
    finally:
        vtpm.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """A TPM of each version, with its volatile state."""
    made = {}
    for tpm2 in (True, False):
        made[tpm2] = state = tmp_path_factory.mktemp("whole")
        with running(state, tpm2=tpm2) as vtpm:
            vtpm.store_volatile()
            if tpm2:
                assert tpm.code_of(vtpm.process(tpm.nv_define(INDEX, 8))) == 0
    return made


def leave(state: Path, whole: Path, pattern: str, *, tpm2: bool) -> Path:
    """Only that is in the new folder *state*."""
    state.mkdir(exist_ok=True)
    path = state / file_name(pattern, tpm2=tpm2)
    source = VOLATILE if path.name.endswith(VOLATILE) else "permall"
    shutil.copy(whole / file_name(f"{{tpm}}-00.{source}", tpm2=tpm2), path)
    return path


def contents(state: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in state.iterdir() if path.name != ".lock"}


# -- the ways in which a TPM may begin ------------------------------------------------------


def start(state: Path, whole: Path, *, tpm2: bool) -> str:
    """As every emulator does it: socket, chardev, CUSE, FUSE."""
    del whole
    vtpm, config = vtpm_of(state, tpm2=tpm2)
    return refusal(vtpm, lambda: power_on(vtpm, config))


def start_again(state: Path, whole: Path, *, tpm2: bool) -> str:
    """INIT of a process that served another TPM before its state was taken away."""
    kept = contents(state)
    for name in kept:
        (state / name).unlink()
    shutil.copy(whole / file_name("{tpm}-00.permall", tpm2=tpm2), state)
    vtpm, config = vtpm_of(state, tpm2=tpm2)
    power_on(vtpm, config)
    vtpm.stop()
    for path in [path for path in state.iterdir() if path.name != ".lock"]:
        path.unlink()
    for name, data in kept.items():
        (state / name).write_bytes(data)
    return refusal(vtpm, vtpm.start)


def incoming_without_a_state(state: Path, whole: Path, *, tpm2: bool) -> str:
    del whole
    vtpm, _ = vtpm_of(state, tpm2=tpm2, incoming=True)
    return refusal(vtpm, vtpm.start)


def incoming_state(state: Path, whole: Path, *, tpm2: bool) -> str:
    """A migration whose destination still has a part of another TPM."""
    return given_state(state, whole, tpm2=tpm2, incoming=True)


def given_state(state: Path, whole: Path, *, tpm2: bool, incoming: bool = False) -> str:
    """SET_STATEBLOB."""
    with running(whole, tpm2=tpm2) as source:
        _, blob = source.export_blob(StateType.PERMANENT, decrypted=True)
    vtpm, _ = vtpm_of(state, tpm2=tpm2, incoming=incoming)

    def give_and_start() -> None:
        vtpm.import_blob(1, 0, blob)
        vtpm.start()

    return refusal(vtpm, give_and_start)


def refusal(vtpm: Vtpm, call: Callable[[], object]) -> str:
    with pytest.raises(ResultError) as caught:
        call()
    assert not vtpm.running
    vtpm.close()
    return str(caught.value)


WAYS: Final = [start, start_again, incoming_without_a_state, incoming_state, given_state]


@pytest.mark.parametrize("tpm2", [True, False], ids=["2.0", "1.2"])
@pytest.mark.parametrize("what", LEFT)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_no_tpm_begins_beside_what_is_left(
    way: Callable[..., str], what: str, tpm2: bool, whole: dict[bool, Path], tmp_path: Path
) -> None:
    path = leave(tmp_path / "state", whole[tpm2], LEFT[what], tpm2=tpm2)
    before = contents(path.parent)
    said = way(path.parent, whole[tpm2], tpm2=tpm2)
    assert str(path) in said
    assert "no other TPM begins beside it" in said
    assert contents(path.parent) == before


@pytest.mark.parametrize("tpm2", [True, False], ids=["2.0", "1.2"])
def test_a_tpm_begins_where_the_other_version_has_its_own(
    tpm2: bool, whole: dict[bool, Path], tmp_path: Path
) -> None:
    """As in the C suite: they are two TPMs, each with its names."""
    state = tmp_path / "state"
    shutil.copytree(whole[not tpm2], state)
    before = contents(state)
    with running(state, tpm2=tpm2) as vtpm:
        assert vtpm.running
    assert before.items() < contents(state).items()


@pytest.mark.parametrize("junk", [b"", b"half", bytes(2000)])
def test_a_tpm_begins_beside_what_a_crash_cut_off(junk: bytes, tmp_path: Path) -> None:
    (tmp_path / "TMP2-00.permall").write_bytes(junk)
    with running(tmp_path) as vtpm:
        assert vtpm.running


def test_linear_file_with_a_volatile_state_only(tmp_path: Path) -> None:
    config = VtpmConfig(tpm2=True, state=StateConfig(uri=f"file://{tmp_path}/state.bin"))
    vtpm = make_vtpm(config)
    vtpm.start()
    vtpm.store_volatile()
    vtpm.stop()
    blobs = vtpm.need_store().blobs
    blobs.delete("permall")
    before = (tmp_path / "state.bin").read_bytes()
    said = refusal(vtpm, vtpm.start)
    assert f"{tmp_path}/state.bin (volatilestate)" in said
    assert (tmp_path / "state.bin").read_bytes() == before


def test_memory_with_a_volatile_state_only() -> None:
    blobs = {VOLATILE: b"of another"}
    vtpm, _ = make_vtpm_in_memory(VtpmConfig(tpm2=True), blobs)
    assert "no other TPM begins" in refusal(vtpm, vtpm.start)
    assert list(blobs) == [VOLATILE]


# -- the programs ---------------------------------------------------------------------------


@pytest.mark.parametrize("words", [(), ("--not-overwrite",), ("--reconfigure",)])
@pytest.mark.parametrize("what", ["backup", "written aside", "volatile state"])
def test_set_up_refuses_and_names_what_is_left(
    words: tuple[str, ...],
    what: str,
    workshop: Workshop,
    whole: dict[bool, Path],
) -> None:
    state = workshop.path / "state"
    path = leave(state, whole[True], LEFT[what], tpm2=True)
    before = contents(state)
    run = workshop.run(SETUP, "--tpm2", "--tpm-state", state, *words)
    assert run.returncode == 1
    assert str(path) in run.stderr
    assert "Traceback" not in run.stderr
    assert contents(state) == before


def test_overwriting_leaves_nothing_of_the_old_tpm(
    workshop: Workshop, whole: dict[bool, Path]
) -> None:
    """Its backup could become the TPM again."""
    state = workshop.path / "state"
    for pattern in LEFT.values():
        leave(state, whole[True], pattern, tpm2=True)
    run = workshop.run(SETUP, "--tpm2", "--tpm-state", state, "--overwrite")
    assert run.returncode == 0, run.stderr
    assert list(contents(state)) == ["tpm2-00.permall"]


@pytest.mark.parametrize("interface", ["socket", "chardev"])
def test_emulators_end_and_name_the_backup(
    interface: str, whole: dict[bool, Path], tmp_path: Path
) -> None:
    path = leave(tmp_path / "state", whole[True], LEFT["backup"], tpm2=True)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        run = subprocess.run(
            [
                *(sys.executable, "-c", CHARDEV, interface, "--tpm2", *s.RUNNING),
                *("--tpmstate", f"dir={path.parent}"),
                *(
                    ("--fd", str(theirs.fileno()))
                    if interface == "chardev"
                    else ("--server", f"type=tcp,fd={theirs.fileno()}")
                ),
            ],
            check=False,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            pass_fds=[theirs.fileno()],
            env=s.environment(),
        )
    assert run.returncode == 1
    assert str(path) in run.stderr
    assert "give the option 'backup'" in run.stderr
    assert list(contents(path.parent)) == [path.name]


def test_init_over_the_control_channel_fails_and_names_the_backup(
    whole: dict[bool, Path], tmp_path: Path
) -> None:
    path = leave(tmp_path / "state", whole[True], LEFT["backup"], tpm2=True)
    with s.Server(tmp_path / "server", state=path.parent) as server:
        assert server.init() == 0x101
        assert str(path) in server.log_text()
    assert list(contents(path.parent)) == [path.name]


# -- starting from the backup ---------------------------------------------------------------


def is_ours(vtpm: Vtpm) -> bool:
    """Whether it is the TPM in which the index was defined."""
    return tpm.code_of(vtpm.process(tpm.nv_write(INDEX, b"8 octets"))) == 0


def test_starts_from_the_backup_where_only_that_is_there(
    whole: dict[bool, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = leave(tmp_path / "state", whole[True], LEFT["backup"], tpm2=True)
    with running(path.parent, backup=True) as vtpm:
        assert is_ours(vtpm)
        assert (path.parent / "tpm2-00.permall").exists()
        said = f"permall is missing: the TPM starts from {path}"
        assert said in caplog.text
    with running(path.parent) as vtpm:
        assert is_ours(vtpm)


def test_tpm12_does_not_start_from_its_backup(whole: dict[bool, Path], tmp_path: Path) -> None:
    path = leave(tmp_path / "state", whole[False], LEFT["backup"], tpm2=False)
    vtpm, _ = vtpm_of(path.parent, tpm2=False, backup=True)
    assert str(path) in refusal(vtpm, vtpm.start)
    assert list(contents(path.parent)) == [path.name]


@pytest.mark.parametrize("backup", [True, False])
@pytest.mark.parametrize("damage", [b"", b"junk", bytes(2000)], ids=["empty", "junk", "zeros"])
def test_a_damaged_backup_alone_is_called_damaged(
    damage: bytes, backup: bool, whole: dict[bool, Path], tmp_path: Path
) -> None:
    path = leave(tmp_path / "state", whole[True], LEFT["backup"], tpm2=True)
    path.write_bytes(damage)
    vtpm, config = vtpm_of(path.parent, backup=backup)
    said = refusal(vtpm, lambda: power_on(vtpm, config))
    assert f"{path} of an earlier TPM is there" in said
    assert "the backup is damaged" in said
    assert "give the option" not in said
    assert path.read_bytes() == damage


def test_no_option_helps_a_tpm12(whole: dict[bool, Path], tmp_path: Path) -> None:
    path = leave(tmp_path / "state", whole[False], LEFT["backup"], tpm2=False)
    said = start(path.parent, whole[False], tpm2=False)
    assert "copy it there to start from it" in said
    assert "give the option" not in said


@pytest.mark.parametrize(
    "damage",
    [b"", b"junk", bytes(2000), lambda good: good[:-1], lambda good: good[:24] + bytes(800)],
    ids=["empty", "junk", "zeros", "cut", "cut as the C suite may"],
)
def test_starts_from_the_backup_where_the_state_is_damaged(
    damage: bytes | Callable[[bytes], bytes],
    whole: dict[bool, Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    backup = leave(tmp_path / "state", whole[True], LEFT["backup"], tpm2=True)
    permanent = backup.with_suffix("")
    broken = damage if isinstance(damage, bytes) else damage(backup.read_bytes())
    permanent.write_bytes(broken)
    with running(backup.parent, backup=True) as vtpm:
        # One write kept the refused file out of the backup's place only if it is damaged.
        assert is_ours(vtpm)
    assert "Attempting to start with backup state file." in caplog.text
    assert str(permanent) in caplog.text
    assert f"the state that was refused is now {backup}" in caplog.text
    assert not (backup.parent / "tpm2-00.permall.tmp").exists()


@pytest.mark.parametrize("backup_option", [True, False])
def test_both_damaged_stay_as_they_are(backup_option: bool, tmp_path: Path) -> None:
    state = tmp_path / "state"
    with running(state_made(state)):
        pass
    good = (state / "tpm2-00.permall").read_bytes()
    for name, place in (("tpm2-00.permall", 24), ("tpm2-00.permall.bak", 26)):
        broken = bytearray(good)
        broken[place] ^= 1
        (state / name).write_bytes(broken)
    before = contents(state)
    vtpm, _ = vtpm_of(state, backup=backup_option)
    said = refusal(vtpm, vtpm.start)
    assert f"{state}/tpm2-00.permall.bak" in said
    assert contents(state) == before


def state_made(path: Path) -> Path:
    path.mkdir()
    return path


def test_missing_key_does_not_exchange_state_and_backup(tmp_path: Path) -> None:
    """A backup from before the state was encrypted would be taken, and the state lost."""
    state = state_made(tmp_path / "state")
    from vtpm_cuse.config import KeySource

    (tmp_path / "key").write_text("00" * 16)
    with running(state):
        pass
    (state / "tpm2-00.permall").rename(state / "tpm2-00.permall.bak")
    (tmp_path / "encrypted").mkdir()
    keyed = vtpm_of(tmp_path / "encrypted")[1]._replace(key=KeySource(file=str(tmp_path / "key")))
    vtpm = make_vtpm(keyed)
    vtpm.start()
    vtpm.close()
    shutil.copy(tmp_path / "encrypted/tpm2-00.permall", state)
    before = contents(state)
    vtpm, _ = vtpm_of(state, backup=True)
    assert "is encrypted and needs --key" in refusal(vtpm, vtpm.start)
    assert contents(state) == before


# -- which state is at fault ----------------------------------------------------------------


@pytest.mark.parametrize("tpm2", [True, False], ids=["2.0", "1.2"])
def test_a_foreign_volatile_state_is_named_and_the_permanent_one_is_not(
    tpm2: bool, whole: dict[bool, Path], tmp_path: Path
) -> None:
    state = tmp_path / "state"
    shutil.copytree(whole[tpm2], state)
    volatile = state / file_name("{tpm}-00.volatilestate", tpm2=tpm2)
    good = volatile.read_bytes()
    broken = bytearray(good)
    broken[16:40] = bytes(24)
    volatile.write_bytes(broken)
    before = contents(state)
    vtpm, _ = vtpm_of(state, tpm2=tpm2)
    said = refusal(vtpm, vtpm.start)
    assert f"libtpms refuses {volatile}" in said
    assert "the permanent state is not at fault" in said
    assert "permall" not in said
    assert contents(state) == before


def test_no_advice_moves_a_state_that_libtpms_refuses(tmp_path: Path) -> None:
    """It may be whole, and of a newer libtpms."""
    state = state_made(tmp_path / "state")
    with running(state):
        pass
    path = state / "tpm2-00.permall"
    broken = bytearray(path.read_bytes())
    broken[22:24] = b"\xff\xff"  # the oldest version of the format that can read it
    path.write_bytes(broken)
    vtpm, _ = vtpm_of(state)
    said = refusal(vtpm, vtpm.start)
    assert f"libtpms refuses {path}" in said
    assert "newer" in said
    advice = said.partition("nothing was changed")[2]
    assert "copy that you kept" in advice
    assert "move" not in advice
