"""A real TPM under any order of requests, commands and deaths, beside a model of what it owes.

It owes little, but always: the same seeds, until somebody clears or changes them; each NV write
that was acknowledged; the lock on its state. The orders are drawn by seeds.
"""

from __future__ import annotations

import os
import random
import shutil
import struct
from typing import TYPE_CHECKING, Final

import pytest

from tests.fuzz.harness import SEED, mutated
from tests.support import commands as tpm
from vtpm_cuse.engine.libtpms import LibtpmsEngine
from vtpm_cuse.errors import StateLocked, TpmUnavailable
from vtpm_cuse.manufacture.plan import KeyAlgorithm
from vtpm_cuse.manufacture.templates import spk_template
from vtpm_cuse.proto.control import ControlRequest
from vtpm_cuse.storage.directory import DirectoryStore
from vtpm_cuse.storage.sealed import SealedStore
from vtpm_cuse.vtpm import control
from vtpm_cuse.vtpm.ptm import PtmService
from vtpm_cuse.vtpm.vtpm import Vtpm
from vtpm_cuse.wire import tpm2
from vtpm_cuse.wire.ptm import PtmCommand
from vtpm_cuse.wire.tpm import TpmCc

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

STEPS: Final = 60
SIZE: Final = 8
INDEXES: Final = (tpm.NV_INDEX, tpm.NV_INDEX + 1)
HARMLESS: Final = (tpm.get_random(16), tpm.pcr_read(3), tpm.pcr_extend(3, bytes(32)))
_PASSWORD: Final = bytes.fromhex("00000009400000090000000000")
_CLEAR, _CHANGE_EPS = 0x126, 0x124
_VOLATILE: Final = 2
_HIERARCHIES: Final = {"owner": tpm2.TPM_RH_OWNER, "endorsement": tpm2.TPM_RH_ENDORSEMENT}


def u32(*values: int) -> bytes:
    return struct.pack(f">{len(values)}I", *values)


class Story:
    """One TPM on one state, through all of its processes."""

    def __init__(self, folder: Path, chance: random.Random) -> None:
        self._folder, self._chance = folder, chance
        self.written: dict[int, bytes] = {}
        self.told: list[str] = []
        self._begin()
        self.check()  # makes the TPM
        self.names = {which: self._name_of(handle) for which, handle in _HIERARCHIES.items()}

    def _begin(self) -> None:
        store = DirectoryStore(str(self._folder), tpm2=True, fsync=False)
        sealed = SealedStore(store)
        self.vtpm = Vtpm(LibtpmsEngine(tpm2=True, nvram=sealed), sealed)
        self.ptm = PtmService(self.vtpm)

    def _ask(self, command: PtmCommand, body: bytes = b"") -> int:
        """A control request; the result."""
        request = ControlRequest(command, command + 1, body)
        return int.from_bytes(control.answer(self.vtpm, self.ptm, request)[:4], "big")

    def _send(self, command: bytes) -> int:
        return tpm.code_of(self.vtpm.process(command))

    # -- what may happen ------------------------------------------------------------------

    def step(self) -> None:
        steps: tuple[Callable[[], object], ...] = (
            *(self.write, self.write, self.write, self.request, self.request, self.command),
            *(self.set_blob, self.get_blob, self.stop, self.init, self.kill, self.kill),
            *(self.store_volatile, self.lose_seeds, self.hash, self.check),
        )
        doing = self._chance.choice(steps)
        self.told.append(getattr(doing, "__name__", ""))
        doing()

    def write(self) -> None:
        index, data = self._chance.choice(INDEXES), self._chance.randbytes(SIZE)
        if index not in self.written:
            self._send(tpm.nv_define(index, SIZE))
        if self._send(tpm.nv_write(index, data)) == 0:
            self.written[index] = data

    def command(self) -> None:
        self.vtpm.process(mutated(self._chance, self._chance.choice(HARMLESS)))

    def request(self) -> None:
        commands = (
            *(PtmCommand.PTM_SET_LOCALITY, PtmCommand.PTM_RESET_TPMESTABLISHED),
            *(PtmCommand.PTM_CANCEL_TPM_CMD, PtmCommand.PTM_GET_INFO, PtmCommand.PTM_GET_CONFIG),
            *(PtmCommand.PTM_SET_BUFFERSIZE, PtmCommand.PTM_HASH_DATA, PtmCommand.PTM_HASH_END),
        )
        self._ask(self._chance.choice(commands), self._chance.randbytes(self._chance.randrange(20)))

    def hash(self) -> None:
        if self._ask(PtmCommand.PTM_HASH_START) == 0 and self._chance.randrange(2):
            self._ask(PtmCommand.PTM_HASH_DATA, u32(3) + b"abc")
            self._ask(PtmCommand.PTM_HASH_END)

    def set_blob(self) -> None:
        """Bytes that are no state; an empty one would say that there is none, and be believed."""
        junk = self._chance.randbytes(self._chance.randrange(1, 60))
        self._ask(PtmCommand.PTM_SET_STATEBLOB, u32(0, self._chance.randrange(5), len(junk)) + junk)

    def get_blob(self) -> None:
        """The savestate's is the last of a migration: the lock is given up, and taken again."""
        self._ask(PtmCommand.PTM_GET_STATEBLOB, u32(1, self._chance.randrange(5), 0))

    def stop(self) -> None:
        self._ask(PtmCommand.PTM_STOP)

    def init(self) -> None:
        self._ask(PtmCommand.PTM_INIT, u32(self._chance.randrange(2)))
        self._send(self._chance.choice((tpm.TPM2_STARTUP_CLEAR, tpm.TPM2_STARTUP_STATE)))

    def store_volatile(self) -> None:
        self._ask(PtmCommand.PTM_STORE_VOLATILE)

    def lose_seeds(self) -> None:
        """What the owner of the platform may do."""
        which, code = self._chance.choice((("owner", _CLEAR), ("endorsement", _CHANGE_EPS)))
        command = tpm.tpm2(code, u32(tpm2.TPM_RH_PLATFORM) + _PASSWORD, sessions=True)
        if self._chance.randrange(4) or self._send(command) != 0:
            return
        if which == "owner":
            self.written.clear()
        # libtpms refuses a volatile state from before: an empty one takes its place.
        self.stop()
        assert self._ask(PtmCommand.PTM_SET_STATEBLOB, u32(0, _VOLATILE, 0)) == 0
        self.check(changed=which)

    def kill(self) -> None:
        """As SIGKILL: what is on the disk stays, whatever the TPM would have liked to add."""
        disk = self._folder.with_name("disk")
        shutil.copytree(self._folder, disk)
        self.vtpm.close()
        shutil.rmtree(self._folder)
        disk.rename(self._folder)
        self._begin()
        self.check()

    # -- what must be ---------------------------------------------------------------------

    def check(self, changed: str = "") -> None:
        """It starts, has its seeds and what was written, and nobody else can have its state."""
        assert self._ask(PtmCommand.PTM_SET_LOCALITY, b"\0") == 0
        for _ in range(2):  # the first may resume from a volatile state, and removes it
            assert self._ask(PtmCommand.PTM_INIT, u32(1)) == 0
        assert self._send(tpm.TPM2_STARTUP_CLEAR) == 0
        self._check_locked()
        for index, data in self.written.items():
            assert tpm.nv_data(self.vtpm.process(tpm.nv_read(index, SIZE))) == data, hex(index)
        for which, name in getattr(self, "names", {}).items():
            now = self._name_of(_HIERARCHIES[which])
            assert (now == name) != (which == changed), f"the seed of {which}"
            self.names[which] = now

    def _check_locked(self) -> None:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                DirectoryStore(str(self._folder), tpm2=True).lock()
            except StateLocked:
                status = 0
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0, "another process could lock the state"

    def _name_of(self, hierarchy: int) -> bytes:
        """Of the primary key that the seed gives."""
        template = spk_template(KeyAlgorithm.P384)
        parameters = tpm2.CreatePrimaryParameters(tpm2.SensitiveCreate().pack(), template.pack())
        code = TpmCc.TPM_CC_CreatePrimary
        command = tpm2.command(code, (hierarchy,), parameters, tpm2.PasswordSession())
        made = tpm2.read_response_untrusted(code.name, self.vtpm.process(command), handles=1)
        assert self._send(tpm2.command(TpmCc.TPM_CC_FlushContext, made.handles)) == 0
        return tpm2.CreatePrimaryResult.unpack_untrusted(made.parameters).name


@pytest.mark.parametrize("number", range(8))
def test_any_order_of_requests_commands_and_deaths(number: int, tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    story = Story(state, random.Random(SEED + number))  # noqa: S311 - repeatable, not secret
    try:
        for _ in range(STEPS):
            story.step()
        story.kill()
    except AssertionError as exc:
        exc.add_note(f"after {' '.join(story.told)}")
        raise
    finally:
        story.vtpm.close()
    assert len(set(story.told)) > 8


def test_a_new_tpm_would_be_noticed(tmp_path: Path) -> None:
    """The model can tell: with the state gone, the seeds are other ones."""
    state = tmp_path / "state"
    state.mkdir()
    story = Story(state, random.Random(SEED))  # noqa: S311
    story.vtpm.stop()
    (state / "tpm2-00.permall").unlink()
    with pytest.raises(AssertionError, match="the seed of owner"):
        story.check()
    story.vtpm.close()


def test_a_lost_write_would_be_noticed(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    story = Story(state, random.Random(SEED))  # noqa: S311
    while not story.written:
        story.write()
    story.written = {index: bytes(SIZE) for index in story.written}
    with pytest.raises(AssertionError, match=hex(min(story.written))):
        story.check()
    story.vtpm.close()


def test_a_volatile_state_from_before_a_clear_is_named_and_not_the_permanent_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Who moved the permanent state away would lose the TPM."""
    state = tmp_path / "state"
    state.mkdir()
    story = Story(state, random.Random(SEED))  # noqa: S311
    story.store_volatile()
    clear = tpm.tpm2(_CLEAR, u32(tpm2.TPM_RH_PLATFORM) + _PASSWORD, sessions=True)
    assert tpm.code_of(story.vtpm.process(clear)) == 0
    with pytest.raises(TpmUnavailable):
        story.vtpm.start()
    assert f"libtpms refuses {state}/tpm2-00.volatilestate" in caplog.text
    assert "the permanent state is not at fault" in caplog.text
    (state / "tpm2-00.volatilestate").unlink()
    story.vtpm.start()
    story.vtpm.close()
