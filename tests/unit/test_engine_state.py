"""State in and out of the real libtpms: kept, moved, of the C suite, damaged."""

from __future__ import annotations

import hashlib
import shutil

import pytest

from tests.support import commands as tpm
from tests.support.libtpms import (
    BOTH,
    READ_PCR_10,
    is_running,
    make,
    nv_commands,
    on_directory,
    run,
    started,
)
from tests.support.processes import in_child
from tests.support.stores import FailingStore
from tests.support.vectors import state_in
from vtpm_cuse.engine.base import StateType
from vtpm_cuse.errors import EngineError, StateDamaged, VtpmError
from vtpm_cuse.storage.sealed import SealedStore

# -- state --------------------------------------------------------------------------------


@BOTH
@in_child
def test_permanent_state_is_kept(tpm2: bool) -> None:
    store = FailingStore()
    engine = started(tpm2=tpm2, store=store)
    define, write, read = nv_commands(tpm2=tpm2)
    assert run(engine, define) == 0
    assert run(engine, write) == 0
    engine.stop()
    engine = started(tpm2=tpm2, store=store)
    assert engine.process(read)[-20:].find(b"persists") >= 0


@BOTH
@in_child
def test_volatile_state_resumes(tpm2: bool) -> None:
    store = FailingStore()
    extend, read = (
        (tpm.pcr_extend(10, b"\x22" * 32), READ_PCR_10)
        if tpm2
        else (tpm.tpm12_pcr_extend(10, b"\x22" * 20), tpm.tpm12_pcr_read(10))
    )
    engine = started(tpm2=tpm2, store=store)
    assert run(engine, extend) == 0
    expected = engine.process(read)
    SealedStore(store).store("volatilestate", engine.volatile_state())
    for _ in range(2):
        engine.start()
        assert engine.process(read)[-20:] == expected[-20:]
    store.delete("volatilestate")
    engine.start()
    assert run(engine, read) != 0


@BOTH
@in_child
def test_state_moves_to_another_tpm(tpm2: bool) -> None:
    extend, read = (
        (tpm.pcr_extend(10, b"\x33" * 32), READ_PCR_10)
        if tpm2
        else (tpm.tpm12_pcr_extend(10, b"\x33" * 20), tpm.tpm12_pcr_read(10))
    )
    store = FailingStore()
    engine = started(tpm2=tpm2, store=store)
    assert run(engine, extend) == 0
    expected = engine.process(read)
    volatile = engine.volatile_state()
    permanent = SealedStore(store).load("permall")
    engine.stop()

    store = FailingStore()
    engine = started(tpm2=tpm2, store=store)
    with pytest.raises(EngineError):  # only a stopped one can be given a state
        engine.set_state(StateType.PERMANENT, permanent)
    engine.stop()
    before = dict(store.blobs)
    engine.set_state(StateType.PERMANENT, permanent)
    engine.set_state(StateType.VOLATILE, volatile)
    engine.set_state(StateType.SAVESTATE, None)
    assert store.blobs == before  # nothing is written before the start
    engine.start()
    assert engine.process(read)[-20:] == expected[-20:]
    assert SealedStore(store).load("permall") == permanent


@BOTH
@in_child
def test_bad_state_is_refused_and_stored_one_stays(tpm2: bool) -> None:
    store = FailingStore()
    engine = started(tpm2=tpm2, store=store)
    engine.stop()
    before = dict(store.blobs)
    for rubbish in (b"\0", b"rubbish" * 100, SealedStore(store).load("permall")[:-100]):
        with pytest.raises(EngineError) as caught:
            engine.set_state(StateType.PERMANENT, rubbish)
        assert caught.value.rc
        assert store.blobs == before
    engine.start()
    assert is_running(engine)


@in_child
def test_savestate_of_tpm2_is_of_bad_type() -> None:
    engine = make()
    engine.set_state(StateType.SAVESTATE, None)
    with pytest.raises(EngineError) as caught:
        engine.set_state(StateType.SAVESTATE, b"x" * 100)
    assert caught.value.rc == 0x34


@in_child
def test_save_state_of_tpm12() -> None:
    store = FailingStore()
    engine = started(tpm2=False, store=store)
    extended = engine.process(tpm.tpm12_pcr_extend(10, b"\x11" * 20))
    assert run(engine, tpm.TPM12_SAVE_STATE) == 0
    assert "savestate" in store.blobs
    engine.start()
    assert run(engine, tpm.TPM12_STARTUP_STATE) == 0
    assert engine.process(tpm.tpm12_pcr_read(10))[-20:] == extended[-20:]
    assert run(engine, tpm.tpm12_pcr_extend(10, b"\x11" * 20)) == 0
    assert "savestate" not in store.blobs


# -- states of the C suite ----------------------------------------------------------------

PCR_10 = hashlib.sha256(bytes(32) + b"\x11" * 32).digest()
"""After the one extension that the vectors have."""


@pytest.mark.parametrize("vector", ["v0.7.1-tpm2-dir-plain", "v0.10.2-tpm2-dir-plain"])
@in_child
def test_c_suites_tpm2_goes_on(tmp_path_factory: pytest.TempPathFactory, vector: str) -> None:
    directory = state_in(tmp_path_factory.mktemp("state"), vector)
    engine = on_directory(directory)
    engine.start()
    assert tpm.pcr_value(engine.process(READ_PCR_10)) == PCR_10


@pytest.mark.parametrize("vector", ["v0.7.1-tpm2-dir-plain", "v0.10.2-tpm2-dir-plain", "v1-plain"])
@in_child
def test_c_suites_permanent_state(tmp_path_factory: pytest.TempPathFactory, vector: str) -> None:
    directory = state_in(tmp_path_factory.mktemp("state"), vector)
    (directory / "tpm2-00.volatilestate").unlink(missing_ok=True)
    engine = on_directory(directory)
    engine.start()
    assert run(engine, tpm.TPM2_STARTUP_CLEAR) == 0
    assert run(engine, tpm.get_random(8)) == 0
    assert (directory / "tpm2-00.permall").read_bytes()[:4].hex() == "0201000a"


@pytest.mark.parametrize("vector", ["v0.7.1-tpm12-dir-plain", "v0.10.2-tpm12-dir-plain"])
@in_child
def test_c_suites_tpm12_goes_on(tmp_path_factory: pytest.TempPathFactory, vector: str) -> None:
    directory = state_in(tmp_path_factory.mktemp("state"), vector)
    before = (directory / "tpm-00.permall").read_bytes()
    engine = on_directory(directory, tpm2=False)
    engine.start()
    assert run(engine, tpm.tpm12_pcr_read(0)) == 0  # resumed: no Startup needed
    assert (directory / "tpm-00.permall").read_bytes() == before


@in_child
def test_c_suites_savestate(tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = state_in(tmp_path_factory.mktemp("state"), "v0.10.2-tpm12-savestate")
    source = state_in(tmp_path_factory.mktemp("state"), "v0.10.2-tpm12-dir-plain")
    shutil.copy(source / "tpm-00.permall", directory)
    engine = on_directory(directory, tpm2=False)
    engine.start()
    assert run(engine, tpm.TPM12_STARTUP_STATE) == 0


# -- damage -------------------------------------------------------------------------------


def _damages(original: bytes) -> dict[str, bytes]:
    return {
        "empty": b"",
        "truncated": original[: len(original) // 2],
        "one byte more": original + b"\0",
        "garbage": b"garbage" * 50,
        "no payload": original[:6] + (10).to_bytes(4, "big"),
        "empty payload": bytes.fromhex("0201000a000000000010000100000000"),
        "payload cut": original[:6]
        + (len(original) - 100).to_bytes(4, "big")
        + original[10:12]
        + (len(original) - 116).to_bytes(4, "big")
        + original[16:-100],
        "payload of zeros": original[:16] + bytes(len(original) - 16),
        "newer format": b"\x03\x03" + original[2:],
        "encrypted": original[:10] + b"\0\2" + original[12:],
    }


@BOTH
@pytest.mark.parametrize("damage", list(_damages(bytes(200))))
@in_child
def test_damaged_state_is_an_error_and_stays_as_it_is(
    tmp_path_factory: pytest.TempPathFactory, tpm2: bool, damage: str
) -> None:
    vector, name = (
        ("v0.7.1-tpm2-dir-plain", "tpm2-00.permall")
        if tpm2
        else ("v0.7.1-tpm12-dir-plain", "tpm-00.permall")
    )
    directory = state_in(tmp_path_factory.mktemp("state"), vector)
    (directory / name.replace("permall", "volatilestate")).unlink()
    path = directory / name
    good = path.read_bytes()
    bad = _damages(good)[damage]
    path.write_bytes(bad)
    engine = on_directory(directory, tpm2=tpm2)
    with pytest.raises(VtpmError):
        engine.start()
    assert not is_running(engine)
    assert path.read_bytes() == bad
    assert [entry.name for entry in directory.iterdir()] == [name]
    path.write_bytes(good)
    engine.start()  # the right file put back, it works again
    assert is_running(engine)


@in_child
def test_damaged_volatile_state(tmp_path_factory: pytest.TempPathFactory) -> None:
    """As the C suite: a TPM 2 ignores an unreadable file, a TPM 1.2 does not start."""
    for tpm2, vector, prefix in (
        (True, "v0.7.1-tpm2-dir-plain", "tpm2-00"),
        (False, "v0.7.1-tpm12-dir-plain", "tpm-00"),
    ):
        directory = state_in(tmp_path_factory.mktemp("state"), vector)
        path = directory / f"{prefix}.volatilestate"
        path.write_bytes(path.read_bytes()[:-1])
        engine = on_directory(directory, tpm2=tpm2)
        if tpm2:
            engine.start()
            assert run(engine, tpm.TPM2_STARTUP_CLEAR) == 0
        else:
            with pytest.raises(StateDamaged):
                engine.start()
        engine.stop()
