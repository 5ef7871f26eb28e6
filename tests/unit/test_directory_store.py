"""The directory store: names, modes, lock, and what is never taken for "there is no state"."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.support.files import open_descriptors, tmpfs, umask
from tests.support.processes import in_child
from tests.support.waiting import wait_until
from vtpm_cuse.errors import StateDamaged, StateLocked, StateMissing, StorageError, UsageError
from vtpm_cuse.storage.directory import DirectoryStore
from vtpm_cuse.storage.stores import open_store
from vtpm_cuse.wire.blob import BLOB_SIZE_MAX, BlobFlag, with_header

NOBODY = 65534


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(str(tmp_path), tpm2=True)


def mode_of(path: Path) -> int:
    return path.stat().st_mode & 0o7777


# -- names and contents -------------------------------------------------------------------


@pytest.mark.parametrize(("tpm2", "prefix"), [(True, "tpm2-00"), (False, "tpm-00")])
def test_names_of_the_c_suite(tmp_path: Path, tpm2: bool, prefix: str) -> None:
    store = DirectoryStore(str(tmp_path), tpm2=tpm2)
    for name in ("permall", "volatilestate", "savestate"):
        store.store(name, name.encode())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        f"{prefix}.permall": b"permall",
        f"{prefix}.volatilestate": b"volatilestate",
        f"{prefix}.savestate": b"savestate",
    }


def test_round_trip_and_replacement(store: DirectoryStore, tmp_path: Path) -> None:
    for blob in (b"one", b"", b"x" * 200_000, b"two"):
        store.store("permall", blob)
        assert store.load("permall") == blob
        assert [path.name for path in tmp_path.iterdir()] == ["tpm2-00.permall"]


def test_open_store(tmp_path: Path) -> None:
    store = open_store(f"dir://{tmp_path}", tpm2=False, mode=0o600)
    store.store("permall", b"x")
    assert mode_of(tmp_path / "tpm-00.permall") == 0o600


@pytest.mark.parametrize("uri", ["", "dir", "dir:/x", "dir://", "ftp://x", "/x"])
def test_other_uris_are_refused(uri: str) -> None:
    with pytest.raises(UsageError):
        open_store(uri, tpm2=True)


def test_path_outlives_a_change_of_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "state").mkdir()
    monkeypatch.chdir(tmp_path)
    store = DirectoryStore("state", tpm2=True)
    monkeypatch.chdir("/")
    store.store("permall", b"x")
    assert (tmp_path / "state/tpm2-00.permall").read_bytes() == b"x"


def test_sizes(store: DirectoryStore) -> None:
    assert store.sizes() == {}
    for name, size in (("savestate", 1), ("permall", 2), ("volatilestate", 0)):
        store.store(name, bytes(size))
    assert list(store.sizes().items()) == [("permall", 2), ("volatilestate", 0), ("savestate", 1)]


def test_delete(store: DirectoryStore, tmp_path: Path) -> None:
    store.store("savestate", b"x")
    store.delete("savestate", must_exist=True)
    assert list(tmp_path.iterdir()) == []
    store.delete("savestate")
    with pytest.raises(StateMissing):
        store.delete("savestate", must_exist=True)


def test_close_gives_up_every_descriptor(tmp_path: Path) -> None:
    before = open_descriptors()
    store = DirectoryStore(str(tmp_path), tpm2=True)
    store.lock()
    store.store("permall", b"x")
    store.load("permall")
    store.sizes()
    assert open_descriptors() != before
    store.close()
    store.close()
    assert open_descriptors() <= before


def test_descriptors_are_not_inherited(store: DirectoryStore) -> None:
    before = open_descriptors()
    store.lock()
    store.store("permall", b"x")
    held = [int(entry.partition(":")[0]) for entry in open_descriptors() - before]
    assert held
    assert not any(os.get_inheritable(fd) for fd in held)
    store.close()


# -- modes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "wanted", "expected"),
    [
        (0o022, None, 0o640),
        (0o077, None, 0o600),
        (0o000, None, 0o640),
        (0o077, 0o660, 0o660),
        (0o000, 0o600, 0o600),
        (0o777, 0o444, 0o444),
    ],
)
def test_mode(tmp_path: Path, mask: int, wanted: int | None, expected: int) -> None:
    store = DirectoryStore(str(tmp_path), tpm2=True, mode=wanted)
    with umask(mask):
        store.store("permall", b"one")
        store.store("permall", b"two")
    assert mode_of(tmp_path / "tpm2-00.permall") == expected


def test_given_mode_is_set_on_load(tmp_path: Path) -> None:
    path = tmp_path / "tpm2-00.permall"
    path.write_bytes(b"x")
    path.chmod(0o644)
    DirectoryStore(str(tmp_path), tpm2=True).load("permall")
    assert mode_of(path) == 0o644
    DirectoryStore(str(tmp_path), tpm2=True, mode=0o600).load("permall")
    assert mode_of(path) == 0o600


def test_mode_of_the_lock_file(store: DirectoryStore, tmp_path: Path) -> None:
    with umask(0o022):
        store.lock()
    assert mode_of(tmp_path / ".lock") == 0o640
    store.close()
    assert (tmp_path / ".lock").exists()


# -- leftovers of a crash -----------------------------------------------------------------


def test_leftover_is_ignored_and_replaced(store: DirectoryStore, tmp_path: Path) -> None:
    leftover = tmp_path / "TMP2-00.permall"
    leftover.write_bytes(b"half")
    leftover.chmod(0o400)
    assert store.sizes() == {}
    with pytest.raises(StateMissing):
        store.load("permall")
    store.store("permall", b"whole")
    assert store.load("permall") == b"whole"
    assert not leftover.exists()
    assert mode_of(tmp_path / "tpm2-00.permall") == 0o640


def test_leftover_link_is_not_followed(store: DirectoryStore, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / "TMP2-00.permall").symlink_to(victim)
    store.store("permall", b"x")
    assert victim.read_bytes() == b"precious"
    assert not (tmp_path / "tpm2-00.permall").is_symlink()


def test_directory_in_the_way(store: DirectoryStore, tmp_path: Path) -> None:
    store.store("permall", b"old")
    (tmp_path / "TMP2-00.permall").mkdir()
    with pytest.raises(StorageError):
        store.store("permall", b"new")
    assert store.load("permall") == b"old"


# -- what is damage, and not absence ------------------------------------------------------


def refusal(store: DirectoryStore) -> StorageError:
    with pytest.raises(StorageError) as caught:
        store.load("permall")
    assert not isinstance(caught.value, StateMissing), caught.value
    return caught.value


def test_directory_instead_of_a_file(store: DirectoryStore, tmp_path: Path) -> None:
    (tmp_path / "tpm2-00.permall").mkdir()
    assert isinstance(refusal(store), StateDamaged)
    with pytest.raises(StorageError):
        store.sizes()
    with pytest.raises(StorageError):
        store.store("permall", b"x")
    with pytest.raises(StorageError):
        store.delete("permall")
    assert not (tmp_path / "TMP2-00.permall").exists()


def test_fifo_instead_of_a_file_does_not_hang(store: DirectoryStore, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "tpm2-00.permall")
    assert isinstance(refusal(store), StateDamaged)


@pytest.mark.parametrize("target", ["elsewhere", "nowhere"])
def test_symbolic_link_is_refused(store: DirectoryStore, tmp_path: Path, target: str) -> None:
    (tmp_path / "elsewhere").write_bytes(b"x")
    (tmp_path / "tpm2-00.permall").symlink_to(target)
    refusal(store)
    with pytest.raises(StorageError):
        store.sizes()


def test_linked_lock_is_refused(store: DirectoryStore, tmp_path: Path) -> None:
    (tmp_path / ".lock").symlink_to("elsewhere")
    with pytest.raises(StorageError):
        store.lock()
    assert not (tmp_path / "elsewhere").exists()


def test_absurd_size(store: DirectoryStore, tmp_path: Path) -> None:
    path = tmp_path / "tpm2-00.permall"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    assert isinstance(refusal(store), StateDamaged)
    with path.open("r+b") as file:
        file.truncate(BLOB_SIZE_MAX)
    assert len(store.load("permall")) == BLOB_SIZE_MAX


def test_file_in_place_of_the_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    store = DirectoryStore(str(tmp_path / "file"), tpm2=True)
    refusal(store)
    for call in (store.lock, store.sizes, lambda: store.store("permall", b"x")):
        with pytest.raises(StorageError):
            call()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
@pytest.mark.parametrize("locked_away", ["file", "directory"])
@in_child
def test_unreadable_is_not_absent(locked_away: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "tpm2-00.permall").write_bytes(b"x")
        directory.chmod(0o755 if locked_away == "file" else 0o700)
        (directory / "tpm2-00.permall").chmod(0o600)
        os.seteuid(NOBODY)
        try:
            store = DirectoryStore(name, tpm2=True)
            refusal(store)
            for call in (store.lock, lambda: store.store("permall", b"new")):
                with pytest.raises(StorageError) as caught:
                    call()
                assert not isinstance(caught.value, (StateMissing, StateLocked))
        finally:
            os.seteuid(0)
        assert (directory / "tpm2-00.permall").read_bytes() == b"x"


def test_missing_directory(tmp_path: Path) -> None:
    store = DirectoryStore(str(tmp_path / "none"), tpm2=True)
    assert store.sizes() == {}
    with pytest.raises(StateMissing):
        store.load("permall")
    store.delete("permall")
    for call in (store.lock, lambda: store.store("permall", b"x")):
        with pytest.raises(StorageError) as caught:
            call()
        assert not isinstance(caught.value, (StateMissing, StateLocked))
    assert not (tmp_path / "none").exists()
    (tmp_path / "none").mkdir()
    store.store("permall", b"x")  # it may come later
    store.close()


# -- full and read-only -------------------------------------------------------------------


def test_full_disk(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "small", "size=16k") as directory:
        store = DirectoryStore(str(directory), tpm2=True)
        store.store("permall", b"old")
        for _ in range(3):
            with pytest.raises(StorageError) as caught:
                store.store("permall", bytes(100_000))
            assert "No space" in str(caught.value)
            assert str(directory / "tpm2-00.permall") in str(caught.value)
        assert store.load("permall") == b"old"
        assert [path.name for path in directory.iterdir()] == ["tpm2-00.permall"]
        store.store("permall", b"new")
        assert store.load("permall") == b"new"
        store.close()


@in_child
def test_file_size_limit(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The interpreter ignores SIGXFSZ: the write fails instead."""
    store = DirectoryStore(str(tmp_path_factory.mktemp("state")), tpm2=True)
    store.store("permall", b"old")
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    with pytest.raises(StorageError):
        store.store("permall", bytes(100_000))
    assert store.load("permall") == b"old"
    assert store.sizes() == {"permall": 3}


def test_read_only_file_system(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "state", "size=64k") as directory:
        DirectoryStore(str(directory), tpm2=True).store("permall", b"old")
        subprocess.run(["mount", "-o", "remount,ro", directory], check=True)
        store = DirectoryStore(str(directory), tpm2=True)
        assert store.load("permall") == b"old"
        for call in (
            store.lock,
            lambda: store.store("permall", b"new"),
            lambda: store.delete("permall"),
        ):
            with pytest.raises(StorageError) as caught:
                call()
            assert "Read-only" in str(caught.value)
            assert not isinstance(caught.value, (StateMissing, StateLocked))
        assert store.load("permall") == b"old"
        store.close()


# -- the lock -----------------------------------------------------------------------------

_HOLDER = """
import sys
from vtpm_cuse.storage.directory import DirectoryStore
store = DirectoryStore(sys.argv[1], tpm2=True)
store.lock()
print("locked", flush=True)
for line in sys.stdin:
    {"unlock": store.unlock, "lock": store.lock, "close": store.close}[line.strip()]()
    print("done", flush=True)
"""


class Holder:
    """Another process that holds the lock."""

    def __init__(self, directory: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _HOLDER, directory],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._expect("locked")

    def _expect(self, word: str) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline().strip() == word

    def do(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()
        self._expect("done")

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


def test_lock_between_processes(store: DirectoryStore, tmp_path: Path) -> None:
    holder = Holder(tmp_path)
    try:
        with pytest.raises(StateLocked) as caught:
            store.lock()
        assert ".lock" in str(caught.value)
        holder.do("unlock")
        store.lock()
        store.lock()  # again is harmless
        store.unlock()
        holder.do("lock")
        with pytest.raises(StateLocked):
            store.lock()
    finally:
        holder.kill()
    store.lock()  # the dead hold nothing
    store.close()


def test_lock_outlives_all_other_calls(store: DirectoryStore, tmp_path: Path) -> None:
    """Closing any descriptor of .lock would lose it."""
    store.lock()
    store.store("permall", b"x")
    store.load("permall")
    store.sizes()
    store.delete("permall")
    code = (
        "import fcntl, sys\n"
        "with open(sys.argv[1], 'r+') as file:\n"
        "    try: fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
        "    except OSError: sys.exit(7)\n"
    )
    attempt = [sys.executable, "-c", code, str(tmp_path / ".lock")]
    assert subprocess.run(attempt, check=False).returncode == 7
    store.unlock()
    assert subprocess.run(attempt, check=False).returncode == 0
    store.close()


def test_lock_can_be_turned_off(tmp_path: Path) -> None:
    store = DirectoryStore(str(tmp_path), tpm2=True, lock=False)
    holder = Holder(tmp_path)
    try:
        store.lock()
    finally:
        holder.kill()


def test_lock_is_the_c_suites(store: DirectoryStore, tmp_path: Path) -> None:
    """What conflicts with a POSIX record lock on the whole file; no process alone has it."""
    store.lock()
    code = (
        "import fcntl, struct, sys\n"
        "asked = struct.pack('hhqqi4x', fcntl.F_WRLCK, 0, 0, 0, 0)\n"
        "with open(sys.argv[1], 'r+b') as file:\n"
        "    print(*struct.unpack('hhqqi4x', fcntl.fcntl(file, fcntl.F_GETLK, asked)))\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, tmp_path / ".lock"], check=True, capture_output=True, text=True
    )
    assert found.stdout.split() == [str(fcntl.F_WRLCK), "0", "0", "0", "-1"]
    store.close()


HANDED_ON = """
import os, sys
from vtpm_cuse.storage.stores import open_store
store = open_store(sys.argv[1], tpm2=True)
store.lock()
if sys.argv[2] == "fork":
    keeps = os.fork() == 0
else:  # to another program, as a descriptor
    for fd in map(int, os.listdir("/proc/self/fd")):
        try:
            link = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            continue
        if link.endswith((".lock", "state.bin")):
            os.set_inheritable(fd, True)
    keeps = os.fork() == 0
    if keeps:
        os.execvp("sh", ["sh", "-c", "echo kept; read line"])
if keeps:
    print("kept", flush=True)
    sys.stdin.readline()
os._exit(0)
"""


def posix_lock_fails(path: Path) -> bool:
    """Whether a program that takes POSIX locks, as the C suite, is kept off."""
    code = (
        "import fcntl, sys\n"
        "with open(sys.argv[1], 'r+') as file:\n"
        "    try: fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
        "    except OSError: sys.exit(7)\n"
    )
    run = subprocess.run([sys.executable, "-c", code, path], check=False)
    assert run.returncode in {0, 7}
    return run.returncode == 7


@pytest.mark.parametrize("how", ["fork", "descriptor"])
@pytest.mark.parametrize("uri", ["dir://{}", "file://{}/state.bin"])
def test_lock_goes_with_a_fork_and_with_a_descriptor(tmp_path: Path, uri: str, how: str) -> None:
    """Whoever took it is gone; a POSIX lock would be, too."""
    place = uri.format(tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-c", HANDED_ON, place, how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "kept\n"
    assert process.wait() == 0
    lock_file = tmp_path / (".lock" if uri.startswith("dir") else "state.bin")
    assert posix_lock_fails(lock_file)
    store = open_store(place, tpm2=True)
    with pytest.raises(StateLocked):
        store.lock()
    assert process.stdin is not None
    process.stdin.close()
    assert process.stdout.read() == ""  # the last who had it has ended
    process.stdout.close()
    wait_until(lambda: not posix_lock_fails(lock_file), "a free lock")
    store.lock()
    assert posix_lock_fails(lock_file)
    store.close()
    assert not posix_lock_fails(lock_file)


@pytest.mark.parametrize("uri", ["dir://{}", "file://{}/state.bin"])
def test_lock_stays_when_another_descriptor_closes(tmp_path: Path, uri: str) -> None:
    store = open_store(uri.format(tmp_path), tpm2=True)
    store.lock()
    lock_file = tmp_path / (".lock" if uri.startswith("dir") else "state.bin")
    lock_file.open("rb").close()
    assert posix_lock_fails(lock_file)
    store.close()


@pytest.mark.parametrize("uri", ["dir://{}", "file://{}/state.bin"])
def test_lock_given_up_is_free_though_a_child_has_the_descriptor(tmp_path: Path, uri: str) -> None:
    """The destination of a migration can take it."""
    store = open_store(uri.format(tmp_path), tpm2=True)
    store.lock()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writing)
        os.read(reading, 1)
        os._exit(0)
    os.close(reading)
    store.unlock()
    lock_file = tmp_path / (".lock" if uri.startswith("dir") else "state.bin")
    assert not posix_lock_fails(lock_file)
    os.close(writing)
    os.waitpid(child, 0)
    store.close()


# -- the last good generation -------------------------------------------------------------


def generation(number: int) -> bytes:
    return with_header(BlobFlag(0), bytes([number]) * 100)


def test_backup_is_the_generation_before(tmp_path: Path) -> None:
    store = DirectoryStore(str(tmp_path), tpm2=True, backup=True)
    backup = tmp_path / "tpm2-00.permall.bak"
    store.store("permall", generation(1))
    assert not backup.exists()
    for number in range(2, 6):
        store.store("permall", generation(number))
        assert store.load("permall") == generation(number)
        assert backup.read_bytes() == generation(number - 1)
    assert list(store.sizes()) == ["permall"]
    assert {path.name for path in tmp_path.iterdir()} == {backup.name, "tpm2-00.permall"}
    store.close()


@pytest.mark.parametrize("junk", [b"", b"junk", generation(3)[:-1]])
def test_damage_never_becomes_the_backup(tmp_path: Path, junk: bytes) -> None:
    store = DirectoryStore(str(tmp_path), tpm2=True, backup=True)
    for number in (1, 2):
        store.store("permall", generation(number))
    (tmp_path / "tpm2-00.permall").write_bytes(junk)
    store.store("permall", generation(4))
    assert (tmp_path / "tpm2-00.permall.bak").read_bytes() == generation(1)
    store.close()


def test_only_the_permanent_state_has_a_backup(tmp_path: Path) -> None:
    store = DirectoryStore(str(tmp_path), tpm2=False, backup=True)
    for name in ("volatilestate", "savestate") * 2:
        store.store(name, generation(1))
    assert not list(tmp_path.glob("*.bak"))
    store.close()


def test_leftover_and_link_in_place_of_a_backup(tmp_path: Path) -> None:
    """A crash leaves both names on one file; a link is replaced and what it leads to is kept."""
    store = DirectoryStore(str(tmp_path), tpm2=True, backup=True)
    store.store("permall", generation(1))
    os.link(tmp_path / "tpm2-00.permall", tmp_path / "tpm2-00.permall.bak")
    (tmp_path / "victim").write_bytes(b"precious")
    (tmp_path / "TMP2-00.permall.bak").symlink_to(tmp_path / "victim")
    store.store("permall", generation(2))
    assert (tmp_path / "tpm2-00.permall.bak").read_bytes() == generation(1)
    assert not (tmp_path / "TMP2-00.permall.bak").exists()
    (tmp_path / "tpm2-00.permall.bak").unlink()
    (tmp_path / "tpm2-00.permall.bak").symlink_to(tmp_path / "victim")
    store.store("permall", generation(3))
    assert (tmp_path / "tpm2-00.permall.bak").read_bytes() == generation(2)
    assert (tmp_path / "victim").read_bytes() == b"precious"
    store.close()


@pytest.mark.parametrize(
    "number", [errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS], ids=errno.errorcode.get
)
def test_backup_where_a_file_has_one_name_only(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FAT, CIFS, shared folders of virtual machines."""

    def link(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", link)
    store = DirectoryStore(str(tmp_path), tpm2=True, backup=True)
    for value in range(1, 4):
        store.store("permall", generation(value))
    permanent, backup = tmp_path / "tpm2-00.permall", tmp_path / "tpm2-00.permall.bak"
    assert (permanent.read_bytes(), backup.read_bytes()) == (generation(3), generation(2))
    assert store.try_backup()
    assert (permanent.read_bytes(), backup.read_bytes()) == (generation(2), generation(2))
    store.end_try(accepted=False)
    assert (permanent.read_bytes(), backup.read_bytes()) == (generation(3), generation(2))
    assert store.try_backup()
    store.end_try(accepted=True)
    assert (permanent.read_bytes(), backup.read_bytes()) == (generation(2), generation(3))
    permanent.unlink()
    assert store.restore_backup()
    assert permanent.read_bytes() == generation(3)
    assert {path.name for path in tmp_path.iterdir()} == {permanent.name, backup.name}
    store.close()


def test_backup_that_cannot_be_kept_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    store = DirectoryStore(str(tmp_path), tpm2=True, backup=True)
    store.store("permall", generation(1))
    monkeypatch.setattr(os, "link", link)
    with pytest.raises(StorageError, match="Input/output error"):
        store.store("permall", generation(2))
    assert store.load("permall") == generation(1)
    assert [path.name for path in tmp_path.iterdir()] == ["tpm2-00.permall"]
    store.close()


# -- a umask that takes everything ----------------------------------------------------------


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody without capabilities")
@pytest.mark.parametrize("uri", ["dir://{}", "file://{}/state.bin"])
@in_child
def test_umask_that_takes_the_rights_of_the_owner(uri: str) -> None:
    """Whoever has no capabilities, or gave them up, must be able to open his own files again."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        os.seteuid(NOBODY)
        try:
            with umask(0o777):
                for value in range(1, 4):
                    store = open_store(uri.format(name), tpm2=True, backup=uri.startswith("dir"))
                    store.lock()
                    assert value == 1 or store.load("permall") == generation(value - 1)
                    store.store("permall", generation(value))
                    store.unlock()
                    store.lock()
                    assert store.load("permall") == generation(value)
                    store.close()
            for path in Path(name).iterdir():
                assert mode_of(path) == 0o600
        finally:
            os.seteuid(0)


@pytest.mark.parametrize("mode", [0, 0o200, 0o400, 0o077])
@pytest.mark.parametrize("uri", ["dir://{}", "file://{}/state.bin"])
def test_mode_that_keeps_the_owner_out_is_refused(tmp_path: Path, uri: str, mode: int) -> None:
    with pytest.raises(UsageError, match=f"mode {mode:04o} would keep the TPM from its own state"):
        open_store(uri.format(tmp_path), tpm2=True, mode=mode)
    assert not list(tmp_path.iterdir())


def test_replace_all(tmp_path: Path) -> None:
    store = DirectoryStore(str(tmp_path), tpm2=True)
    for name in ("permall", "volatilestate", "savestate"):
        store.store(name, b"old")
    store.replace_all({"permall": b"new one", "savestate": b"new"})
    assert store.sizes() == {"permall": 7, "savestate": 3}
    store.replace_all({})
    assert store.sizes() == {}
    store.close()
