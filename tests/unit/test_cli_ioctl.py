"""swtpm_ioctl: which words ask for what, and how the answers look, on a vTPM that is none."""

from __future__ import annotations

import io
import os
import sys
from typing import TYPE_CHECKING

import pytest

from vtpm_cuse.cli import controls, swtpm_ioctl
from vtpm_cuse.cli.words.targets import split_tcp
from vtpm_cuse.client.base import EMPTY, Control
from vtpm_cuse.errors import WireError
from vtpm_cuse.service.confine import secrecy
from vtpm_cuse.wire import ptm
from vtpm_cuse.wire.ptm import PtmBlobType, PtmCommand, PtmStateFlag

if TYPE_CHECKING:
    from pathlib import Path

    from vtpm_cuse.wire.layout import WireStruct

OK = ptm.PtmResultResponse(0)


class FakeControl(Control):
    """Notes the requests and answers each as told, else with success."""

    def __init__(self) -> None:
        self.requests: list[tuple[PtmCommand, WireStruct]] = []
        self.answers: dict[PtmCommand, WireStruct | Exception] = {}
        self.blobs: dict[PtmBlobType, bytes] = {}

    def close(self) -> None:
        """Nothing is open."""

    def get_state(self, kind: PtmBlobType, flags: PtmStateFlag) -> bytes:
        self.request(PtmCommand.PTM_GET_STATEBLOB, ptm.PtmGetStateRequest(flags, kind, 0))
        return self.blobs[kind]

    def set_state(self, kind: PtmBlobType, blob: bytes) -> None:
        self.request(PtmCommand.PTM_SET_STATEBLOB)
        self.blobs[kind] = blob

    def _exchange(self, command: PtmCommand, body: WireStruct) -> WireStruct:
        self.requests.append((command, body))
        answer = self.answers.get(command, OK)
        if isinstance(answer, Exception):
            raise answer
        return answer


class Tool:
    """Calls the program and keeps what it said."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.tpm = FakeControl()
        self._patch, self._capsys = monkeypatch, capsys

    def __call__(self, *words: str) -> tuple[int, str, str]:
        self._patch.setattr(sys, "argv", ["swtpm_ioctl", *words])
        status = swtpm_ioctl.main()
        return status, *self._capsys.readouterr()


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Tool:
    """The program with a fake vTPM at every target."""
    made = Tool(monkeypatch, capsys)
    monkeypatch.setattr(controls, "connect", lambda _line, _size: made.tpm)
    return made


@pytest.fixture
def unconnected(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Tool:
    """The program as it is."""
    return Tool(monkeypatch, capsys)


@pytest.mark.parametrize(
    ("words", "request_made"),
    [
        (["-i"], (PtmCommand.PTM_INIT, ptm.PtmInitRequest(1))),
        (["--stop"], (PtmCommand.PTM_STOP, EMPTY)),
        (["-s"], (PtmCommand.PTM_SHUTDOWN, EMPTY)),
        (["-v"], (PtmCommand.PTM_STORE_VOLATILE, EMPTY)),
        (["-C"], (PtmCommand.PTM_CANCEL_TPM_CMD, EMPTY)),
        (["-r", "3"], (PtmCommand.PTM_RESET_TPMESTABLISHED, ptm.PtmLocalityRequest(3))),
        (["-l", "04"], (PtmCommand.PTM_SET_LOCALITY, ptm.PtmLocalityRequest(4))),
        (["-l", " 1x"], (PtmCommand.PTM_SET_LOCALITY, ptm.PtmLocalityRequest(1))),
        (["--lock-storage", "5"], (PtmCommand.PTM_LOCK_STORAGE, ptm.PtmLockStorageRequest(5))),
    ],
)
def test_commands_without_output(
    tool: Tool, words: list[str], request_made: tuple[PtmCommand, WireStruct]
) -> None:
    assert tool(*words, "/dev/x") == (0, "", "")
    assert tool.tpm.requests == [request_made]


@pytest.mark.parametrize(
    ("words", "answer", "output"),
    [
        (["-c"], ptm.PtmCapabilityIoctl(0x16FFF), "ptm capability is 0x16fff\n"),
        (["-e"], ptm.PtmEstablishedResponse(0, 1), "tpmEstablished is 1\n"),
        (["-g"], ptm.PtmConfigResponse(0, 3), "ptm configuration flags: 0x3\n"),
        (
            ["-b", "0"],
            ptm.PtmBufferSizeResponse(0, 4096, 2808, 4096),
            "TPM buffersize: 4096\nminimum size  : 2808\nmaximum size  : 4096\n",
        ),
        (["--info", "0x3"], ptm.PtmInfoResponse(0, 3, 3, b"{}\0"), "{}\n"),
    ],
)
def test_commands_with_output(
    tool: Tool, words: list[str], answer: WireStruct, output: str
) -> None:
    command = {
        "-c": PtmCommand.PTM_GET_CAPABILITY,
        "-e": PtmCommand.PTM_GET_TPMESTABLISHED,
        "-g": PtmCommand.PTM_GET_CONFIG,
        "-b": PtmCommand.PTM_SET_BUFFERSIZE,
        "--info": PtmCommand.PTM_GET_INFO,
    }[words[0]]
    tool.tpm.answers[command] = answer
    assert tool(*words, "/dev/x") == (0, output, "")


def hashed(tool: Tool) -> list[bytes]:
    assert tool.tpm.requests[0][0] is PtmCommand.PTM_HASH_START
    assert tool.tpm.requests[-1][0] is PtmCommand.PTM_HASH_END
    return [body.data for _, body in tool.tpm.requests if isinstance(body, ptm.PtmHashDataRequest)]


@pytest.mark.parametrize(("data", "sizes"), [("", []), ("abc", [3]), ("a" * 5000, [4096, 904])])
def test_hash_of_a_word(tool: Tool, data: str, sizes: list[int]) -> None:
    assert tool("-h", data, "/dev/x") == (0, "", "")
    assert [len(chunk) for chunk in hashed(tool)] == sizes


@pytest.mark.parametrize(("size", "sizes"), [(0, [0]), (10, [10]), (8192, [4096, 4096, 0])])
def test_hash_of_standard_input(
    tool: Tool, monkeypatch: pytest.MonkeyPatch, size: int, sizes: list[int]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(bytes(size))))
    assert tool("-h", "-", "/dev/x") == (0, "", "")
    assert [len(chunk) for chunk in hashed(tool)] == sizes


def test_a_refused_request_names_its_result(tool: Tool) -> None:
    tool.tpm.answers[PtmCommand.PTM_HASH_DATA] = ptm.PtmResultResponse(0x1A)
    assert tool("-h", "x", "/dev/x") == (1, "", "TPM result from PTM_HASH_DATA: 0x1a\n")


def test_a_request_that_cannot_be_made_names_the_reason(tool: Tool) -> None:
    tool.tpm.answers[PtmCommand.PTM_STOP] = OSError(25, "Inappropriate ioctl for device")
    tool.tpm.answers[PtmCommand.PTM_GET_CONFIG] = WireError("PtmConfigResponse", 8, 4)
    said = "Could not execute PTM_STOP: Inappropriate ioctl for device\n"
    assert tool("--stop", "/dev/x") == (1, "", said)
    said = "Could not execute PTM_GET_CONFIG: PtmConfigResponse: 8 bytes needed, 4 there\n"
    assert tool("-g", "/dev/x") == (1, "", said)


def test_save_and_load(tool: Tool, tmp_path: Path) -> None:
    path = tmp_path / "blob"
    tool.tpm.blobs[PtmBlobType.PTM_BLOB_TYPE_VOLATILE] = b"state"
    assert tool("--save", "volatile", str(path), "/dev/x") == (0, "", "")
    assert tool.tpm.requests[0][1] == ptm.PtmGetStateRequest(1, 2, 0)
    assert path.read_bytes() == b"state"
    assert path.stat().st_mode & 0o777 == 0o600
    assert tool("--load", "permanent", str(path), "/dev/x") == (0, "", "")
    assert tool.tpm.blobs[PtmBlobType.PTM_BLOB_TYPE_PERMANENT] == b"state"


@pytest.mark.parametrize("there", [True, False])
def test_save_follows_no_link(tool: Tool, tmp_path: Path, there: bool) -> None:
    link, path = tmp_path / "link", tmp_path / "blob"
    link.symlink_to("blob")
    if there:
        path.write_bytes(b"earlier")
    tool.tpm.blobs[PtmBlobType.PTM_BLOB_TYPE_PERMANENT] = b"seeds"
    complaint = f"Could not open file '{link}' for writing: it is a symbolic link\n"
    assert tool("--save", "permanent", str(link), "/dev/x") == (1, "", complaint)
    assert link.is_symlink()
    assert path.exists() is there
    assert not there or path.read_bytes() == b"earlier"


@pytest.mark.parametrize("command", ["--save", "--load"])
def test_nobody_looks_into_a_process_that_has_a_state(
    command: str, tool: Tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests_before: list[int] = []
    monkeypatch.setattr(
        secrecy, "hide_process", lambda: requests_before.append(len(tool.tpm.requests))
    )
    tool.tpm.blobs[PtmBlobType.PTM_BLOB_TYPE_PERMANENT] = b"seeds"
    (tmp_path / "blob").write_bytes(b"seeds")
    assert tool(command, "permanent", str(tmp_path / "blob"), "/dev/x") == (0, "", "")
    assert requests_before == [0]


@pytest.mark.parametrize("command", ["--save", "--load"])
def test_a_pipe_in_place_of_a_state_is_not_waited_for(
    command: str, tool: Tool, tmp_path: Path
) -> None:
    tool.tpm.blobs[PtmBlobType.PTM_BLOB_TYPE_PERMANENT] = b"seeds"
    os.mkfifo(tmp_path / "pipe")
    status, output, errors = tool(command, "permanent", str(tmp_path / "pipe"), "/dev/x")
    assert (status, output) == (1, "")
    assert "it is a pipe that nobody" in errors


def test_a_saved_state_is_as_private_as_the_file_that_was_there(tool: Tool, tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"earlier")
    (tmp_path / "blob").chmod(0o640)
    tool.tpm.blobs[PtmBlobType.PTM_BLOB_TYPE_PERMANENT] = b"seeds"
    assert tool("--save", "permanent", str(tmp_path / "blob"), "/dev/x") == (0, "", "")
    assert (tmp_path / "blob").stat().st_mode & 0o777 == 0o640


def test_saving_what_does_not_exist_leaves_an_empty_file(tool: Tool, tmp_path: Path) -> None:
    path = tmp_path / "blob"
    tool.tpm.answers[PtmCommand.PTM_GET_STATEBLOB] = ptm.PtmResultResponse(0x800)
    assert tool("--save", "savestate", str(path), "/dev/x") == (0, "", "")
    assert path.read_bytes() == b""


def test_a_failed_save_keeps_the_earlier_file(tool: Tool, tmp_path: Path) -> None:
    path = tmp_path / "blob"
    path.write_bytes(b"earlier")
    tool.tpm.answers[PtmCommand.PTM_GET_STATEBLOB] = ptm.PtmResultResponse(0xA)
    said = "TPM result from PTM_GET_STATEBLOB: 0xa\n"
    assert tool("--save", "permanent", str(path), "/dev/x") == (1, "", said)
    assert path.read_bytes() == b"earlier"


@pytest.mark.parametrize("word", ["--c", "-sto", "--st", "-save", "--lock"])
def test_a_command_in_another_spelling_is_answered_by_help(tool: Tool, word: str) -> None:
    values = {"-save": ["permanent", "f"], "--lock": ["1"]}.get(word, [])
    status, out, err = tool(word, *values, "/dev/x")
    assert (status, err, tool.tpm.requests) == (1, "", [])
    assert "Usage: swtpm_ioctl COMMAND DEVICE" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "No valid command."),
        (["/dev/x"], "No valid command."),
        (["-c"], "Error: Missing device name."),
        (["-c", "-i"], "Only one command may be given."),
        (["--foo", "/x"], "swtpm_ioctl: unrecognized option '--foo'\nNo valid command."),
        (["-l"], "swtpm_ioctl: option '-l' requires an argument\nNo valid command."),
        (["-l", "x"], "Could not get locality number from x."),
        (["-r", ""], "Could not get locality number from ."),
        (["-l", "5"], "Locality outside valid range of [0..4]."),
        (["-l", "-1"], "Locality outside valid range of [0..4]."),
        (["-b", "x"], "Could not get buffersize from x."),
        (["--info", "1x"], "Cannot parse info flags."),
        (["--lock-storage", "x"], "Could not parse lock retries from x."),
        (["--save", "volatile"], "Missing filename argument for --save option"),
        (["--load", "volatile", "-c"], "Missing filename argument for --load option"),
        (["-c", "--tcp", ":x"], "Invalid port 'x'"),
        (["-c", "--tcp", "h:"], "Invalid port ''"),
        (["-c", "--tcp", ":65536"], "Port '65536' outside valid range."),
        (["-c", "--tcp", ":1"], "Could not connect to host '127.0.0.1' on port '1' using TCP "
         "socket: Connection refused"),
        (["-c", "--unix", "/no/x"], "Connect failed: No such file or directory"),
        (["-c", "--unix", "x" * 108], "Socket path is too long."),
        (["-c", "/no/x"], "Unable to open device '/no/x'. No such file or directory"),
        (["-c", "--tpm-device", "/no/x", "--unix", "/no/y"], "Unable to open device '/no/x'. No "
         "such file or directory"),
        (["-c", "--tpm-device", "", "/dev/null"], "Unable to open device ''. No such file or "
         "directory"),
        (["-c", "/dev/null"], "Could not execute PTM_GET_CAPABILITY: Inappropriate ioctl for "
         "device"),
        (["--save", "foo", "f", "/dev/null"], "Unknown TPM state type 'foo'"),
        (["--load", "foo", "f", "/dev/null"], "Unknown TPM state type 'foo'"),
        (["--load", "volatile", "/no/x", "/dev/null"], "Could not open file '/no/x' for reading: "
         "No such file or directory"),
    ],
)  # fmt: skip
def test_errors(unconnected: Tool, words: list[str], said: str) -> None:
    assert unconnected(*words) == (1, "", said + "\n")


def test_a_file_is_not_taken_for_a_device(unconnected: Tool, tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_bytes(b"precious")
    said = f"Unable to open device '{path}'. Neither a character device nor a TPM\n"
    assert unconnected("-c", str(path)) == (1, "", said)
    assert path.read_bytes() == b"precious"


@pytest.mark.parametrize(
    ("target", "host_and_port"),
    [
        ("host", ("host", 6546)),
        (":", ("127.0.0.1", 6546)),
        (":010", ("127.0.0.1", 10)),
        ("host:1x", ("host", 1)),
        ("[::1]:5", ("::1", 5)),
        ("::1:5", ("::1", 5)),
    ],
)
def test_tcp_targets(target: str, host_and_port: tuple[str, int]) -> None:
    assert split_tcp(target, 6546) == host_and_port


@pytest.mark.parametrize(
    ("text", "size"), [(None, 0), ("4096", 4096), ("0", 1), ("-5", 1), ("x", 1), ("", 1)]
)
def test_buffer_size(monkeypatch: pytest.MonkeyPatch, text: str | None, size: int) -> None:
    monkeypatch.delenv("SWTPM_IOCTL_BUFFERSIZE", raising=False)
    if text is not None:
        monkeypatch.setenv("SWTPM_IOCTL_BUFFERSIZE", text)
    assert swtpm_ioctl._buffer_size() == size


def test_help_fits_a_terminal(tool: Tool) -> None:
    _, out, _ = tool("--help")
    assert all(len(row) <= 80 for row in out.splitlines())
    assert "Examples:" in out


@pytest.mark.parametrize("text", ["9" * 30, "4294967296", str(1 << 62)])
def test_a_buffer_size_that_no_memory_has_is_cut(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWTPM_IOCTL_BUFFERSIZE", text)
    assert 0 < swtpm_ioctl._buffer_size() <= 1 << 20


def test_a_hostile_text_is_shown_and_not_obeyed(tool: Tool) -> None:
    text = "{\t'\x1b[2J\x07\u009b1m\r\n}".encode()
    tool.tpm.answers[PtmCommand.PTM_GET_INFO] = ptm.PtmInfoResponse(0, len(text), len(text), text)
    shown = "{\t'\\u001b[2J\\u0007\\u009b1m\\u000d\n}\n"
    assert tool("--info", "1", "/dev/x") == (0, shown, "")
