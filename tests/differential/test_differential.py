"""The C suite's swtpm and ours, asked the same: the answers are the same, but for what is listed.

Both run on one libtpms, in the folder of Debian unstable: ./kernel-helpers/unstable -- python -m
pytest tests/differential. See also docs/differences.md.
"""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from tests.differential.known import KNOWN
from tests.differential.masks import mask
from tests.differential.servers import OURS, PEER, Server, make_state, started
from tests.differential.sessions import sessions

if TYPE_CHECKING:
    from pathlib import Path

    from tests.differential.exchanges import Session

PEER_VERSION = "0.10.2"


def peer_version() -> str:
    try:
        text = subprocess.run([PEER, "--version"], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return "none"
    return text.stdout.split("version ")[1].split(",")[0]


pytestmark = pytest.mark.skipif(
    peer_version() != PEER_VERSION,
    reason=f"needs the C suite's {PEER_VERSION}: run it by kernel-helpers/unstable",
)

ALL = sessions()


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """TPM 2 or not to a state."""
    folder = tmp_path_factory.mktemp("states")
    return {tpm2: make_state(folder / str(tpm2), tpm2=tpm2) for tpm2 in (True, False)}


def run(session: Session, server: Server) -> tuple[dict[str, bytes], tuple[int, dict[str, int]]]:
    """All answers by name, masked; then how it ended."""
    answers: dict[str, bytes] = {}
    masked = {}
    for exchange in session.exchanges:
        send = exchange.send
        message = send if isinstance(send, bytes) else send(answers)
        answers[exchange.name] = answer = server.exchange(exchange, message)
        masked[exchange.name] = mask(exchange.way, message, answer, tpm2=session.tpm2)
    return masked, server.end()


def shown(answer: bytes) -> str:
    return f"{answer[:100].hex()} ({len(answer)} bytes)"


@pytest.mark.parametrize("session", ALL, ids=lambda session: session.name)
def test_same_answers(session: Session, states: dict[bool, Path], tmp_path: Path) -> None:
    with ExitStack() as stack, ThreadPoolExecutor() as threads:
        state = states[session.tpm2]
        running = []
        for name, program in (("peer", PEER), ("ours", OURS)):
            server = stack.enter_context(started(program, session, tmp_path / name, state))
            running.append(threads.submit(run, session, server))
        (theirs, their_end), (ours, our_end) = (future.result() for future in running)
    names = [exchange.name for exchange in session.exchanges]
    assert len(theirs) == len(names), "names are unique"
    different = {name for name in names if theirs[name] != ours[name]}
    known = {name for where, name in KNOWN if where == session.name}
    report = [
        f"{name}\n  C suite {shown(theirs[name])}\n  ours    {shown(ours[name])}"
        for name in names
        if name in different ^ known
    ]
    assert not report, "\n".join([f"{len(report)} surprises", *report[:60]])
    assert their_end == our_end


def test_some_thousands() -> None:
    assert sum(len(session.exchanges) for session in ALL) > 5000


def test_known_differences_exist() -> None:
    exchanges = {(session.name, exchange.name) for session in ALL for exchange in session.exchanges}
    assert exchanges >= set(KNOWN)
