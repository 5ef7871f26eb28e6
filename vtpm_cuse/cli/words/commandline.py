"""The command line of a program, checked against its table."""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, Final

from vtpm_cuse.cli.words import suboptions
from vtpm_cuse.cli.words.getopt import Complaint, Getopt, Operand
from vtpm_cuse.cli.words.help import help_text
from vtpm_cuse.cli.words.numbers import FD_MAX, number
from vtpm_cuse.cli.words.program import complain
from vtpm_cuse.cli.words.table import Lenient
from vtpm_cuse.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vtpm_cuse.cli.words.getopt import Given
    from vtpm_cuse.cli.words.suboptions import SubValues
    from vtpm_cuse.cli.words.table import Option, Program

_DESCRIPTORS: Final = ("fd", "clientfd", "pwdfd")
"""Sub-options whose value is one, of whatever option."""


class CuseExit(IntEnum):
    """Exit statuses by which callers of the C suite's CUSE program tell errors apart."""

    BAD_VALUE = 255
    NO_NAME = 254
    BAD_SUBOPTION = 253
    NOT_ROOT = 252
    NO_USER = 251


class CommandLine:
    """What was given on a command line; sub-options are read when asked for."""

    def __init__(
        self,
        program: Program,
        words: Sequence[str],
        name: str = "",
        look_at: Callable[[Given], None] = lambda _: None,
    ) -> None:
        """Reads *words*.

        Args:
            program: Its table; it says, too, what is left out of account (`Lenient`).
            words: What follows the program's name.
            name: How the program was called, if by another name.
            look_at: Is given each option as it is read; what it raises ends the reading.

        Raises:
            UsageError: An option lacks its value, is ambiguous or not available yet, or a word
                is no option.
        """
        self.program, self._name = program, name or program.name
        self._table = {option.name: option for option in program.options}
        self._given: dict[str, list[str]] = {}
        self._subs: dict[str, SubValues] = {}
        self.operands: list[str] = []
        words_of = Getopt(
            self._name.removeprefix("swtpm "),  # the C suite's are called so
            words,
            program.options,
            long_only=program.long_only,
            in_order=program.runs,
        )
        for item in words_of:
            if isinstance(item, Operand):
                self.operands.append(item.word)
            elif isinstance(item, Complaint):
                self._complain(item)
            else:
                option = self._table[item.name]
                self._take(option, item.value or "")
                look_at(item)
                if option.ends:
                    break
        # Help is given whatever else was said.
        takes_operands = program.operands or Lenient.OPERANDS in program.lenient
        if self.operands and not (takes_operands or self.has("help") or self.has("version")):
            raise UsageError(f"Unknown parameter '{self.operands[0]}'")

    def knows(self, name: str) -> bool:
        """Whether the program has such an option."""
        return name in self._table

    def has(self, name: str) -> bool:
        """Whether the option was given."""
        return name in self._given

    def value(self, name: str) -> str | None:
        """The value of an option that takes one word; the one that counts, if it was repeated."""
        return self._given[name][-1] if name in self._given else None

    def values(self, name: str) -> list[str]:
        """All values of an option that may be repeated, in their order."""
        return list(self._given.get(name, ()))

    def subs(self, name: str) -> SubValues | None:
        """The sub-options of an option, None if it was not given. Raises UsageError."""
        value = self.value(name)
        if value is None:
            return None
        option = self._table[name]
        if name not in self._subs:
            try:
                self._subs[name] = suboptions.parse(value, option.subs)
            except suboptions.SubOptionError as exc:
                raise self.error(f"Error parsing {option.noun} options: {exc}") from None
        return self._subs[name]

    def look_up(self) -> None:
        """Reads all sub-options, and with them users and groups. Raises UsageError."""
        for name in self._given:
            if self._table[name].subs:
                self.subs(name)

    def descriptors(self) -> set[int]:
        """Those that options name by their numbers. Raises UsageError."""
        found = {number(self.value("fd") or "", 0, FD_MAX, base=10)}
        for name in self._given:
            subs = self.subs(name) if self._table[name].subs else None
            if subs is not None:
                found.update(map(subs.integer, _DESCRIPTORS))
        return {fd for fd in found if fd is not None}

    def last_of(self, *names: str) -> str | None:
        """Which of these options was given last, None if none was."""
        return next((name for name in reversed(self._given) if name in names), None)

    def first_of(self, *names: str) -> str | None:
        """Which of these options, of each of which the first counts, was given first."""
        return next((name for name in self._given if name in names), None)

    def number(self, name: str, highest: int) -> int:
        """The number from 0 to *highest* that an option gives, 0 without it. Raises UsageError."""
        text = self._given.get(name, ["0"])[-1]
        found = number(text, 0, highest)
        if found is None:
            reason = f"Error: '{text}' of option --{name} is not a number from 0 to {highest}"
            raise self.error(reason, self.program.bad_number)
        return found

    def user(self, name: str) -> int | None:
        """The number of the user that an option names, None without it. Raises UsageError."""
        return self._number_of(name, suboptions.user_number)

    def group(self, name: str) -> int | None:
        """The number of the group that an option names, None without it. Raises UsageError."""
        return self._number_of(name, suboptions.group_number)

    def _number_of(self, name: str, find: Callable[[str], int]) -> int | None:
        word = self.value(name)
        try:
            return None if word is None else find(word)
        except suboptions.SubOptionError as exc:
            raise self.error(f"{exc}", self.program.no_user) from None

    def error(self, reason: str, status: int | None = None) -> UsageError:
        """An error in the value of an option, with the exit status that the table has for it."""
        return UsageError(reason, self.program.bad_value if status is None else status)

    def _take(self, option: Option, value: str) -> None:
        if not option.available:
            raise self.error(f"Error: option --{option.name} is not available yet")
        if option.first_counts and option.name in self._given:
            return
        before = self._given.pop(option.name, [])  # the order is that of the last ones
        self._given[option.name] = [*before, value] if option.repeats else [value]

    def _complain(self, complaint: Complaint) -> None:
        # PEER: CUSE goes on after every complaint. We do after an unknown option, which may be one
        # of a later version, but an option that lacks its value would be dropped unnoticed.
        if self.program.shows_help:
            print(help_text(self.program, self._name), end="")
            raise UsageError(complaint.text)
        complain(complaint.text)
        if (Lenient.UNKNOWN if complaint.unknown else Lenient.MISUSED) not in self.program.lenient:
            raise UsageError(f"Try '{self._name} --help' for the options")
