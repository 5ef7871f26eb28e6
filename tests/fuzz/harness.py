"""What every fuzz run stands on: a target, one bounded attempt at it, seeded mutations.

A target takes any bytes. It may refuse them by the exceptions that it documents; whatever else
comes out (another exception, an oracle's AssertionError, no end, no bound of memory) is a finding.
"""

from __future__ import annotations

import contextlib
import random
import resource
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Never

from vtpm_cuse.errors import VtpmError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

CORPUS: Final = Path(__file__).with_name("corpus")
SEED: Final = 20261129
INPUT_MAX: Final = 4096

CPU_SECONDS: Final = 4.0
"""Of the processor's time, which a busy machine does not make longer."""

MEMORY_BYTES: Final = 1 << 29
"""What all attempts together may take besides what the process has."""


@dataclass(frozen=True)
class Target:
    """One parser.

    Attributes:
        run: Feeds it any bytes; asserts what must hold.
        refusals: What it may raise.
        words: Pieces that its input is likely to have.
        rounds: How many mutations the tests try.
    """

    run: Callable[[bytes], None]
    refusals: tuple[type[Exception], ...] = (VtpmError,)
    words: tuple[bytes, ...] = ()
    rounds: int = 2000


class TooSlow(BaseException):
    """The attempt has used up its time; no parser's business to catch."""


def attempt(target: Target, data: bytes, seconds: float = CPU_SECONDS) -> BaseException | None:
    """One input: what was wrong, None if it was taken or refused as it should be."""
    try:
        taken(target, data, seconds)
    except (Exception, TooSlow) as exc:
        return exc
    return None


def taken(target: Target, data: bytes, seconds: float = CPU_SECONDS) -> bool:
    """Whether the target took *data*, and did not refuse it. Raises what is a finding."""
    signal.signal(signal.SIGVTALRM, _too_slow)
    # More than once: an exception that meets a callback of the garbage collector is lost.
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, seconds)
    try:
        target.run(data)
    except target.refusals as exc:
        str(exc)  # somebody will read it
        return False
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    return True


def _too_slow(_number: int, _frame: object) -> Never:
    raise TooSlow("it takes too much of the processor's time")


@contextlib.contextmanager
def bounded_memory(size: int = MEMORY_BYTES) -> Iterator[None]:
    """In here, who takes *size* bytes more than there are now gets a MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def corpus_of(name: str) -> dict[str, bytes]:
    """The kept inputs of a target by their names."""
    return {path.name: path.read_bytes() for path in sorted((CORPUS / name).iterdir())}


def mutations(
    corpus: Sequence[bytes], words: Sequence[bytes], count: int, seed: int = SEED
) -> Iterator[bytes]:
    """So many inputs, the same in every run."""
    chance = random.Random(seed)  # noqa: S311 - repeatable, not secret
    for _ in range(count):
        data = mutated(chance, chance.choice(corpus))
        kind = chance.randrange(4)
        place = chance.randrange(len(data) + 1)
        if kind == 0 and words:
            word = chance.choice(words)
            data = data[:place] + word + data[place + chance.choice((0, len(word))) :]
        elif kind == 1:
            other = chance.choice(corpus)
            data = data[:place] + other[chance.randrange(len(other) + 1) :]
        yield data[:INPUT_MAX]


def mutated(chance: random.Random, seed: bytes) -> bytes:
    """A relative of *seed*: some bytes other, cut off, lengthened; or nothing like it."""
    data = bytearray(seed)
    kind = chance.randrange(8)
    if kind == 0:
        return chance.randbytes(chance.randrange(60))
    if kind <= 4 and data:
        for _ in range(chance.randrange(1, 4)):
            data[chance.randrange(len(data))] = chance.choice(
                (0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256))
            )
    if kind == 5 and data:
        del data[chance.randrange(len(data)) :]
    if kind == 6:
        data += chance.randbytes(chance.randrange(1, 40))
    return bytes(data)
