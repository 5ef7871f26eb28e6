"""State behind the control channel of `swtpm socket`: blobs, migration, the lock, files."""

from __future__ import annotations

import os
import stat
import struct
from typing import TYPE_CHECKING

import pytest

from tests.support import commands as tpm
from tests.support import sockets as s
from tests.support.sockets import RUNNING, Client, Server, u32

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("warm")

CLOCK = tpm.TPM2_READ_CLOCK
RANDOM = tpm.get_random(8)


# -- state blobs ----------------------------------------------------------------------------


def extended(data: Client, pcr: int = 7) -> bytes:
    assert tpm.code_of(data.command(tpm.pcr_extend(pcr, b"\7" * 32))) == 0
    return tpm.pcr_value(data.command(tpm.pcr_read(pcr)))


def test_migration_as_qemu_does_it(tmp_path: Path) -> None:
    with (
        Server(tmp_path / "source", *RUNNING) as source,
        Server(tmp_path / "target") as target,
        source.data() as data,
    ):
        pcr = extended(data)
        with source.control() as control:
            blobs = [control.get_blob(kind) for kind in (s.PERMANENT, s.VOLATILE, s.SAVESTATE)]
        assert [result for result, _, _ in blobs] == [0, 0, 0x800]
        assert all(blob.startswith(bytes.fromhex("0201000a0004")) for _, _, blob in blobs[:2])
        with target.control() as control:
            assert control.result(s.STOP) == 0
            for kind, (_, _, blob) in enumerate(blobs[:2], 1):
                control.send(u32(s.SET_STATEBLOB, 0, kind, len(blob)))  # header and body apart
                control.send(blob)
                assert control.answer() == bytes(4)
            assert control.result(s.INIT, u32(1)) == 0
        with target.data() as moved:
            assert tpm.pcr_value(moved.command(tpm.pcr_read(7))) == pcr
            assert tpm.code_of(moved.command(tpm.TPM2_STARTUP_CLEAR)) == 0x100
        assert tpm.pcr_value(data.command(tpm.pcr_read(7))) == pcr, "the source goes on"


def test_volatile_blob_is_fresh_and_its_file_goes(tmp_path: Path) -> None:
    with Server(tmp_path, *RUNNING) as server, server.control() as control:
        assert control.result(s.STORE_VOLATILE) == 0
        file = server.state / "tpm2-00.volatilestate"
        assert file.exists()
        first = control.get_blob(s.VOLATILE)
        assert not file.exists()
        with server.data() as data:
            extended(data)
        assert control.get_blob(s.VOLATILE) != first


def test_stored_volatile_state_comes_back_until_it_is_deleted(tmp_path: Path) -> None:
    with Server(tmp_path, *RUNNING) as server, server.data() as data:
        pcr = extended(data)
        assert server.request(s.STORE_VOLATILE) == bytes(4)
        extended(data)
        for flag, kept in ((0, True), (0, True), (1, False)):
            assert server.init(flag) == 0
            assert tpm.pcr_value(data.command(tpm.pcr_read(7))) == pcr
            assert (server.state / "tpm2-00.volatilestate").exists() == kept
        assert server.init() == 0
        assert tpm.code_of(data.command(tpm.pcr_read(7))) == 0x100


def test_startup_flag_beside_a_left_over_volatile_state(tmp_path: Path) -> None:
    with Server(tmp_path / "a", *RUNNING) as server, server.data() as data:
        pcr = extended(data)
        assert server.request(s.STORE_VOLATILE) == bytes(4)
        assert server.request(s.SHUTDOWN) == bytes(4)
        assert server.wait() == 0
    with Server(tmp_path / "b", *RUNNING, state=server.state) as again, again.data() as data:
        assert tpm.pcr_value(data.command(tpm.pcr_read(7))) == pcr


@pytest.mark.parametrize(("tpm2", "result"), [(True, 0), (False, 9)])
@pytest.mark.parametrize("flag", [0, 1])
def test_unreadable_volatile_state(tpm2: bool, result: int, flag: int, tmp_path: Path) -> None:
    """Ignored by a TPM 2; a TPM 1.2 does not start before somebody has looked at it."""
    name = "tpm2-00" if tpm2 else "tpm-00"
    with Server(tmp_path, tpm2=tpm2) as server:
        assert server.init() == 0
        assert server.request(s.STOP) == bytes(4)
        file = server.state / f"{name}.volatilestate"
        file.write_bytes(b"no state")
        assert server.init(flag) == result
        assert file.exists() == (not tpm2 or flag == 0)


def test_blobs_that_are_refused(tmp_path: Path) -> None:
    def header(flags: int, body: bytes, version: str = "0201", size: int = 10) -> bytes:
        return bytes.fromhex(version) + struct.pack(">HHI", size, flags, 10 + len(body)) + body

    with Server(tmp_path) as server, server.control() as control:
        for kind, blob, result in (
            (s.PERMANENT, b"x", 3),
            (s.PERMANENT, header(0, b"", version="0303"), 0x2E),
            (s.PERMANENT, header(0, b"", size=11), 0x2B),
            (s.PERMANENT, header(4, b"")[:-1], 3),
            (s.PERMANENT, header(2, b"encrypted"), 0xD),
            (9, header(4, b""), 3),
        ):
            assert control.set_blob(kind, blob) == result, blob.hex()
        for kind in (s.PERMANENT, s.VOLATILE, s.SAVESTATE):
            assert control.set_blob(kind, b"") == 0
        assert control.result(s.INIT, u32(0)) == 0
        assert control.set_blob(s.PERMANENT, b"") == 0xA


def test_empty_volatile_blob_hides_the_file(tmp_path: Path) -> None:
    with Server(tmp_path, *RUNNING) as server, server.control() as control, server.data() as data:
        assert control.result(s.STORE_VOLATILE) == 0
        assert control.result(s.STOP) == 0
        assert control.set_blob(s.VOLATILE, b"") == 0
        assert control.result(s.INIT, u32(0)) == 0
        assert tpm.code_of(data.command(CLOCK)) == 0x100


# -- the lock -------------------------------------------------------------------------------


def test_two_servers_never_have_one_state(tmp_path: Path) -> None:
    with Server(tmp_path / "a", *RUNNING) as first, first.data() as data:
        data.command(RANDOM)
        second = s.run_swtpm("--tpm2", "--tpmstate", f"dir={first.state}", *RUNNING)
        assert second.returncode == 1
        assert "Resource temporarily unavailable" in second.stderr
        with Server(tmp_path / "b", state=first.state) as third, third.control() as control:
            assert control.result(s.INIT, u32(0)) == 9
            assert control.result(s.LOCK_STORAGE, u32(0)) == 9, "the truth, also after INIT"
            assert control.result(s.LOCK_STORAGE, u32(3)) == 9
            assert first.request(s.SHUTDOWN) == bytes(4)
            assert control.result(s.LOCK_STORAGE, u32(6000)) == 0
            assert control.result(s.INIT, u32(0)) == 0


def test_lock_of_a_linear_file_goes_and_comes_back(tmp_path: Path) -> None:
    """As that of a directory: kept from the start, released with the savestate, taken on request."""
    state = ("--tpmstate", f"backend-uri=file://{tmp_path}/state.bin")
    words = ("--migration", "incoming", *state)
    with Server(tmp_path / "a", *RUNNING, *state) as first, first.control() as control:
        with first.data() as data:
            data.command(RANDOM)
        with Server(tmp_path / "b", *words) as second, second.control() as other:
            blob = control.get_blob(s.PERMANENT)[2]
            assert other.set_blob(s.PERMANENT, blob) == 0x1F
            assert other.result(s.LOCK_STORAGE, u32(2)) == 9
            control.get_blob(s.SAVESTATE)
            assert other.result(s.LOCK_STORAGE, u32(0)) == 0
            assert control.result(s.LOCK_STORAGE, u32(2)) == 9
            assert other.set_blob(s.PERMANENT, blob) == 0
            assert other.result(s.INIT, u32(0)) == 0
            with first.data() as data:
                data.send(RANDOM)
                assert data.rest() == b""
            assert first.wait() == 1
            with second.data() as data:
                assert tpm.code_of(data.command(tpm.TPM2_STARTUP_CLEAR)) == 0


def test_file_lock_can_be_left_out(tmp_path: Path) -> None:
    state = ("--tpmstate", f"backend-uri=file://{tmp_path}/state.bin,lock=false")
    with Server(tmp_path / "a", *RUNNING, *state) as first, first.data() as data:
        data.command(RANDOM)
        with Server(tmp_path / "b", *state) as second:
            assert second.init() == 0


@pytest.mark.parametrize("flag", [(), ("--migration", "release-lock-outgoing")])
def test_lock_goes_with_the_savestate_and_comes_back_with_a_command(
    flag: tuple[str, ...], tmp_path: Path
) -> None:
    with Server(tmp_path, *RUNNING, *flag) as server, server.data() as data:
        data.command(RANDOM)
        assert s.is_locked(server.state)
        with server.control() as control:
            control.get_blob(s.SAVESTATE)
            assert not s.is_locked(server.state)
            assert tpm.code_of(data.command(RANDOM)) == 0
            assert s.is_locked(server.state)
            control.get_blob(s.SAVESTATE)
            assert control.result(s.LOCK_STORAGE, u32(0)) == 0
            assert s.is_locked(server.state)


def test_source_dies_silently_when_the_destination_has_the_state(tmp_path: Path) -> None:
    with Server(tmp_path / "a", *RUNNING) as source, source.data() as data:
        incoming = ("--migration", "incoming")
        with Server(tmp_path / "b", *incoming, state=source.state) as target:
            data.command(RANDOM)
            with source.control() as from_, target.control() as to:
                blobs = {kind: from_.get_blob(kind)[2] for kind in (1, 2)}
                assert to.set_blob(1, blobs[1]) == 0x1F, "the source still has the lock"
                from_.get_blob(s.SAVESTATE)
                for kind, blob in blobs.items():
                    assert to.set_blob(kind, blob) == 0
                assert to.result(s.INIT, u32(1)) == 0
            permanent = (source.state / "tpm2-00.permall").read_bytes()
            data.send(RANDOM)
            assert data.rest() == b"", "no answer"
            assert source.wait() == 1, "nobody may take it for a success"
            assert (source.state / "tpm2-00.permall").read_bytes() == permanent
            with target.data() as moved:
                assert tpm.code_of(moved.command(RANDOM)) == 0


# -- files ----------------------------------------------------------------------------------


def test_mode_of_state_files_is_exact(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    before = os.umask(0o777 & ~0o644)
    try:
        options = ("--tpmstate", f"dir={state},mode=0600")
        with Server(tmp_path / "s", *RUNNING, *options) as server:
            assert server.request(s.STORE_VOLATILE) == bytes(4)
            files = list(state.glob("tpm2-00.*"))
            assert len(files) == 2
            assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    finally:
        os.umask(before)
