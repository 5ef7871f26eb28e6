"""One TPM served by us and by Debian's swtpm in turns: each takes up all that the other wrote.

Both stores, both TPM versions, plain and encrypted in every way; the state grows on its way, so
that each side has to move the other's sections of a linear file. Migration blobs likewise.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from typing import TYPE_CHECKING, Final

import pytest

from tests.integration.crash_child import INDEX_12
from tests.support import commands as tpm
from tests.support import sockets as s
from tests.support import unstable
from tests.support.vectors import STATE
from vtpm_cuse.storage.stores import open_store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("warm")

PEER: Final = ("/usr/bin/swtpm",)
TURNS: Final = (s.OURS, PEER, s.OURS, PEER, PEER, s.OURS)
PCR: Final = 10
DIGEST: Final = bytes(range(32))

KEYS: Final = {
    "plain": (),
    "hex128": ("file={folder}/hex", "mode=aes-cbc"),
    "hex256": ("file={folder}/hex256", "mode=aes-256-cbc"),
    "binary128": ("file={folder}/binary", "format=binary"),
    "binary256": ("file={folder}/binary256", "mode=aes-256-cbc,format=binary"),
    "pbkdf2-128": ("pwdfile={folder}/passphrase",),
    "pbkdf2-256": ("pwdfile={folder}/passphrase", "mode=aes-256-cbc"),
    "sha512-128": ("pwdfile={folder}/passphrase", "kdf=sha512"),
    "sha512-256": ("pwdfile={folder}/passphrase", "kdf=sha512,mode=aes-256-cbc"),
}
versions = pytest.mark.parametrize("tpm2", [True, False], ids=["tpm2", "tpm12"])
backends = pytest.mark.parametrize("backend", ["dir", "file"])


@pytest.fixture
def keys(tmp_path: Path) -> Callable[[str, str], tuple[str, ...]]:
    """Makes the words of an option from a name in `KEYS`."""
    (tmp_path / "hex").write_text(bytes(range(16)).hex())
    (tmp_path / "hex256").write_text(bytes(range(32)).hex())
    (tmp_path / "binary").write_bytes(bytes(range(100, 116)))
    (tmp_path / "binary256").write_bytes(bytes(range(100, 132)))
    (tmp_path / "passphrase").write_text("correct horse battery staple\n")

    def words(name: str, option: str = "--key") -> tuple[str, ...]:
        parts = KEYS[name]
        return (option, ",".join(parts).format(folder=tmp_path)) if parts else ()

    return words


class Life:
    """One time that a TPM is on, and what a guest does to it."""

    def __init__(self, server: s.Server, *, tpm2: bool) -> None:
        self.server, self.tpm2 = server, tpm2
        self.data = server.data()
        self.control = server.control()

    def run(self, command: bytes) -> bytes:
        response = self.data.command(command)
        assert tpm.code_of(response) == 0, (response.hex(), self.server.log_text())
        return response

    def prepare(self) -> None:
        """A TPM 1.2 lets nobody write before."""
        if not self.tpm2:
            self.run(tpm.TPM12_CONTINUE_SELF_TEST)
            self.run(tpm.TPM12_PHYSICAL_PRESENCE_CMD_ENABLE)
            self.run(tpm.TPM12_PHYSICAL_PRESENCE_PRESENT)

    def write(self, turn: int) -> None:
        """A new index, larger than those before, in a state that so grows."""
        data = self.contents(turn)
        if self.tpm2:
            self.run(tpm.nv_define(tpm.NV_INDEX + turn, len(data)))
            self.run(tpm.nv_write(tpm.NV_INDEX + turn, data))
        else:
            self.run(tpm.tpm12_nv_define(INDEX_12 + turn, len(data)))
            self.run(tpm.tpm12_nv_write(INDEX_12 + turn, data))

    def check(self, turn: int) -> None:
        size = len(self.contents(turn))
        if self.tpm2:
            found = tpm.nv_data(self.run(tpm.nv_read(tpm.NV_INDEX + turn, size)))
        else:
            found = tpm.tpm12_nv_data(self.run(tpm.tpm12_nv_read(INDEX_12 + turn, size)))
        assert found == self.contents(turn)

    @staticmethod
    def contents(turn: int) -> bytes:
        return bytes([turn + 1]) * (100 + 90 * turn)

    def extend(self) -> None:
        if self.tpm2:
            self.run(tpm.pcr_extend(PCR, DIGEST))
        else:
            self.run(tpm.tpm12_pcr_extend(PCR, DIGEST[:20]))

    def pcr(self) -> bytes:
        if self.tpm2:
            return tpm.pcr_value(self.run(tpm.pcr_read(PCR)))
        return self.run(tpm.tpm12_pcr_read(PCR))[-20:]

    def go_on(self, turn: int) -> None:
        """All that was written in the turns before is there; one thing more is written."""
        if turn == 0:
            self.prepare()
        for before in range(turn):
            self.check(before)
        self.write(turn)

    def end(self) -> None:
        assert self.control.result(s.SHUTDOWN) == 0
        assert self.server.wait() == 0


@contextlib.contextmanager
def life(
    folder: Path, number: int, program: tuple[str, ...], *words: str, tpm2: bool, start: bool = True
) -> Iterator[Life]:
    flags = s.RUNNING if start else s.NOT_NEED_INIT
    with (
        s.Server(folder / f"life{number}", *flags, *words, program=program, tpm2=tpm2) as server,
        powered(server, tpm2=tpm2) as one,
    ):
        yield one


@contextlib.contextmanager
def powered(server: s.Server, *, tpm2: bool) -> Iterator[Life]:
    one = Life(server, tpm2=tpm2)
    with one.data, one.control:
        yield one


def uri(backend: str, folder: Path) -> str:
    if backend == "dir":
        (folder / "state").mkdir(exist_ok=True)
        return f"dir://{folder}/state"
    return f"file://{folder}/state.bin"


def in_turns(
    folder: Path, programs: Sequence[tuple[str, ...]], words: tuple[str, ...], *, tpm2: bool
) -> None:
    """One TPM, served by one program after the other."""
    for turn, program in enumerate(programs):
        with life(folder, turn, program, *words, tpm2=tpm2) as one:
            one.go_on(turn)
            one.end()


@versions
@backends
@pytest.mark.parametrize("key", KEYS)
def test_one_tpm_in_turns(
    tpm2: bool,
    backend: str,
    key: str,
    keys: Callable[..., tuple[str, ...]],
    tmp_path: Path,
) -> None:
    place = uri(backend, tmp_path)
    words = ("--tpmstate", f"backend-uri={place}", *keys(key))
    in_turns(tmp_path, TURNS if key == "plain" else TURNS[:4], words, tpm2=tpm2)
    sizes = {program: states(program, place, tpm2=tpm2) for program in (s.OURS, PEER)}
    assert sizes[s.OURS] == sizes[PEER]
    assert [state["name"] for state in json.loads(sizes[PEER])["states"]] == ["permall"]
    store = open_store(place, tpm2=tpm2, lock=False)
    assert bool(store.load("permall")[5] & 1) is (key != "plain")
    store.close()


def states(program: tuple[str, ...], place: str, *, tpm2: bool) -> str:
    words = ["--print-states", "--tpmstate", f"backend-uri={place}", *["--tpm2"] * tpm2]
    run = s.run_swtpm(*words, program=program)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.skipif(not unstable.is_ready(), reason=unstable.REASON)
@pytest.mark.parametrize(
    ("tpm2", "backend", "key"),
    [(True, "file", "plain"), (True, "dir", "pbkdf2-256"), (False, "file", "hex128")],
)
def test_one_tpm_in_turns_with_debian_unstable(
    tpm2: bool,
    backend: str,
    key: str,
    keys: Callable[..., tuple[str, ...]],
    tmp_path: Path,
) -> None:
    """Its newer swtpm and libtpms; sections are moved by other code."""
    newer = (str(unstable.UNSTABLE), "--share", str(tmp_path), "--", "/usr/bin/swtpm")
    words = ("--tpmstate", f"backend-uri={uri(backend, tmp_path)}", *keys(key))
    in_turns(tmp_path, (s.OURS, newer, s.OURS, newer, s.OURS), words, tpm2=tpm2)


@versions
@backends
@pytest.mark.parametrize("key", ["plain", "hex256"])
@pytest.mark.parametrize("writer", [s.OURS, PEER], ids=["ours", "peer"])
def test_volatile_state_is_resumed_by_the_other(
    tpm2: bool,
    backend: str,
    key: str,
    writer: tuple[str, ...],
    keys: Callable[..., tuple[str, ...]],
    tmp_path: Path,
) -> None:
    words = ("--tpmstate", f"backend-uri={uri(backend, tmp_path)}", *keys(key))
    reader = PEER if writer == s.OURS else s.OURS
    with life(tmp_path, 0, writer, *words, tpm2=tpm2) as one:
        one.extend()
        expected = one.pcr()
        assert one.control.result(s.STORE_VOLATILE) == 0
        one.server.process.kill()
    with life(tmp_path, 1, reader, *words, tpm2=tpm2, start=False) as one:
        assert one.pcr() == expected, "without a Startup: it goes on where it was"
        one.end()


@versions
@pytest.mark.parametrize("sender", [s.OURS, PEER], ids=["ours", "peer"])
@pytest.mark.parametrize(
    ("key", "migration_key"),
    [
        ("plain", "plain"),
        ("hex128", "plain"),
        ("plain", "binary128"),
        ("hex128", "binary128"),
        ("hex256", "binary256"),
        ("pbkdf2-128", "sha512-128"),
    ],
)
@pytest.mark.parametrize("decrypted", [0, 1], ids=["as it is", "decrypted"])
def test_migration(
    tpm2: bool,
    sender: tuple[str, ...],
    key: str,
    migration_key: str,
    decrypted: int,
    keys: Callable[..., tuple[str, ...]],
    tmp_path: Path,
) -> None:
    words = (*keys(key), *keys(migration_key, "--migration-key"))
    receiver = PEER if sender == s.OURS else s.OURS
    with life(tmp_path, 0, sender, *words, tpm2=tpm2) as source:
        source.prepare()
        source.write(0)
        source.extend()
        expected = source.pcr()
        blobs = {kind: source.control.get_blob(kind, decrypted) for kind in (1, 2)}
    folder = tmp_path / "target"
    with s.Server(folder, *words, program=receiver, tpm2=tpm2) as server:
        with server.control() as control:
            for kind, (result, flags, blob) in blobs.items():
                assert result == 0
                assert bool(flags) is (key != "plain" and not decrypted)
                assert control.set_blob(kind, blob, flags) == 0, server.log_text()
            assert control.result(s.INIT, s.u32(0)) == 0
        with powered(server, tpm2=tpm2) as target:
            assert target.pcr() == expected
            target.check(0)
            target.end()


@pytest.mark.parametrize("file_bits", ["hex128", "hex256"])
@pytest.mark.parametrize("migration_bits", ["binary128", "binary256"])
@versions
def test_keys_of_mixed_length(
    tpm2: bool,
    file_bits: str,
    migration_bits: str,
    keys: Callable[..., tuple[str, ...]],
    tmp_path: Path,
) -> None:
    """The C suite's TPM fails for good after this; ours has all the four combinations."""
    words = (*keys(file_bits), *keys(migration_bits, "--migration-key"))
    with life(tmp_path, 0, s.OURS, *words, tpm2=tpm2) as source:
        source.prepare()
        source.write(0)
        blobs = {kind: source.control.get_blob(kind, 0) for kind in (1, 2)}
        source.write(1)
    with s.Server(tmp_path / "target", *words, tpm2=tpm2) as server:
        with server.control() as control:
            for kind, (_, flags, blob) in blobs.items():
                assert control.set_blob(kind, blob, flags) == 0
            assert control.result(s.INIT, s.u32(0)) == 0
        with powered(server, tpm2=tpm2) as target:
            target.check(0)
            target.write(1)
            target.end()


@pytest.mark.parametrize("program", [s.OURS, PEER], ids=["ours", "peer"])
@pytest.mark.parametrize(
    ("vector", "key"),
    [
        ("v1-plain-tpm2-00.permall", "plain"),
        ("v1-enc128-tpm2-00.permall", "hex128"),
        ("v2-enc128-noiv-tpm2-00.permall", "hex128"),
    ],
)
def test_old_formats_are_taken_up_and_renewed(
    program: tuple[str, ...],
    vector: str,
    key: str,
    keys: Callable[..., tuple[str, ...]],
    tmp_path: Path,
) -> None:
    """Both read them alike; after a write by one the other reads what it made of it."""
    place = uri("dir", tmp_path)
    shutil.copy(STATE / "synthetic-old-formats" / vector, tmp_path / "state/tpm2-00.permall")
    words = ("--tpmstate", f"backend-uri={place}", *keys(key))
    with life(tmp_path, 0, program, *words, tpm2=True) as one:
        one.write(0)
        one.end()
    assert (tmp_path / "state/tpm2-00.permall").read_bytes()[0] == 2, "the version"
    other = PEER if program == s.OURS else s.OURS
    with life(tmp_path, 1, other, *words, tpm2=True) as one:
        one.check(0)
        one.end()


@pytest.mark.parametrize("holder", [s.OURS, PEER], ids=["ours holds", "peer holds"])
@pytest.mark.parametrize("rival", [s.OURS, PEER], ids=["ours comes", "peer comes"])
def test_each_keeps_the_other_off_a_state(
    holder: tuple[str, ...], rival: tuple[str, ...], tmp_path: Path
) -> None:
    words = ("--tpmstate", f"backend-uri={uri('dir', tmp_path)}")
    state = tmp_path / "state"
    with life(tmp_path, 0, holder, *words, tpm2=True) as one:
        one.prepare()
        one.write(0)
        before = (state / "tpm2-00.permall").read_bytes()
        run = s.run_swtpm(
            *("--tpm2", *s.RUNNING, *words),
            *("--server", f"type=unixio,path={tmp_path}/rival"),
            program=rival,
        )
        assert run.returncode == 1
        assert "lock" in run.stderr
        assert (state / "tpm2-00.permall").read_bytes() == before
        one.end()
    with life(tmp_path, 1, rival, *words, tpm2=True) as one:
        one.end()
