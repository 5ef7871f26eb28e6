"""PTM requests: which are allowed when, and what each answers (the state machine)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.kernel import Machine
from vtpm_cuse.errors import EngineError, PtmError, StateMissing, StorageError
from vtpm_cuse.vtpm.vtpm import VtpmOptions
from vtpm_cuse.wire.ptm import (
    PtmBufferSizeRequest,
    PtmBufferSizeResponse,
    PtmCommand,
    PtmConfigResponse,
    PtmEmpty,
    PtmEstablishedResponse,
    PtmHashDataRequest,
    PtmInfoRequest,
    PtmInfoResponse,
    PtmInitRequest,
    PtmLocalityRequest,
    PtmLockStorageRequest,
    PtmResultResponse,
)

if TYPE_CHECKING:
    from vtpm_cuse.wire.layout import WireStruct

NOTHING = PtmEmpty()
OK, BAD_ORDINAL = 0, 0xA

# Command, request, result while stopped, result while running (TPM 2).
STATE_MACHINE: list[tuple[PtmCommand, WireStruct, int, int]] = [
    (PtmCommand.PTM_INIT, PtmInitRequest(0), OK, OK),
    (PtmCommand.PTM_STOP, NOTHING, OK, OK),
    (PtmCommand.PTM_SHUTDOWN, NOTHING, OK, OK),
    (PtmCommand.PTM_GET_TPMESTABLISHED, NOTHING, BAD_ORDINAL, OK),
    (PtmCommand.PTM_RESET_TPMESTABLISHED, PtmLocalityRequest(3), BAD_ORDINAL, OK),
    (PtmCommand.PTM_RESET_TPMESTABLISHED, PtmLocalityRequest(5), BAD_ORDINAL, 0x3D),
    (PtmCommand.PTM_SET_LOCALITY, PtmLocalityRequest(4), OK, OK),
    (PtmCommand.PTM_SET_LOCALITY, PtmLocalityRequest(5), 0x3D, 0x3D),
    (PtmCommand.PTM_HASH_START, NOTHING, BAD_ORDINAL, OK),
    (PtmCommand.PTM_HASH_DATA, PtmHashDataRequest(1, b"x"), BAD_ORDINAL, OK),
    (PtmCommand.PTM_HASH_END, NOTHING, BAD_ORDINAL, OK),
    (PtmCommand.PTM_CANCEL_TPM_CMD, NOTHING, BAD_ORDINAL, OK),
    (PtmCommand.PTM_STORE_VOLATILE, NOTHING, BAD_ORDINAL, OK),
    (PtmCommand.PTM_GET_CONFIG, NOTHING, OK, OK),
    (PtmCommand.PTM_SET_BUFFERSIZE, PtmBufferSizeRequest(0), OK, OK),
    (PtmCommand.PTM_SET_BUFFERSIZE, PtmBufferSizeRequest(3000), OK, BAD_ORDINAL),
    (PtmCommand.PTM_GET_INFO, PtmInfoRequest(1, 0), OK, OK),
    (PtmCommand.PTM_LOCK_STORAGE, PtmLockStorageRequest(0), OK, OK),
]


def result(response: WireStruct) -> int:
    assert isinstance(
        response,
        (
            PtmResultResponse,
            PtmEstablishedResponse,
            PtmConfigResponse,
            PtmBufferSizeResponse,
            PtmInfoResponse,
        ),
    )
    return response.result


@pytest.mark.parametrize(("command", "request_", "stopped", "running"), STATE_MACHINE)
def test_state_machine(
    command: PtmCommand, request_: WireStruct, stopped: int, running: int
) -> None:
    assert result(Machine(running=False).ptm.handle(command, request_)) == stopped
    assert result(Machine(running=True).ptm.handle(command, request_)) == running


@pytest.mark.parametrize("tpm2", [True, False])
def test_states_after_each_life_cycle_request(tpm2: bool) -> None:
    machine = Machine(tpm2=tpm2, running=False)
    for command, request, running in (
        (PtmCommand.PTM_STOP, NOTHING, False),
        (PtmCommand.PTM_INIT, PtmInitRequest(0), True),
        (PtmCommand.PTM_INIT, PtmInitRequest(1), True),
        (PtmCommand.PTM_STOP, NOTHING, False),
        (PtmCommand.PTM_INIT, PtmInitRequest(0), True),
        (PtmCommand.PTM_SHUTDOWN, NOTHING, False),
    ):
        assert result(machine.ptm.handle(command, request)) == OK
        assert machine.vtpm.running is running
    assert machine.ptm.shutdown_requested


def test_blob_requests_need_their_state() -> None:
    for command, running in (
        (PtmCommand.PTM_GET_STATEBLOB, False),
        (PtmCommand.PTM_SET_STATEBLOB, True),
    ):
        with pytest.raises(PtmError) as caught:
            Machine(running=running).ptm.check_state(command)
        assert caught.value.result == BAD_ORDINAL
        Machine(running=not running).ptm.check_state(command)


def test_failed_init_leaves_it_stopped() -> None:
    machine = Machine()
    machine.engine.faults["start"] = EngineError("TPMLIB_MainInit", 0x101)
    assert result(machine.ptm.handle(PtmCommand.PTM_INIT, PtmInitRequest(0))) == 0x101
    assert not machine.vtpm.running
    assert result(machine.ptm.handle(PtmCommand.PTM_HASH_START, NOTHING)) == BAD_ORDINAL


def test_init_flag_deletes_the_volatile_state() -> None:
    machine = Machine()
    machine.store.blobs["volatilestate"] = b"x"
    machine.ptm.handle(PtmCommand.PTM_INIT, PtmInitRequest(0xFFFFFFFE))
    assert "volatilestate" in machine.store.blobs
    machine.ptm.handle(PtmCommand.PTM_INIT, PtmInitRequest(1))
    assert "volatilestate" not in machine.store.blobs


def test_cancel_on_tpm12() -> None:
    assert result(Machine(tpm2=False).ptm.handle(PtmCommand.PTM_CANCEL_TPM_CMD, NOTHING)) == 9


def test_established() -> None:
    machine = Machine()
    for bit in (False, True):
        machine.engine.is_established = bit
        response = machine.ptm.handle(PtmCommand.PTM_GET_TPMESTABLISHED, NOTHING)
        assert response == PtmEstablishedResponse(0, int(bit))


def test_locality_4_refused_where_configured() -> None:
    machine = Machine(options=VtpmOptions(reject_locality_4=True))
    command = PtmCommand.PTM_SET_LOCALITY
    assert result(machine.ptm.handle(command, PtmLocalityRequest(4))) == 0x3D
    command = PtmCommand.PTM_RESET_TPMESTABLISHED
    assert result(machine.ptm.handle(command, PtmLocalityRequest(4))) == OK


def test_hash_data_takes_what_it_says() -> None:
    machine = Machine()
    handle = machine.ptm.handle
    assert result(handle(PtmCommand.PTM_HASH_DATA, PtmHashDataRequest(3, b"abcdef"))) == OK
    assert bytes(machine.engine.hashed) == b"abc"
    assert result(handle(PtmCommand.PTM_HASH_DATA, PtmHashDataRequest(7, b"abcdef"))) == 9
    assert bytes(machine.engine.hashed) == b"abc"


def test_library_codes_pass_through() -> None:
    machine = Machine()
    machine.engine.results = {"hash_start": 0x26, "hash_data": 0x1A, "hash_end": 0x1A}
    handle = machine.ptm.handle
    assert result(handle(PtmCommand.PTM_HASH_START, NOTHING)) == 0x26
    assert result(handle(PtmCommand.PTM_HASH_DATA, PtmHashDataRequest(0, b""))) == 0x1A
    assert result(handle(PtmCommand.PTM_HASH_END, NOTHING)) == 0x1A


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (StorageError("x", "full"), 9),
        (EngineError("x", 0x1C), 0x1C),
        (StateMissing("x", "gone"), 0x800),
    ],
)
def test_faults_become_results(fault: Exception, expected: int) -> None:
    machine = Machine()
    machine.engine.faults["volatile_state"] = fault
    assert result(machine.ptm.handle(PtmCommand.PTM_STORE_VOLATILE, NOTHING)) == expected


def test_buffer_size() -> None:
    machine = Machine(running=False)
    command = PtmCommand.PTM_SET_BUFFERSIZE
    for asked, used in ((0, 4096), (1, 0xAF8), (3000, 3000), (0xFFFFFFFF, 4096)):
        response = machine.ptm.handle(command, PtmBufferSizeRequest(asked))
        assert response == PtmBufferSizeResponse(0, used, 0xAF8, 4096)


def test_info_in_parts() -> None:
    machine = Machine(running=False)
    machine.engine.text = "x" * 4653
    command = PtmCommand.PTM_GET_INFO
    first = machine.ptm.handle(command, PtmInfoRequest(0xFFFFFFFFFFFFFFFF, 0))
    assert isinstance(first, PtmInfoResponse)
    assert (first.totlength, first.length, len(first.text)) == (4654, 3072, 3072)
    second = machine.ptm.handle(command, PtmInfoRequest(0xFF, 3072))
    assert isinstance(second, PtmInfoResponse)
    assert (second.totlength, second.length) == (4654, 1582)
    assert first.text + second.text == b"x" * 4653 + b"\0"
    last = machine.ptm.handle(command, PtmInfoRequest(0xFF, 4652))
    assert isinstance(last, PtmInfoResponse)
    assert last.text == b"x\0"
    for offset in (4653, 4654, 0xFFFFFFFF):
        assert result(machine.ptm.handle(command, PtmInfoRequest(0xFF, offset))) == 3


def test_lock_storage() -> None:
    machine = Machine(running=False)
    command = PtmCommand.PTM_LOCK_STORAGE
    assert result(machine.ptm.handle(command, PtmLockStorageRequest(0))) == OK
    assert machine.store.locked
    machine.store.faults["lock"] = StorageError("x", "taken")
    assert result(machine.ptm.handle(command, PtmLockStorageRequest(0))) == 9


def test_config_without_keys() -> None:
    assert Machine().ptm.handle(PtmCommand.PTM_GET_CONFIG, NOTHING) == PtmConfigResponse(0, 0)
