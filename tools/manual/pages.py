"""The man pages: one for each program, configuration file, and for the control requests."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Final

from tools.manual.config_files import CONFIG_FILES
from tools.manual.requests import requests_page
from tools.manual.roff import Roff, bold, escaped, italic
from vtpm_cuse import __version__
from vtpm_cuse.cli.registry import programs

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tools.manual.config_files import ConfigFile
    from vtpm_cuse.cli.words.table import Example, Option, Program, SubOption, Term

DATE: Final = "2026-11-21"
"""When the text was last looked over; a page must not change by being made again."""
SOURCE: Final = f"vtpm-cuse {__version__}"

_EXITS: Final = (("0", "It was done."), ("1", "It was not; standard error has the reason."))


def pages() -> dict[str, str]:
    """All pages: path below a folder of manuals, and text."""
    found = {}
    for program in programs():
        found[_path(page_name(program), program.section)] = program_page(program)
    for file in CONFIG_FILES:
        found[_path(file.name, 5)] = config_page(file)
    found[_path("swtpm_ioctls", 3)] = requests_page(DATE, SOURCE)
    return found


def links() -> dict[str, str]:
    """Pages under further names: path below a folder of manuals, and the file it links to."""
    return {
        _path(_as_page(alias), program.section): f"{page_name(program)}.{program.section}"
        for program in programs()
        for alias in program.aliases
        if alias != page_name(program)
    }


def page_name(program: Program) -> str:
    """The page's name: "swtpm_cuse" for "swtpm cuse"."""
    return _as_page(program.name)


def _as_page(name: str) -> str:
    return name.replace(" ", "_")


def program_page(program: Program) -> str:
    """The page of one program."""
    page = Roff(page_name(program), program.section, program.summary, DATE, SOURCE)
    page.heading("SYNOPSIS")
    for row, usage in enumerate(program.usage):
        if row:
            page.line_break()
        page.raw(f"{bold(program.name)} {escaped(usage)}".rstrip())
    for alias in program.aliases:
        page.line_break()
        page.raw(f"{bold(alias)} {escaped(program.usage[0])}")
    page.heading("DESCRIPTION")
    page.paragraphs(program.description or (f"{program.name}: {program.summary}.",))
    terms = [*program.operands, *((sub.name, sub.help) for sub in program.subcommands)]
    for name, text in terms:
        page.term(bold(name), _sentence(text))
    _options(page, program)
    _terms(page, "EXIT STATUS", program.exits or _EXITS)
    _terms(page, "ENVIRONMENT", program.environment)
    _terms(page, "FILES", program.files)
    _examples(page, program.examples)
    children = tuple(f"{page_name(program)}_{sub.name}(8)" for sub in program.subcommands)
    _see_also(page, (*children, *program.see_also))
    return str(page)


def config_page(file: ConfigFile) -> str:
    """The page of one configuration file."""
    page = Roff(file.name, 5, file.summary, DATE, SOURCE)
    page.heading("DESCRIPTION")
    page.paragraphs(file.description)
    _terms(page, "ENTRIES", file.keys)
    _terms(page, "FILES", file.files)
    _examples(page, file.examples)
    _see_also(page, file.see_also)
    return str(page)


def _options(page: Roff, program: Program) -> None:
    for group, options in groupby(program.available, lambda option: option.group):
        page.heading(group.upper())
        for option in options:
            _option(page, option)


def _option(page: Roff, option: Option) -> None:
    value = option.value_form.replace("KEY[=VALUE],...", "KEY[=VALUE][,...]")
    tag = ", ".join(map(bold, option.words))
    more = f" {option.more}" if option.more else ""
    repeats = " May be repeated." if option.repeats else ""
    page.term(f"{tag} {italic(value)}" if value else tag, _sentence(option.help) + more + repeats)
    subs = [sub for sub in option.subs if sub.available]
    if subs:
        page.indent()
        for sub in subs:
            # No capital: many begin with a word to be typed, such as aes-128-cbc.
            page.term(_sub_tag(sub), f"{sub.help}.")
        page.dedent()


def _sub_tag(sub: SubOption) -> str:
    return f"{bold(sub.name)}={italic(sub.metavar)}" if sub.metavar else bold(sub.name)


def _terms(page: Roff, heading: str, terms: Iterable[Term | tuple[str, str]]) -> None:
    rows = tuple(terms)
    if rows:
        page.heading(heading)
        for name, text in rows:
            page.term(bold(name), text)


def _examples(page: Roff, examples: Iterable[Example]) -> None:
    page.heading("EXAMPLES")
    for row, (what, group) in enumerate(groupby(examples, lambda example: example.what)):
        if row:
            page.paragraph()
        if what:
            page.text(f"{what}:")
            page.paragraph()
        page.literal("\n".join(example.commands for example in group))


def _see_also(page: Roff, names: Iterable[str]) -> None:
    rows = tuple(dict.fromkeys(names))
    if not rows:
        return
    page.heading("SEE ALSO")
    for row, name in enumerate(rows):
        title, _, section = name.partition("(")
        comma = "," if row < len(rows) - 1 else ""
        page.request(f".BR {escaped(title)} ({section}{comma}")


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _path(name: str, section: int) -> str:
    return f"man{section}/{name}.{section}"
