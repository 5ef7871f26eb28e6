"""How a program is declared: one table of frozen rows.

Parser, help screen, man page and completions are all made from it, so an option
that works is an option that is documented. To add a program is to write such a
table as ``PROGRAM`` in its module and to name the module in `cli.registry`.

Named tuples and not dataclasses: those cost a small tool half of its start.
"""

from __future__ import annotations

from enum import Enum, Flag, auto
from typing import NamedTuple


class Kind(Enum):
    """Which values a sub-option takes."""

    TEXT = "text"
    BOOL = "bool"
    INT = "int"
    UINT = "uint"
    MODE = "mode"
    UID = "uid"
    GID = "gid"


class InterfaceName(Enum):
    """How the emulator serves a vTPM; its interfaces share a table, `cli.emulator.options`."""

    SOCKET = "socket"
    CHARDEV = "chardev"
    CUSE = "cuse"
    FUSE = "fuse"


class Lenient(Flag):
    """What a program leaves out of account: of options it says so, of operands it does not."""

    NOTHING = 0
    UNKNOWN = auto()  # an option that is none
    MISUSED = auto()  # an option that is ambiguous, or without its value
    OPERANDS = auto()


class SubOption(NamedTuple):
    """One name of an option's value.

    Attributes:
        name: As the user writes it.
        help: One clause for the help screen and the man page.
        kind: How the value is read.
        metavar: What stands for the value in a synopsis; empty for one that is set by its name.
        choices: The only texts allowed, if there are such.
        available: False while it is not built.
    """

    name: str
    help: str
    kind: Kind = Kind.TEXT
    metavar: str = ""
    choices: tuple[str, ...] = ()
    available: bool = True


class Option(NamedTuple):
    """One option of a program.

    Attributes:
        name: Long name, without dashes.
        help: What it does, in a clause or two.
        letter: Short name.
        metavar: What stands for the value, when that is one word; PATH, FILE, DEVICE and DIR are
            completed as such. Two words, as in "TYPE FILE", are two values.
        noun: For a value made of sub-options, what the C suite's messages call it.
        subs: The sub-options.
        choices: The usual texts of the value, for completion and manual; the program checks them.
        optional_value: The option may stand alone too.
        repeats: Every one given counts; normally one does.
        first_counts: The first of several counts; normally the last one does.
        single_dash: Written with one dash, in a program where that is allowed (`long_only`).
        group: Headline in the help screen; options of a group stand together in the table.
        more: What only the man page says, in sentences.
        interfaces: In the emulator's table, where the option exists; everywhere by default.
        ends: No word behind it counts.
        available: False while it is not built: refused, and left out of help and manual.
    """

    name: str
    help: str
    letter: str = ""
    metavar: str = ""
    noun: str = ""
    subs: tuple[SubOption, ...] = ()
    choices: tuple[str, ...] = ()
    optional_value: bool = False
    repeats: bool = False
    first_counts: bool = False
    single_dash: bool = False
    group: str = "Options"
    more: str = ""
    interfaces: frozenset[InterfaceName] = frozenset(InterfaceName)
    ends: bool = False
    available: bool = True

    @property
    def takes_value(self) -> bool:
        """Whether a value follows, or may."""
        return bool(self.metavar or self.subs)

    @property
    def words(self) -> tuple[str, ...]:
        """All that the user may write, the letter first."""
        long = f"{'-' if self.single_dash else '--'}{self.name}"
        return (f"-{self.letter}", long) if self.letter else (long,)

    @property
    def value_form(self) -> str:
        """What stands for the value in a synopsis, empty without one."""
        form = "KEY[=VALUE],..." if self.subs else self.metavar
        return f"[{form}]" if self.optional_value else form

    def offers(self, sub_name: str) -> bool:
        """Whether it works today, and so does its sub-option, if one is named."""
        return self.available and (
            not sub_name or any(sub.name == sub_name and sub.available for sub in self.subs)
        )


class Term(NamedTuple):
    """A word and what it means: an operand, exit status, environment variable or file."""

    name: str
    text: str


class TpmTerm(Term):
    """An operand that stands for a TPM of the manager's: a shell offers the names of all."""


class Subcommand(NamedTuple):
    """A first word that chooses a program: *module* has its ``main(words, program)``."""

    name: str
    help: str
    module: str


class Example(NamedTuple):
    """Shell commands, one or more lines, and what they are for (may be empty)."""

    what: str
    commands: str


class Program(NamedTuple):
    """One program, or one subcommand of a program.

    Attributes:
        name: How it is called: "swtpm_ioctl", "swtpm socket".
        summary: What it is, as a man page's first line has it: no capital, no full stop.
        options: Its options.
        aliases: Further names under which it is installed.
        usage: What follows the name, one entry for each way to call it.
        subcommands: The programs that its first word chooses from.
        operands: Words that are no options; without any here, such words are refused.
        description: Paragraphs for the man page.
        examples: At least one.
        exits: Exit statuses, where there are more than 0 and 1.
        environment: The environment variables that it reads.
        files: The files that it reads and writes.
        see_also: Man pages, as "swtpm_ioctl(8)".
        section: Section of the manual.
        banner: First line of the help screen, where scripts or habits want one.
        long_only: One dash starts a long option too, as in getopt_long_only.
        runs: Its operands are a command, whose words are nobody else's.
        lenient: What is left out of account instead of being an error.
        shows_help: An option that does not fit brings the help screen.
        bad_number: Exit status after a number out of range.
        bad_value: Exit status after any other value that does not fit.
        no_user: Exit status after a user that does not exist.
    """

    name: str
    summary: str
    options: tuple[Option, ...] = ()
    aliases: tuple[str, ...] = ()
    usage: tuple[str, ...] = ("[options]",)
    subcommands: tuple[Subcommand, ...] = ()
    operands: tuple[Term, ...] = ()
    description: tuple[str, ...] = ()
    examples: tuple[Example, ...] = ()
    exits: tuple[Term, ...] = ()
    environment: tuple[Term, ...] = ()
    files: tuple[Term, ...] = ()
    see_also: tuple[str, ...] = ()
    section: int = 8
    banner: str = ""
    long_only: bool = False
    runs: bool = False
    lenient: Lenient = Lenient.NOTHING
    shows_help: bool = False
    bad_number: int = 1
    bad_value: int = 1
    no_user: int = 1

    @property
    def available(self) -> tuple[Option, ...]:
        """The options that work today."""
        return tuple(option for option in self.options if option.available)
