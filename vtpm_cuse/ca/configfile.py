"""Configuration files of the companion tools: where they are, and their grammar.

One setting in a line, ``name = value``, from the line's start; the value ends at
``#`` and may refer to the environment, ``${HOME}``. The first of several counts;
what is no setting is no error, as in the C suite, unless it begins with the name
of one: it was meant, and without it another CA may be taken.
"""

from __future__ import annotations

import codecs
import os
import pwd
import re
from typing import TYPE_CHECKING, Final

from vtpm_cuse.errors import UsageError
from vtpm_cuse.files import read_small, untrusted_part

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

SYSTEM_FOLDER: Final = "/etc"

_BLANKS: Final = " \t\v\f\r"  # as isspace() of C has them, and no other character
_AROUND: Final = rf"[{_BLANKS}]*"
_SETTING: Final = re.compile(rf"([A-Za-z0-9_]+){_AROUND}={_AROUND}([^#]*)")
_FOR_ENVIRONMENT: Final = re.compile(rf"env:([A-Za-z_][A-Za-z0-9_]*){_AROUND}={_AROUND}(.*)")
_FIRST_WORD: Final = re.compile(r"[\s\udc80-\udcff]*(env:|[A-Za-z0-9_]+)")
_REFERENCE: Final = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


def user_folder(environ: Mapping[str, str]) -> str:
    """``$XDG_CONFIG_HOME``, or the folder that stands for it."""
    given = environ.get("XDG_CONFIG_HOME", "")
    if os.path.isabs(given):  # the specification wants a relative one ignored
        return given
    return os.path.join(environ.get("HOME") or _home(), ".config")


def find(name: str, environ: Mapping[str, str], named_by: str) -> str | None:
    """The user's file of that name, else the system's; None if neither can be read.

    What is there in its place, a pipe or a link to what is not there, is given as well: to read it
    is an error, and to take the system's instead would be another CA.

    Raises:
        UsageError: This is root, and somebody else could have written the file, in the folder
            that HOME names, say. It may name programs and libraries, paths of keys and a CA.
    """
    for folder in (user_folder(environ), SYSTEM_FOLDER):
        path = os.path.join(folder, name)
        if os.access(path, os.R_OK) or (os.path.islink(path) and not os.path.exists(path)):
            if others := changed_by_others(path):
                raise UsageError(
                    f"Root does not use {path}: {others}",
                    hint=f"name it by {named_by} to use it all the same, or set HOME to root's own",
                )
            return path
    return None


def changed_by_others(path: str) -> str:
    """For root: what of a path is in other hands, in words. Empty if nothing is, or for others."""
    part = untrusted_part(path) if os.geteuid() == 0 else None
    return "" if part is None else f"others than root can change {part}"


def parse(
    text: str, environ: Mapping[str, str], known: Collection[str] = (), path: str = ""
) -> dict[str, str]:
    """The settings by their names; those of ``env:`` lines under "env:NAME".

    Raises:
        UsageError: A line begins with one of the *known* names, and is no setting.
    """
    settings: dict[str, str] = {}
    # Not splitlines(): a form feed or U+2028 ends no line for any other program.
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), 1):
        if found := _SETTING.match(line):
            settings.setdefault(found[1], _resolved(found[2].rstrip(_BLANKS), environ))
        elif found := _FOR_ENVIRONMENT.match(line):
            settings.setdefault(f"env:{found[1]}", found[2])
        elif (found := _FIRST_WORD.match(line)) and found[1] in known:
            raise UsageError(
                f"{path}, line {number}: '{found[1]}' is not read as a setting",
                hint="a line is NAME = VALUE, from its beginning; '#' begins a comment",
            )
    return settings


def read_text(path: str, *, surrogates: bool = False) -> str:
    """A small text file.

    Args:
        path: May be a pipe of the caller's.
        surrogates: What is not UTF-8 stands for its bytes, as in a path: in another charset, a
            comment says nothing, and the name of a file is that file's.

    Raises:
        OSError: It cannot be read.
        UsageError: It is too large, or not text.
    """
    try:
        data = read_small(path, streams=True)
    except ValueError:
        raise UsageError(f"{path} is larger than any configuration file") from None
    if data.startswith(codecs.BOM_UTF8):
        # It would hide the first setting, as in the C suite, which says nothing.
        raise UsageError(f"{path} begins with a byte order mark", hint="save it without one")
    try:
        text = data.decode(errors="surrogateescape" if surrogates else "strict")
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not text in UTF-8") from None
    if "\0" in text:
        raise UsageError(f"{path} is not text: there is a zero byte in it")
    return text


def user_name() -> str:
    """Who runs this, for messages."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def _resolved(value: str, environ: Mapping[str, str]) -> str:
    return _REFERENCE.sub(lambda match: environ.get(match[1], ""), value)


def _home() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_dir
    except KeyError:
        return "/"
