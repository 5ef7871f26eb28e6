"""One target for long: coverage-guided where atheris is installed, else by seeded mutations.

Usage: ``python -m tests.fuzz.explore TARGET SECONDS FOLDER``; inputs that were of use, and crashers,
go into FOLDER. With a file instead of SECONDS and FOLDER: tries that input alone. Exit status 1
for a finding.
"""

from __future__ import annotations

import itertools
import logging
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from tests.fuzz.harness import (
    INPUT_MAX,
    MEMORY_BYTES,
    TooSlow,
    attempt,
    bounded_memory,
    corpus_of,
    mutations,
    taken,
)

if TYPE_CHECKING:
    from tests.fuzz.harness import Target

FOUND = 1
_BATCH = 1000


def _try_file(target: Target, path: Path) -> int:
    with bounded_memory():
        finding = attempt(target, path.read_bytes())
    if finding is None:
        sys.stdout.write("taken, or refused as it should be\n")
        return 0
    raise finding


def _with_atheris(name: str, seconds: int, folder: Path) -> None:
    """Does not return: libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=["vtpm_cuse"]):
        from tests.fuzz.targets import TARGETS
    target = TARGETS[name]
    words = folder / "words"
    words.write_text("".join(f'"{_escaped(word)}"\n' for word in target.words or (b"\0",)))

    def once(data: bytes) -> None:
        try:
            taken(target, data)
        except TooSlow as exc:
            raise AssertionError(str(exc)) from exc

    flags = {
        "max_total_time": seconds,
        "max_len": INPUT_MAX,
        "timeout": 30,
        "rss_limit_mb": MEMORY_BYTES >> 20,
        "artifact_prefix": f"{folder}/",
        "dict": str(words),
        "print_final_stats": 1,
    }
    grown = folder / "corpus"
    grown.mkdir(exist_ok=True)
    corpus = Path(__file__).with_name("corpus") / name
    given = [f"-{flag}={value}" for flag, value in flags.items()]
    atheris.Setup([sys.argv[0], *given, str(grown), str(corpus)], once)
    atheris.Fuzz()


def _escaped(word: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in word)


def _with_mutations(name: str, seconds: int, folder: Path) -> int:
    from tests.fuzz.targets import TARGETS

    target, corpus = TARGETS[name], list(corpus_of(name).values())
    until, done = time.monotonic() + seconds, 0
    with bounded_memory():
        for seed in itertools.count():
            for data in mutations(corpus, target.words, _BATCH, seed):
                if (finding := attempt(target, data)) is not None:
                    (folder / f"crash-{seed}").write_bytes(data)
                    raise finding
            done += _BATCH
            sys.stderr.write(f"#{done}\n")
            if time.monotonic() > until:
                return 0
    raise AssertionError("unreachable")


def main(words: list[str]) -> int:
    """As the module says."""
    logging.disable()
    name = words[0]
    if len(words) == 2:
        from tests.fuzz.targets import TARGETS

        return _try_file(TARGETS[name], Path(words[1]))
    seconds, folder = int(words[1]), Path(words[2])
    folder.mkdir(parents=True, exist_ok=True)
    if find_spec("atheris") is None:
        return _with_mutations(name, seconds, folder)
    _with_atheris(name, seconds, folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
