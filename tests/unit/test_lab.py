"""The parts of the laboratory that need no TPM."""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtpm_cuse.errors import LabError, VtpmError, WireError
from vtpm_cuse.lab import Exchange, Snapshot, Tpm, commands
from vtpm_cuse.lab.record import CaptureStream, traced_lines
from vtpm_cuse.wire.pcapng import Conversation, file_header

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT: Final = Path(__file__).parents[2]
HEAVY: Final = {"trio", "asyncio", "cffi", "_cffi_backend", "cryptography", "hypothesis"}


@pytest.mark.parametrize("tpm2", [True, False])
def test_a_snapshot_as_bytes(tpm2: bool) -> None:
    snapshot = Snapshot(b"permanent", b"volatile", b"", tpm2=tpm2)
    again = Snapshot.from_bytes(snapshot.to_bytes())
    assert again.to_bytes() == snapshot.to_bytes()
    assert (again.permanent, again.volatile, again.saved) == (b"permanent", b"volatile", b"")
    assert again.tpm2 is tpm2
    assert "permanent" not in repr(again)


@given(st.binary())
def test_bytes_of_others_are_no_snapshot(data: bytes) -> None:
    with pytest.raises(WireError):
        Snapshot.from_bytes(data)


@given(st.data())
def test_a_damaged_snapshot_is_an_error_or_another_snapshot(data: st.DataObject) -> None:
    whole = Snapshot(b"permanent", b"volatile").to_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    changed = whole[:at] + bytes([data.draw(st.integers(0, 255))]) + whole[at + 1 :]
    with contextlib.suppress(WireError):
        assert Snapshot.from_bytes(changed).to_bytes() == changed
    with pytest.raises(WireError):
        Snapshot.from_bytes(whole[:at])


def test_a_snapshot_in_a_file_is_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "snapshot"
    path.write_text("something else")
    path.chmod(0o666)
    umask = os.umask(0)
    try:
        Snapshot(b"secret").save(path)
    finally:
        os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert Snapshot.load(path).permanent == b"secret"
    assert [entry.name for entry in tmp_path.iterdir()] == ["snapshot"]


def test_a_snapshot_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "snapshot"
    Snapshot(b"old").save(path)

    def full(_fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        Snapshot(b"new").save(path)
    assert Snapshot.load(path).permanent == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["snapshot"]


def capture() -> tuple[bytes, list[Exchange]]:
    """As an emulator writes it, power-on and -off among it."""
    talk, exchanges = Conversation(50000), []
    data = file_header() + talk.begin(1)
    for number in range(5):
        exchange = Exchange(b"c" * (10 + number), b"r" * (20 - number))
        data += talk.command(exchange.command, 2) + talk.response(exchange.response, 3)
        exchanges.append(exchange)
    return data + talk.end(4), exchanges


@pytest.mark.parametrize("size", [1, 7, 64, 10_000])
def test_a_capture_is_read_in_pieces(size: int) -> None:
    data, wanted = capture()
    stream = CaptureStream()
    pieces: Iterator[bytes] = (data[at : at + size] for at in range(0, len(data), size))
    assert [one for piece in pieces for one in stream.feed(piece)] == wanted
    assert stream.command is None


def test_a_command_without_a_response_is_known() -> None:
    stream = CaptureStream()
    assert stream.feed(file_header() + Conversation(50000).command(b"running", 1)) == []
    assert stream.command == b"running"


def test_a_traced_line_has_no_secret() -> None:
    command = bytes.fromhex("80010000000e00000131") + b"pass"
    response = bytes.fromhex("80010000000a0000098e")
    lines = traced_lines([Exchange(command, response), Exchange(command, b"")])
    assert "0x00000131" in lines[0]
    assert "0x98e" in lines[0]
    assert "no response" in lines[1]
    assert "pass" not in "".join(lines)
    assert b"pass".hex() not in "".join(lines)


@pytest.mark.parametrize("number", [-1, 24])
def test_a_pcr_that_is_none(number: int) -> None:
    def ask(_command: bytes) -> bytes:
        raise AssertionError("it was asked")

    with pytest.raises(LabError, match="no PCR"):
        commands.read_pcr(ask, number, "sha256")
    with pytest.raises(LabError, match="no PCR"):
        commands.read_pcr12(ask, number)


def test_a_bank_that_is_none() -> None:
    with pytest.raises(LabError, match="bank md5"):
        commands.bank_of("md5")
    assert commands.bank_of("sha3-256") == 0x27


def test_what_a_tpm_cannot_begin_from() -> None:
    with pytest.raises(LabError, match=r"no TPM 3\.0"):
        Tpm(version="3.0")  # type: ignore[arg-type]
    with pytest.raises(LabError, match="all of a TPM"):
        Tpm(snapshot=Snapshot(b"-"), state="folder")
    with pytest.raises(LabError, match="without a permanent state"):
        Snapshot(b"")


def test_a_tpm_that_is_not_started_says_so() -> None:
    tpm = Tpm(version="1.2")
    tpm.close()
    assert not tpm.alive
    asks = [lambda: tpm.path, lambda: tpm.env, lambda: tpm.pid, tpm.snapshot, tpm.power_cycle]
    for ask in asks:
        with pytest.raises(LabError, match="not running"):
            ask()
    with pytest.raises(LabError, match=r"TPM 1\.2 has none"):
        tpm.lockout()


def test_a_folder_that_cannot_be_made_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk, say."""

    def full(path: str, _mode: int) -> None:
        raise OSError(28, "No space left on device", path)

    monkeypatch.setattr(os, "mkdir", full)
    with pytest.raises(LabError, match=r"Could not make .*: No space left on device"):
        Tpm().start()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("module", ["lab.pytest_plugin", "lab.tpm", "client.child"])
def test_imports_stay_light(module: str) -> None:
    code = f"import sys, pytest; import vtpm_cuse.{module}; print(*sys.modules)"
    words = [sys.executable, "-c", code]
    run = subprocess.run(words, check=True, capture_output=True, text=True, cwd=ROOT)
    loaded = set(run.stdout.split())
    assert not HEAVY & {name.partition(".")[0] for name in loaded}
    if module == "lab.pytest_plugin":
        assert "vtpm_cuse.lab.tpm" not in loaded
        assert "vtpm_cuse.errors" not in loaded


def test_no_public_name_but_those_that_are_there() -> None:
    import vtpm_cuse.lab

    assert all(hasattr(vtpm_cuse.lab, name) for name in vtpm_cuse.lab.__all__)
    assert not hasattr(vtpm_cuse.lab, "Tmp")
    assert issubclass(LabError, VtpmError)
