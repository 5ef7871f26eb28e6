"""Each parser under its kept inputs and some hundred relatives of them; and the harness itself.

``./setup fuzz`` goes on from here for as long as one likes.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Final

import pytest

from tests.fuzz import __main__ as long_run
from tests.fuzz import explore
from tests.fuzz.harness import (
    CORPUS,
    Target,
    TooSlow,
    attempt,
    bounded_memory,
    corpus_of,
    mutations,
    taken,
)
from tests.fuzz.pieces import joined, pieces
from tests.fuzz.targets import TARGETS
from vtpm_cuse.errors import WireError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

QUICK: Final = 0.05


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Parsers tell the log what they refuse; here that would be all there is to read."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("name", TARGETS)
def test_kept_inputs_and_their_relatives(name: str) -> None:
    target, corpus = TARGETS[name], corpus_of(name)
    with bounded_memory():
        for entry, data in corpus.items():
            assert attempt(target, data) is None, entry
        for data in mutations(list(corpus.values()), target.words, target.rounds):
            finding = attempt(target, data)
            assert finding is None, f"{name}: {data!r}: {finding!r}"


@pytest.mark.parametrize("name", TARGETS)
def test_kept_inputs_get_past_the_first_check(name: str) -> None:
    assert any(taken(TARGETS[name], data) for data in corpus_of(name).values())


def test_every_target_has_kept_inputs_and_no_other() -> None:
    assert sorted(path.name for path in CORPUS.iterdir()) == sorted(TARGETS)
    for name in TARGETS:
        assert sum(map(len, corpus_of(name).values())) < 8192, name


# -- the harness --------------------------------------------------------------------------


def sound(data: bytes) -> None:
    """A parser that is right: a length, and so many bytes."""
    if len(data) != data[0] + 1 if data else True:
        raise WireError("bytes", 1, len(data))


def wrong_exception(data: bytes) -> None:
    if data[:1] == b"\x04":
        data[9]


def wrong_round_trip(data: bytes) -> None:
    sound(data)
    assert data.lower() == data


def no_end(data: bytes) -> None:
    while len(data) > data[0]:
        pass


def no_bound(data: bytes) -> None:
    bytes(int.from_bytes(data[:4], "big"))


def swallows_everything(data: bytes) -> None:
    while data:
        with contextlib.suppress(Exception):
            int(data)


@pytest.mark.parametrize(
    ("broken", "found"),
    [
        (wrong_exception, IndexError),
        (wrong_round_trip, AssertionError),
        (no_end, TooSlow),
        (no_bound, MemoryError),
        (swallows_everything, TooSlow),
    ],
)
def test_a_broken_parser_is_found(broken: Target, found: type[BaseException]) -> None:
    target = Target(broken, (WireError,))  # type: ignore[arg-type]
    inputs = [b"\x04abcd", b"\x01Z", *mutations([b"\x04abcd", b"\x01Z"], (), 300)]
    with bounded_memory(1 << 26):
        findings = (attempt(target, data, QUICK) for data in inputs)
        assert any(isinstance(finding, found) for finding in findings)


def test_a_sound_parser_is_left_in_peace() -> None:
    target = Target(sound, (WireError,))
    results = {taken(target, data) for data in mutations([b"\x04abcd"], (b"\0",), 300)}
    assert results == {True, False}


def test_mutations_are_the_same_in_every_run() -> None:
    inputs = [b"some", b"bytes"]
    assert list(mutations(inputs, (b"word",), 50)) == list(mutations(inputs, (b"word",), 50))
    assert len(set(mutations(inputs, (), 200))) > 100


@pytest.mark.parametrize("data", [b"", b"\0", b"\0\3abc", b"\0\0\0\1a", b"\xff\xffabc"])
def test_pieces_of_any_input(data: bytes) -> None:
    found = list(pieces(data))
    assert joined(*found)[: len(data)].endswith(found[-1] if found else b"")
    assert list(pieces(joined(*found))) == found


# -- the long run -------------------------------------------------------------------------


def test_the_long_run_tells_a_crasher_and_how_to_see_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a child that finds something, as `explore` does."""
    monkeypatch.setattr(long_run, "FOUND", tmp_path)
    monkeypatch.setattr(long_run, "ROOT", tmp_path)
    package = tmp_path / "tests" / "fuzz"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    (package / "explore.py").write_text(
        "import sys\n"
        "print('#17', file=sys.stderr)\n"
        "open(sys.argv[3] + '/crash-1', 'w').close()\n"
        "sys.exit(77)\n"
    )
    assert long_run.main(["0.1", "linear"]) == 1
    said = capsys.readouterr().err
    assert "17 executions" in said
    assert "tests.fuzz.explore linear linear/crash-1" in said
    assert "found something in linear" in said


@pytest.mark.parametrize("words", [["1", "nonsense"], ["nonsense"], ["-1"]])
def test_the_long_run_names_the_targets(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert long_run.main(words) == 2
    assert "there are attributes bios" in capsys.readouterr().err


def test_the_long_run_ends_at_ctrl_c() -> None:
    command = [sys.executable, "-m", "tests.fuzz", "9", "linear"]
    with subprocess.Popen(command, cwd=long_run.ROOT, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        assert b"1 targets" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
        assert process.wait() == 130
    assert said.endswith(b"ended by SIGINT\n")
    assert b"Traceback" not in said


@pytest.mark.parametrize("name", ["linear", "options"])
def test_one_input_is_tried_again(name: str) -> None:
    for path in (CORPUS / name).iterdir():
        command = [sys.executable, "-m", "tests.fuzz.explore", name, str(path)]
        done = subprocess.run(command, cwd=long_run.ROOT, capture_output=True, check=False)
        assert (done.returncode, done.stderr) == (0, b"")
        break


def test_without_atheris_the_long_run_is_blind_but_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert explore._with_mutations("names", 0, tmp_path) == 0
    assert not list(tmp_path.iterdir())
    monkeypatch.setitem(TARGETS, "names", Target(wrong_exception))
    monkeypatch.setattr(explore, "corpus_of", lambda _name: {"one": b"\x04abcd"})
    with pytest.raises(IndexError):
        explore._with_mutations("names", 0, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["crash-0"]
