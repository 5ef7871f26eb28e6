"""swtpm_ioctl on a device: ours and the C suite's of Debian do and say the same."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.kernel.harness import (
    OUR_IOCTL,
    PEER_IOCTL,
    PTM_CANCEL_TPM_CMD,
    PTM_INIT,
    PTM_SET_LOCALITY,
    PTM_STOP,
    Background,
    Done,
    exchange,
    needs,
    opened,
    ptm_result,
    run,
    seeded,
    u32,
)
from tests.support.commands import (
    NV_INDEX,
    TPM2_STARTUP_CLEAR,
    code_of,
    nv_data,
    nv_define,
    nv_read,
    nv_write,
    pcr_extend,
    pcr_read,
    pcr_value,
)

if TYPE_CHECKING:
    from tests.kernel.conftest import Serve
    from tests.kernel.harness import Server

pytestmark = pytest.mark.usefixtures("warm")

TRANSFERS = {"ioctl": {}, "read and write": {"SWTPM_IOCTL_BUFFERSIZE": "1000"}}


@pytest.fixture(scope="module", params=[OUR_IOCTL, PEER_IOCTL], ids=["ours", "peer"])
def tool(request: pytest.FixtureRequest) -> str:
    path: str = request.param
    needs(os.access(path, os.X_OK), f"{path} is missing: apt-get install swtpm-tools")
    return path


@pytest.fixture(scope="module")
def server(module_serve: Serve) -> Server:
    return module_serve("vtpmctl", flags="").start()


def stopped(server: Server) -> None:
    with opened(server.device) as fd:
        assert ptm_result(fd, PTM_STOP) == 0
        assert ptm_result(fd, PTM_SET_LOCALITY, bytes([0])) == 0


def running(server: Server) -> None:
    """Freshly started: nothing measured, locality 0."""
    with opened(server.device) as fd:
        assert ptm_result(fd, PTM_SET_LOCALITY, bytes([0])) == 0
        for _ in range(2):  # the first one resumes from a stored volatile state and removes it
            assert ptm_result(fd, PTM_INIT, u32(1)) == 0
        assert code_of(exchange(fd, TPM2_STARTUP_CLEAR)) == 0


def pcr(server: Server, number: int) -> bytes:
    with opened(server.device) as fd:
        return pcr_value(exchange(fd, pcr_read(number)))


# -- one row, one command -----------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A command, the TPM's state before, and what comes of it.

    Attributes:
        words: The command line without the device.
        runs: Whether the TPM has been started before.
        status: Exit status.
        out: Standard output.
        err: Standard error.
        stdin: Standard input.
    """

    words: tuple[str, ...]
    runs: bool
    status: int = 0
    out: str = ""
    err: str = ""
    stdin: bytes = b""


def refused(request: str, result: str) -> str:
    return f"TPM result from {request}: {result}\n"


SIZES = "TPM buffersize: {}\nminimum size  : 2808\nmaximum size  : 4096\n"
ROWS = [
    Row(("-c",), False, out="ptm capability is 0x16fff\n"),
    Row(("-c",), True, out="ptm capability is 0x16fff\n"),
    Row(("-i",), False),
    Row(("-i",), True),
    Row(("-e",), True, out="tpmEstablished is 0\n"),
    Row(("-e",), False, 1, err=refused("PTM_GET_TPMESTABLISHED", "0xa")),
    *(Row(("-l", str(locality)), True) for locality in range(5)),
    Row(("-l", "4"), False),
    Row(("-l", "5"), True, 1, err="Locality outside valid range of [0..4].\n"),
    Row(("-l", "x"), True, 1, err="Could not get locality number from x.\n"),
    Row(("-h", "some data"), True),
    Row(("-h", "-"), True, stdin=b"some data"),
    Row(("-h", "-"), True, stdin=bytes(10_000)),
    Row(("-h", "-"), True),
    Row(("-h", "some data"), False, 1, err=refused("PTM_HASH_START", "0xa")),
    Row(("-r", "3"), True),
    Row(("-r", "4"), True),
    Row(("-r", "2"), True, 1, err=refused("PTM_RESET_TPMESTABLISHED", "0x3d")),
    Row(("-r", "3"), False, 1, err=refused("PTM_RESET_TPMESTABLISHED", "0xa")),
    Row(("-v",), True),
    Row(("-v",), False, 1, err=refused("PTM_STORE_VOLATILE", "0xa")),
    Row(("-C",), True),
    Row(("-C",), False, 1, err=refused("PTM_CANCEL_TPM_CMD", "0xa")),
    Row(("-g",), True, out="ptm configuration flags: 0x0\n"),
    Row(("-g",), False, out="ptm configuration flags: 0x0\n"),
    Row(("-b", "0"), True, out=SIZES.format(4096)),
    Row(("-b", "0"), False, out=SIZES.format(4096)),
    Row(("-b", "100"), True, 1, err=refused("PTM_SET_BUFFERSIZE", "0xa")),
    Row(("-b", "100"), False, out=SIZES.format(2808)),
    Row(("-b", "10000"), False, out=SIZES.format(4096)),
    Row(("--info", "0"), True, out="{}\n"),
    Row(("--stop",), True),
    Row(("--stop",), False),
    Row(("--save", "permanent", "/dev/null"), False, 1, err=refused("PTM_GET_STATEBLOB", "0xa")),
    Row(("--save", "savestate", "/dev/null"), True),
    Row(("--save", "nonsense", "/dev/null"), True, 1, err="Unknown TPM state type 'nonsense'"),
    Row(("--load", "volatile", __file__), True, 1, err=refused("PTM_SET_STATEBLOB", "0xa")),
    Row(("--load", "permanent", "/dev/null"), False),
    Row(("--load", "volatile", "/dev/null"), False),
]


@pytest.mark.parametrize(
    "row", ROWS, ids=lambda row: " ".join(row.words[:2]) + (" running" if row.runs else " stopped")
)
def test_command(server: Server, tool: str, row: Row) -> None:
    (running if row.runs else stopped)(server)
    done = run(tool, *row.words, server.device, status=None, stdin=row.stdin)
    # The C suite's tool does not end each of its messages with a newline.
    assert (done.status, done.stdout, done.stderr.rstrip()) == (
        row.status,
        row.out,
        row.err.rstrip(),
    )


def test_lock_storage(server: Server) -> None:
    """The C suite's tool of Debian 12 does not know it yet."""
    running(server)
    run(OUR_IOCTL, "--lock-storage", "3", server.device)


@pytest.mark.parametrize("spelling", ["last", "first", "option"])
def test_device_argument(server: Server, tool: str, spelling: str) -> None:
    device = str(server.device)
    words = {
        "last": ["-c", device],
        "first": [device, "-c"],
        "option": ["-c", "--tpm-device", device],
    }
    assert run(tool, *words[spelling]).stdout == "ptm capability is 0x16fff\n"


def test_no_device(tool: str) -> None:
    done = run(tool, "-c", "/dev/no-such-vtpm", status=1)
    assert done.stderr.startswith("Unable to open device '/dev/no-such-vtpm'.")


def test_device_in_use(server: Server, tool: str) -> None:
    with opened(server.device):
        done = run(tool, "-c", server.device, status=1)
    assert done.stderr.startswith(f"Unable to open device '{server.device}'.")


# -- what the commands do -----------------------------------------------------------------


def test_hash_measures_and_sets_the_established_bit(server: Server, tool: str) -> None:
    """H-CRTM after Startup: PCR 17 holds SHA-256 of zeros and the digest; -r 3 clears the bit."""
    running(server)
    run(tool, "-h", "-", server.device, stdin=b"x" * 5000)
    digest = hashlib.sha256(b"x" * 5000).digest()
    assert pcr(server, 17) == hashlib.sha256(bytes(32) + digest).digest()
    assert run(tool, "-e", server.device).stdout == "tpmEstablished is 1\n"
    run(tool, "-r", "0", server.device, status=1)
    assert run(tool, "-e", server.device).stdout == "tpmEstablished is 1\n"
    run(tool, "-r", "3", server.device)
    assert run(tool, "-e", server.device).stdout == "tpmEstablished is 0\n"


def test_locality_holds(server: Server, tool: str) -> None:
    running(server)
    run(tool, "-l", "1", server.device)
    run(tool, "-i", server.device)
    with opened(server.device) as fd:
        assert code_of(exchange(fd, TPM2_STARTUP_CLEAR)) == 0x907
    run(tool, "-l", "0", server.device)
    with opened(server.device) as fd:
        assert code_of(exchange(fd, TPM2_STARTUP_CLEAR)) == 0


def test_buffer_size_after_init(server: Server, tool: str) -> None:
    stopped(server)
    run(tool, "-b", "3000", server.device)
    try:
        run(tool, "-i", server.device)
        assert "TPM buffersize: 3000\n" in run(tool, "-b", "0", server.device).stdout
    finally:
        run(tool, "--stop", server.device)
        run(tool, "-b", "4096", server.device)


INFO = re.compile(r'\{"TPMSpecification":\{"family":"2\.0","level":0,"revision":\d+\}\}\n')


def test_info(server: Server, tool: str) -> None:
    stopped(server)
    assert INFO.fullmatch(run(tool, "--info", "1", server.device).stdout)
    everything = run(tool, "--info", "0xff", server.device).stdout
    assert everything == run(OUR_IOCTL, "--info", "255", server.device).stdout
    assert '"TPMAttributes"' in everything
    assert run(tool, "--info", "x", server.device, status=1).stderr == "Cannot parse info flags.\n"


def test_cancel_nothing(server: Server, tool: str) -> None:
    """A cancellation without a command must not hit the next one."""
    running(server)
    run(tool, "-C", server.device)
    with opened(server.device) as fd:
        assert code_of(exchange(fd, pcr_extend(16, bytes(32)))) == 0


def test_volatile_store(server: Server, tool: str) -> None:
    """-v writes the file; -i resumes from it, with the PCRs and without a Startup, and removes it."""
    running(server)
    with opened(server.device) as fd:
        assert code_of(exchange(fd, pcr_extend(10, b"\x22" * 32))) == 0
    before = pcr(server, 10)
    run(tool, "-v", server.device)
    stored = server.state / "tpm2-00.volatilestate"
    assert stored.stat().st_size > 1000
    run(tool, "-i", server.device)
    assert not stored.exists()
    assert pcr(server, 10) == before
    run(tool, "-i", server.device)
    with opened(server.device) as fd:
        assert code_of(exchange(fd, pcr_read(10))) == 0x100


# -- state blobs --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large_blob_server(module_serve: Serve) -> Server:
    """With a permanent state of more than one ioctl's 3072 bytes."""
    server = module_serve("vtpmbig", flags="").start()
    running(server)
    with opened(server.device) as fd:
        for number in range(2):
            assert code_of(exchange(fd, nv_define(NV_INDEX + number, 2000))) == 0
            data = seeded(number).randbytes(1000)
            assert code_of(exchange(fd, nv_write(NV_INDEX + number, data))) == 0
    return server


@pytest.mark.parametrize("transfer", TRANSFERS)
def test_save_and_load(large_blob_server: Server, tool: str, transfer: str, tmp_path: Path) -> None:
    """Every type goes out and in again, by ioctl or by read() and write()."""
    server, env = large_blob_server, TRANSFERS[transfer]
    running(server)
    with opened(server.device) as fd:
        assert code_of(exchange(fd, pcr_extend(11, b"\x33" * 32))) == 0
        contents = nv_data(exchange(fd, nv_read(NV_INDEX + 1, 1000)))
    before = pcr(server, 11)
    files = {kind: tmp_path / kind for kind in ("permanent", "volatile", "savestate")}
    for kind, file in files.items():
        run(tool, "--save", kind, file, server.device, env=env)
    assert files["permanent"].read_bytes()[:4] == bytes.fromhex("0201000a")
    assert files["permanent"].stat().st_size > 3072
    assert files["volatile"].stat().st_size > 3072
    assert files["savestate"].read_bytes() == b""
    assert files["permanent"].stat().st_mode & 0o777 == 0o600

    run(tool, "--stop", server.device)
    for kind, file in files.items():
        run(tool, "--load", kind, file, server.device, env=env)
    run(tool, "-i", server.device)
    assert pcr(server, 11) == before
    with opened(server.device) as fd:
        assert nv_data(exchange(fd, nv_read(NV_INDEX + 1, 1000))) == contents
    again = tmp_path / "again"
    run(tool, "--save", "permanent", again, server.device, env=env)
    assert again.stat().st_size == files["permanent"].stat().st_size


def test_both_tools_save_the_same(large_blob_server: Server, tmp_path: Path) -> None:
    """Four ways out, one blob."""
    needs(os.access(PEER_IOCTL, os.X_OK), "swtpm-tools are missing")
    running(large_blob_server)
    blobs = set()
    for tool in (OUR_IOCTL, PEER_IOCTL):
        for env in TRANSFERS.values():
            run(tool, "--save", "permanent", tmp_path / "x", large_blob_server.device, env=env)
            blobs.add((tmp_path / "x").read_bytes())
    assert len(blobs) == 1


def test_a_new_save_is_not_an_old_snapshot(large_blob_server: Server, tmp_path: Path) -> None:
    server = large_blob_server
    running(server)
    first, second = tmp_path / "first", tmp_path / "second"
    run(OUR_IOCTL, "--save", "permanent", first, server.device)
    with opened(server.device) as fd:
        assert code_of(exchange(fd, nv_write(NV_INDEX, b"changed"))) == 0
    run(OUR_IOCTL, "--save", "permanent", second, server.device)
    assert first.read_bytes() != second.read_bytes()


@pytest.mark.parametrize("transfer", TRANSFERS)
def test_load_refuses_what_is_no_blob(
    server: Server, tool: str, transfer: str, tmp_path: Path
) -> None:
    env = TRANSFERS[transfer]
    text = tmp_path / "text"
    text.write_text("this is not a state blob, but it is long enough to be looked at")
    stopped(server)
    done = run(tool, "--load", "permanent", text, server.device, status=1, env=env)
    assert done.stderr == refused("PTM_SET_STATEBLOB", "0x3")
    run(tool, "-i", server.device)


def test_load_refuses_the_wrong_type(server: Server, tool: str, tmp_path: Path) -> None:
    running(server)
    run(tool, "--save", "volatile", tmp_path / "volatile", server.device)
    run(tool, "--stop", server.device)
    volatile = (tmp_path / "volatile", server.device)
    permanent = run(tool, "--load", "permanent", *volatile, status=1)
    assert permanent.stderr.startswith("TPM result from PTM_SET_STATEBLOB: 0x")
    savestate = run(tool, "--load", "savestate", *volatile, status=1)
    assert savestate.stderr == refused("PTM_SET_STATEBLOB", "0x34")
    run(tool, "-i", server.device)


# -- cancel and shutdown ------------------------------------------------------------------


def test_cancel_needs_the_open_device(server: Server, tool: str) -> None:
    """One open at a time: the tool is refused while a client waits; on its descriptor it works."""
    running(server)
    with opened(server.device) as fd:
        run(tool, "-C", server.device, status=1)
        assert ptm_result(fd, PTM_CANCEL_TPM_CMD) == 0


def test_shutdown(serve: Serve, tool: str) -> None:
    server = serve("vtpmend").start()
    done: Done = run(tool, "-s", server.device)
    assert (done.stdout, done.stderr) == ("", "")
    server.gone()
    assert not Path(server.device).exists()


def test_shutdown_ends_by_the_last_close(serve: Serve) -> None:
    """The requester may keep the device open for a moment; it is not kept waiting for ever."""
    server = serve("vtpmend", flags="").start()
    with opened(server.device) as fd:
        answer = Background(lambda: ptm_result(fd, 0x80045002))
        assert answer.result() == 0
        server.gone()
