"""The grammar of GNU getopt_long and its sentences, as an iterator without global state.

Long options as ``--name value`` or ``--name=value`` (a value that is optional
may be the next word too, if that is no option), shortened as long as they
are unambiguous; letters alone or in clusters; operands anywhere; ``--`` ends
the options. `Getopt` reports what it meets and neither prints nor decides.

By hand, for scripts know glibc's sentences: getopt and argparse have others, and end at the first
word that does not fit, after which some programs here go on.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vtpm_cuse.cli.words.table import Option


class Given(NamedTuple):
    """An option on the command line.

    Attributes:
        name: Its long name.
        value: Its value, if it has one.
        spelled: The word as typed, without a value.
        second: The second value of an option that takes two, if there is one.
    """

    name: str
    value: str | None
    spelled: str
    second: str | None = None


class Complaint(NamedTuple):
    """A word that does not fit; *unknown* if there is no such option at all."""

    text: str
    unknown: bool


class Operand(NamedTuple):
    """A word that is no option."""

    word: str


class Getopt:
    """Iterates over the words of a command line.

    Args:
        program: Starts each complaint.
        words: What follows the program's name.
        options: The options there are.
        long_only: One dash starts a long option too, and there are no letters.
        in_order: The first operand ends the options.
    """

    def __init__(
        self,
        program: str,
        words: Sequence[str],
        options: Sequence[Option],
        *,
        long_only: bool = False,
        in_order: bool = False,
    ) -> None:
        self._program, self._options, self._long_only = program, options, long_only
        self._in_order = in_order
        self._words = deque(words)

    def __iter__(self) -> Iterator[Given | Complaint | Operand]:
        while self._words:
            word = self._words.popleft()
            if word == "--":
                yield from map(Operand, self._words)
                return
            if word.startswith("--"):
                yield self._long("--", word)
            elif word == "-" or not word.startswith("-"):
                yield Operand(word)
                if self._in_order:
                    yield from map(Operand, self._words)
                    return
            elif self._long_only:
                yield self._long("-", word)
            else:
                yield from self._letters(word[1:])

    def _take_word(self) -> str | None:
        """The next word, if it is no option."""
        if not self._words or self._words[0].startswith("-"):
            return None
        return self._words.popleft()

    def _long(self, dashes: str, word: str) -> Given | Complaint:
        name, equals, value = word.removeprefix(dashes).partition("=")
        found = [option for option in self._options if option.name == name] or [
            option for option in self._options if option.name.startswith(name)
        ]
        if not found:
            return self._complaint(f"unrecognized option '{word}'", unknown=True)
        if len(found) > 1:
            names = " ".join(f"'{dashes}{option.name}'" for option in found)
            return self._complaint(f"option '{word}' is ambiguous; possibilities: {names}")
        (option,) = found
        if not option.takes_value:
            if equals:
                return self._complaint(f"option '{dashes}{option.name}' doesn't allow an argument")
            return Given(option.name, None, word)
        if equals:
            return self._given(option, value, dashes + name)
        if option.optional_value:
            return Given(option.name, self._take_word(), dashes + name)
        if not self._words:
            return self._complaint(f"option '{dashes}{option.name}' requires an argument")
        return self._given(option, self._words.popleft(), dashes + name)

    def _given(self, option: Option, value: str, spelled: str) -> Given:
        second = self._take_word() if " " in option.metavar else None
        return Given(option.name, value, spelled, second)

    def _letters(self, cluster: str) -> Iterator[Given | Complaint]:
        for place, letter in enumerate(cluster, start=1):
            option = next((option for option in self._options if option.letter == letter), None)
            if option is None:
                yield self._complaint(f"invalid option -- '{letter}'", unknown=True)
            elif not option.takes_value:
                yield Given(option.name, None, f"-{letter}")
            else:
                value = cluster[place:] or (self._words.popleft() if self._words else None)
                if value is None:
                    yield self._complaint(f"option requires an argument -- '{letter}'")
                else:
                    yield Given(option.name, value, f"-{letter}")
                return

    def _complaint(self, text: str, *, unknown: bool = False) -> Complaint:
        return Complaint(f"{self._program}: {text}", unknown)
