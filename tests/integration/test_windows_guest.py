"""A guest's Windows 11 goes on where it was, after its TPM was saved, moved to Debian's and back.

Its keys, sessions in the middle of their use, PCRs and counted guesses are all the TPM's.
"""

from __future__ import annotations

import contextlib
import shutil
from copy import deepcopy
from typing import TYPE_CHECKING, Final

import pytest

from tests.support import commands as tpm
from tests.support import sockets as s
from tests.support import windows as w
from tests.support.certificates import CERTS
from tests.support.tpm2_auth import HMAC_SESSION, Refused

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PEER: Final = ("/usr/bin/swtpm",)
NAMES: Final = {s.OURS: "ours", PEER: "peer"}
there_and_back = pytest.mark.parametrize(
    "programs",
    [(s.OURS, PEER, s.OURS), (PEER, s.OURS, PEER)],
    ids=lambda programs: "-".join(NAMES[program] for program in programs),
)
Program = tuple[str, ...]


class Place:
    """A program that serves the TPM, with the guest at it."""

    def __init__(self, server: s.Server) -> None:
        self.server, self.data, self.control = server, server.data(), server.control()

    def start(self, guest: w.Windows, startup: bytes = tpm.TPM2_STARTUP_CLEAR) -> None:
        """The guest's machine is switched on."""
        assert self.control.result(s.INIT, s.u32(0)) == 0
        assert tpm.code_of(self.data.command(startup)) == 0
        guest.stack.run = self.data.command

    def stop(self, shutdown: bytes = tpm.TPM2_SHUTDOWN_CLEAR) -> None:
        """And off, and the program ends."""
        assert tpm.code_of(self.data.command(shutdown)) == 0
        assert self.control.result(s.SHUTDOWN) == 0
        assert self.server.wait() == 0


@contextlib.contextmanager
def place(
    folder: Path, program: Program, state: Path | None = None, *words: str
) -> Iterator[Place]:
    with s.Server(folder, *words, program=program, state=state) as server:
        made = Place(server)
        with made.data, made.control:
            yield made


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, w.Windows]:
    """A TPM's state, and the installation whose first start has been."""
    folder = tmp_path_factory.mktemp("installed")
    guest = w.Windows(bytes)
    with place(folder, s.OURS) as here:
        here.start(guest)
        assert guest.active_banks()[w.SHA1]
        guest.manufacture((CERTS / "tpm2-ek-rsa2048.der").read_bytes())
        guest.switch_to_sha256()
        assert guest.active_banks()[w.SHA1], "until the next start"
        here.start(guest)
        guest.measure()
        guest.provision()
        aik = guest.load(guest.aik)
        guest.activate(aik)
        guest.flush(aik)
        guest.seal()
        here.stop()
    guest.stack.run = bytes  # of a machine that is off
    return folder / "state", guest


@pytest.fixture
def guest(installed: tuple[Path, w.Windows]) -> w.Windows:
    return deepcopy(installed[1])


@pytest.fixture
def state(installed: tuple[Path, w.Windows], tmp_path: Path) -> Path:
    return shutil.copytree(installed[0], tmp_path / "state")


def boot(guest: w.Windows) -> None:
    """To where the key is unsealed and the boot manager hands over."""
    assert [bank for bank, active in guest.active_banks().items() if active] == [w.SHA256]
    guest.measure()
    assert guest.unseal(guest.with_policy()) == guest.secret
    guest.count()


def refused_quote(guest: w.Windows, aik: int) -> int:
    """The code for a wrong password, which the TPM counts."""
    with pytest.raises(Refused) as caught:
        guest.quote(aik, b"wrong")
    return caught.value.code


@there_and_back
@pytest.mark.parametrize("way", ["migrated", "stored"])
def test_sessions_go_on_at_the_other(
    way: str, programs: tuple[Program, ...], state: Path, guest: w.Windows, tmp_path: Path
) -> None:
    """A policy session that is satisfied, one for HMACs, the AIK, and a guess that was counted."""
    with contextlib.ExitStack() as stack:
        here = stack.enter_context(place(tmp_path / "0", programs[0], state))
        here.start(guest)
        boot(guest)
        aik = guest.load(guest.aik)
        assert refused_quote(guest, aik) == w.AUTH_FAIL
        for number, program in enumerate(programs[1:], 1):
            policy, hmac = guest.with_policy(), guest.salted(HMAC_SESSION)
            before, quoted = guest.state(), guest.quote(aik)
            folder = tmp_path / str(number)
            move = migrate if way == "migrated" else take_over
            here = stack.enter_context(move(here, folder, program, state))
            guest.stack.run = here.data.command
            assert guest.state() == before
            assert guest.quote(aik) == quoted
            assert guest.unseal(policy) == guest.secret
            guest.seal(hmac)  # anew, by the key that the session has had since
            assert guest.unseal(guest.with_policy()) == guest.secret
            assert refused_quote(guest, aik) == w.AUTH_FAIL
        guest.cap()
        assert guest.refuses_the_key()
        guest.activate(aik)
        here.stop()


@contextlib.contextmanager
def migrate(here: Place, folder: Path, program: Program, _: Path) -> Iterator[Place]:
    """By the state's blobs, to a folder of its own."""
    blobs = {kind: here.control.get_blob(kind) for kind in (s.PERMANENT, s.VOLATILE)}
    with place(folder, program) as there:
        for kind, (result, flags, blob) in blobs.items():
            assert (result, flags) == (0, 0)
            assert there.control.set_blob(kind, blob) == 0
        assert there.control.result(s.INIT, s.u32(0)) == 0
        yield there


@contextlib.contextmanager
def take_over(here: Place, folder: Path, program: Program, state: Path) -> Iterator[Place]:
    """By the volatile state that the one stored, and the other finds."""
    assert here.control.result(s.STORE_VOLATILE) == 0
    here.server.process.kill()
    here.server.wait()
    with place(folder, program, state, *s.NOT_NEED_INIT) as there:
        yield there


@there_and_back
def test_hibernation_and_restarts(
    programs: tuple[Program, ...], state: Path, guest: w.Windows, tmp_path: Path
) -> None:
    """Windows sleeps at one and wakes at the other, with a context it has saved; then restarts."""
    with place(tmp_path / "0", programs[0], state) as here:
        here.start(guest)
        boot(guest)
        guest.cap()
        aik = guest.load(guest.aik)
        context = guest.saved(aik)
        guest.flush(aik)
        before = guest.state()
        here.stop(tpm.TPM2_SHUTDOWN_STATE)
    with place(tmp_path / "1", programs[1], state) as here:
        here.start(guest, tpm.TPM2_STARTUP_STATE)
        assert guest.state()["PCRs"] == before["PCRs"]
        assert guest.state()["keys"] == before["keys"]
        assert guest.refuses_the_key()
        assert guest.quote(guest.restored(context))
        here.stop()
    with place(tmp_path / "2", programs[2], state) as here:
        here.start(guest)
        boot(guest)
        here.stop()


@there_and_back
def test_a_lockout_is_one_everywhere(
    programs: tuple[Program, ...], state: Path, guest: w.Windows, tmp_path: Path
) -> None:
    """Until who owns the TPM says otherwise; what has no password is not concerned."""
    with place(tmp_path / "0", programs[0], state) as here:
        here.start(guest)
        guest.measure()
        guest.limit_guesses(2)
        aik = guest.load(guest.aik)
        assert [refused_quote(guest, aik) for _ in range(3)] == [
            w.AUTH_FAIL,
            w.AUTH_FAIL,
            w.LOCKED_OUT,
        ]
        here.stop()
    with place(tmp_path / "1", programs[1], state) as here:
        here.start(guest)
        boot(guest)
        aik = guest.load(guest.aik)
        with pytest.raises(Refused, match=f"{w.LOCKED_OUT:#x}"):
            guest.quote(aik)
        guest.reset_guesses()
        assert guest.quote(aik)
        here.stop()
    with place(tmp_path / "2", programs[2], state) as here:
        here.start(guest)
        assert guest.quote(guest.load(guest.aik))
        here.stop()
