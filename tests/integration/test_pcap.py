"""Packet captures, as tshark reads them."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from tests.support import sockets as s
from tests.support.commands import get_random

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(shutil.which("tshark") is None, reason="needs tshark")


def tshark(path: Path, *words: str) -> str:
    done = subprocess.run(
        ["tshark", "-r", str(path), *words], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def record(folder: Path, path: Path, *words: str) -> bytes:
    """A short life of a TPM; returns the response to its one command of a client."""
    with s.Server(folder, *s.RUNNING, "--pcap", f"file={path}{''.join(words)}") as server:
        with server.data() as client:
            client.send(get_random(8))
            response = client.exactly(20)
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0
    return response


@pytest.mark.parametrize("checksums", ["", ",checksums"])
def test_conversation(tmp_path: Path, checksums: str) -> None:
    path = tmp_path / "tpm.pcapng"
    response = record(tmp_path, path, checksums)
    assert path.stat().st_mode & 0o777 == 0o640
    check = [
        "-o",
        f"tcp.check_checksum:{bool(checksums)}",
        "-o",
        f"ip.check_checksum:{bool(checksums)}",
    ]
    # Any: what tshark says.
    packets: list[dict[str, Any]] = json.loads(tshark(path, *check, "-T", "json"))
    layers = [packet["_source"]["layers"] for packet in packets]
    flags = [int(layer["tcp"]["tcp.flags"], 16) for layer in layers]
    # Startup, GetRandom and Shutdown with their responses, between handshake and end.
    assert flags == [2, 18, 16, *[24] * 6, 17, 17, 16]
    assert all(layer["tcp"]["tcp.dstport"] == "2321" for layer in layers[3:9:2])
    payloads = [layer["tcp"].get("tcp.payload", "").replace(":", "") for layer in layers]
    assert payloads[5] == get_random(8).hex()
    assert payloads[6] == response.hex()
    assert payloads[7].endswith("00000145" + "0001")  # TPM2_Shutdown(STATE)
    assert tshark(path, *check, "-Y", "_ws.expert").count("\n") <= 5  # notes on SYN and FIN
    assert tshark(path, *check, "-Y", "tcp.analysis.flags || _ws.malformed") == ""
    bad = "tcp.checksum.status == 0 || ip.checksum.status == 0"
    assert tshark(path, *check, "-Y", bad) == ""


def test_appends_unless_truncated(tmp_path: Path) -> None:
    path = tmp_path / "tpm.pcapng"
    counts = []
    for number, words in enumerate(["", "", ",truncate,mode=0600"]):
        record(tmp_path / str(number), path, words)
        counts.append(len(tshark(path).splitlines()))
    assert counts == [12, 24, 12]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("truncate", "The file or fd parameter is required for the pcap option."),
        (
            "file=/no/such/folder/file",
            "Could not open pcap file for writing: No such file or directory",
        ),
        ("fd=999", "Could not open pcap file for writing: Bad file descriptor"),
    ],
)
def test_errors(value: str, reason: str, tmp_path: Path) -> None:
    done = s.run_swtpm("--tpm2", "--tpmstate", f"dir={tmp_path}", *s.RUNNING, "--pcap", value)
    assert done.returncode == 1
    assert reason in done.stderr
    assert not list(tmp_path.iterdir())
