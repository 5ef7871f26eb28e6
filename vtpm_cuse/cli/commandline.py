"""The command line of one interface, checked against the option table."""

from __future__ import annotations

import sys
from enum import IntEnum
from typing import TYPE_CHECKING, Final

from vtpm_cuse.cli import suboptions
from vtpm_cuse.cli.getopt import Complaint, Getopt, LongOption, Operand
from vtpm_cuse.cli.numbers import number
from vtpm_cuse.cli.options import Interface, options_of
from vtpm_cuse.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vtpm_cuse.cli.options import Option
    from vtpm_cuse.cli.suboptions import SubValues


class CuseExit(IntEnum):
    """Exit statuses by which callers of the C suite's CUSE program tell errors apart."""

    BAD_VALUE = 255
    NO_NAME = 254
    BAD_SUBOPTION = 253
    NOT_ROOT = 252


_ERROR: Final = 1


class CommandLine:
    """The options given for one interface; sub-options are read when asked for."""

    def __init__(self, interface: Interface, program: str, words: Sequence[str]) -> None:
        """Reads *words*.

        Raises:
            UsageError: An option lacks its value, is ambiguous or not available yet, or a word
                is no option. An unknown option is complained about on standard error and ignored.
        """
        self.interface, self._program = interface, program
        self._table = options_of(interface)
        self._given: dict[str, str] = {}
        known = [LongOption(o.name, o.takes_value, o.letter) for o in self._table.values()]
        operands: list[str] = []
        for item in Getopt(program.split()[-1], words, known):
            if isinstance(item, Operand):
                operands.append(item.word)
            elif isinstance(item, Complaint):
                self._complain(item)
            else:
                self._take(self._table[item.name], item.value or "")
        # Help is given whatever else was said.
        if operands and not (self.has("help") or self.has("version")):
            raise UsageError(f"Unknown parameter '{operands[0]}'")

    def has(self, name: str) -> bool:
        """Whether the option was given."""
        return name in self._given

    def value(self, name: str) -> str | None:
        """The value of an option that takes one word."""
        return self._given.get(name)

    def subs(self, name: str) -> SubValues | None:
        """The sub-options of an option, None if it was not given. Raises UsageError."""
        if name not in self._given:
            return None
        option = self._table[name]
        try:
            return suboptions.parse(self._given[name], option.subs)
        except suboptions.SubOptionError as exc:
            raise self.error(f"Error parsing {option.noun} options: {exc}") from None

    def last_of(self, *names: str) -> str | None:
        """Which of these options was given last, None if none was."""
        return next((name for name in reversed(self._given) if name in names), None)

    def number(self, name: str, highest: int) -> int:
        """The number from 0 to *highest* that an option gives, 0 without it. Raises UsageError."""
        text = self._given.get(name, "0")
        found = number(text, 0, highest)
        if found is None:
            reason = f"Error: '{text}' of option --{name} is not a number from 0 to {highest}"
            raise self.error(reason, CuseExit.BAD_VALUE)
        return found

    def error(self, reason: str, status: CuseExit = CuseExit.BAD_SUBOPTION) -> UsageError:
        """An error in the value of an option; only CUSE has more exit statuses than one."""
        return UsageError(reason, status if self.interface is Interface.CUSE else _ERROR)

    def _take(self, option: Option, value: str) -> None:
        if not option.available:
            raise self.error(f"Error: option --{option.name} is not available yet")
        if not (option.first_counts and option.name in self._given):
            self._given.pop(option.name, None)  # the order is that of the last ones
            self._given[option.name] = value

    def _complain(self, complaint: Complaint) -> None:
        # PEER: CUSE goes on after every complaint. We do after an unknown option, which may be one
        # of a later version, but an option that lacks its value would be dropped unnoticed.
        print(complaint.text, file=sys.stderr)
        if self.interface is not Interface.CUSE or not complaint.unknown:
            raise UsageError(f"Try '{self._program} --help' for the options")
