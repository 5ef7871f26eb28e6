"""The whole program on damaged state: it refuses, names file and check, says what to do, and keeps all."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support import commands as tpm
from tests.support import sockets as s

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FIRST, SECOND = tpm.NV_INDEX, tpm.NV_INDEX + 1


def serve(folder: Path, *words: str) -> s.Server:
    return s.Server(folder, *s.RUNNING, *words)


def define(server: s.Server, index: int) -> None:
    with server.data() as data:
        assert tpm.code_of(data.command(tpm.nv_define(index, 8))) == 0
        assert tpm.code_of(data.command(tpm.nv_write(index, b"8 octets"))) == 0
    assert server.request(s.SHUTDOWN) == bytes(4)
    assert server.wait() == 0


def refused(*words: str) -> str:
    """What it says; for a TPM 2.0 that is to run at once."""
    run = s.run_swtpm("--tpm2", *s.RUNNING, *words)
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    return run.stderr


def flipped(data: bytes) -> bytes:
    """One bit of the payload: the header fits, and only libtpms can see it."""
    return data[:24] + bytes([data[24] ^ 1]) + data[25:]


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda _: b"", "not enough bytes for the blob header: 0"),
    "cut": (lambda data: data[:-1], "blob header says"),
    "longer": (lambda data: data + b"x", "blob header says"),
    "zeros": (lambda data: bytes(len(data)), "blob header says 0 bytes"),
    "payload": (flipped, "libtpms refuses"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_directory(kind: str, tmp_path: Path) -> None:
    damage, reason = DAMAGE[kind]
    with serve(tmp_path / "s") as server:
        define(server, FIRST)
        path = server.state / "tpm2-00.permall"
    path.write_bytes(damage(path.read_bytes()))
    before = path.read_bytes()
    said = refused("--tpmstate", f"dir={path.parent}")
    assert str(path) in said
    assert reason in said
    assert "nothing was changed: put back a copy that you kept, or use another directory" in said
    assert path.read_bytes() == before


def test_linear_file(tmp_path: Path) -> None:
    path = tmp_path / "state.bin"
    uri = f"backend-uri=file://{path}"
    with serve(tmp_path / "s", "--tpmstate", uri) as server:
        define(server, FIRST)
    intact = path.read_bytes()
    offset = int.from_bytes(intact[12:16], "little")
    for place, reason in (
        (0, "the magic number is wrong"),
        (8, "Unknown format version: 9"),
        (10, "header size is 201 instead of 192"),
        (13, "section at"),
        (offset, "unknown format version 11"),
        (offset + 24, "libtpms refuses"),
    ):
        broken = intact[:place] + bytes([intact[place] ^ 9 or 9]) + intact[place + 1 :]
        if place == 8:
            broken = intact[:8] + b"\x09" + intact[9:]
        path.write_bytes(broken)
        said = refused("--tpmstate", uri)
        assert str(path) in said
        assert reason in said, place
        assert "nothing was changed: put back a copy that you kept, or use another file" in said
        assert path.read_bytes() == broken
    path.write_bytes(intact)
    with serve(tmp_path / "again", "--tpmstate", uri) as server:
        define(server, SECOND)


@pytest.mark.parametrize("kind", DAMAGE)
def test_way_back_to_the_last_good_generation(kind: str, tmp_path: Path) -> None:
    """The message names an option, and that does what it says."""
    state = tmp_path / "state"
    option = f"dir={state},backup"
    for number, index in enumerate((FIRST, SECOND)):
        folder = tmp_path / f"life{number}"
        with s.Server(folder, *s.RUNNING, "--tpmstate", option, state=state) as server:
            define(server, index)
    path = state / "tpm2-00.permall"
    backup = state / "tpm2-00.permall.bak"
    path.write_bytes(DAMAGE[kind][0](path.read_bytes()))
    kept = backup.read_bytes()
    said = refused("--tpmstate", f"dir={state}")
    assert f"the last good generation was kept: {backup}" in said
    assert "the option 'backup' of --tpmstate starts the TPM from it" in said
    assert backup.read_bytes() == kept
    with (
        s.Server(tmp_path / "after", *s.RUNNING, "--tpmstate", option, state=state) as server,
        server.data() as data,
    ):
        assert tpm.nv_data(data.command(tpm.nv_read(FIRST, 8))) == b"8 octets"
        assert "The TPM runs from its backup" in server.log_text()


def test_wrong_key_and_no_key(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("00" * 16)
    (tmp_path / "other").write_text("11" * 16)
    with serve(tmp_path / "s", "--key", f"file={tmp_path}/key") as server:
        define(server, FIRST)
        path = server.state / "tpm2-00.permall"
    before = path.read_bytes()
    said = refused("--tpmstate", f"dir={path.parent}", "--key", f"file={tmp_path}/other")
    assert f"{path}: Verification of HMAC failed" in said
    assert "it needs the key that it was written with" in said
    said = refused("--tpmstate", f"dir={path.parent}")
    assert f"{path}: Could not find plain data" in said
    assert "it is encrypted and needs --key with the key that it was written with" in said
    assert "away" not in said
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--log", "file={link}"),
        ("--pid", "file={link}"),
        ("--tpmstate", "backend-uri=file://{link}"),
    ],
)
def test_symbolic_links_are_refused(option: str, value: str, tmp_path: Path) -> None:
    target, link, state = tmp_path / "target", tmp_path / "link", tmp_path / "state"
    target.write_text("precious")
    link.symlink_to(target)
    state.mkdir()
    start = ("--tpm2", "--tpmstate", f"dir={state}", *s.RUNNING)
    socket_path = ("--server", f"type=unixio,path={tmp_path}/data")
    run = s.run_swtpm(*start, *socket_path, option, value.format(link=link))
    assert run.returncode not in {0, None}, run.stderr
    assert "Traceback" not in run.stderr
    assert target.read_text() == "precious"
    assert link.is_symlink()


def test_blobs_of_a_few_bytes(tmp_path: Path) -> None:
    """SET_STATEBLOB of 0 to 16 bytes, for every type; the TPM then starts as if nothing was."""
    with s.Server(tmp_path) as server, server.control() as control:
        for kind in (s.PERMANENT, s.VOLATILE, s.SAVESTATE):
            for size in range(17):
                for fill in (bytes(16), bytes.fromhex("0201000a000400000010000400000000")):
                    result = control.set_blob(kind, fill[:size])
                    assert result in {0, 3, 9, 0xD, 0x2B, 0x34, 0x800}, (kind, size, hex(result))
                    assert result or size in {0, 10}
        assert control.result(s.INIT, s.u32(0)) == 0
        with server.data() as data:
            assert tpm.code_of(data.command(tpm.TPM2_STARTUP_CLEAR)) == 0
