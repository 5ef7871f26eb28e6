"""The option parser against fixed sentences, and against glibc's getopt_long itself."""

from __future__ import annotations

import ctypes
import os
import tempfile
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtpm_cuse.cli.words.getopt import Complaint, Getopt, Given, Operand
from vtpm_cuse.cli.words.numbers import leading_number, number
from vtpm_cuse.cli.words.table import Option

if TYPE_CHECKING:
    from collections.abc import Sequence

OPTIONS = (
    Option("name", "", metavar="X", letter="n"),
    Option("tpm2", ""),
    Option("tpmstate", "", metavar="X"),
    Option("print-states", ""),
    Option("print-info", "", metavar="X"),
    Option("print", "", letter="p"),
    Option("help", "", letter="h"),
)

Outcome = tuple[list[tuple[str, str | None]], list[str], list[str]]


def ours(words: Sequence[str], *, long_only: bool = False) -> Outcome:
    items = list(Getopt("cuse", words, OPTIONS, long_only=long_only))
    return (
        [(item.name, item.value) for item in items if isinstance(item, Given)],
        [item.word for item in items if isinstance(item, Operand)],
        [item.text for item in items if isinstance(item, Complaint)],
    )


@pytest.mark.parametrize(
    ("words", "options", "operands"),
    [
        (["--name", "a"], [("name", "a")], []),
        (["--name=a=b"], [("name", "a=b")], []),
        (["--name="], [("name", "")], []),
        (["-n", "a", "-nb"], [("name", "a"), ("name", "b")], []),
        (["-phn", "-x"], [("print", None), ("help", None), ("name", "-x")], []),
        (["x", "--he", "y"], [("help", None)], ["x", "y"]),
        (["--print"], [("print", None)], []),
        (["--print-i", "7"], [("print-info", "7")], []),
        (["--tpm2", "--", "--tpm2", "-"], [("tpm2", None)], ["--tpm2", "-"]),
    ],
)
def test_understands(
    words: list[str], options: list[tuple[str, str | None]], operands: list[str]
) -> None:
    assert ours(words) == (options, operands, [])


@pytest.mark.parametrize(
    ("word", "complaint"),
    [
        ("--bogus=1", "cuse: unrecognized option '--bogus=1'"),
        ("-Z", "cuse: invalid option -- 'Z'"),
        ("--name", "cuse: option '--name' requires an argument"),
        ("-n", "cuse: option requires an argument -- 'n'"),
        ("--tpm2=3", "cuse: option '--tpm2' doesn't allow an argument"),
        ("--tpm", "cuse: option '--tpm' is ambiguous; possibilities: '--tpm2' '--tpmstate'"),
    ],
)
def test_complains_in_the_words_of_glibc(word: str, complaint: str) -> None:
    assert ours([word]) == ([], [], [complaint])


def test_only_a_word_that_no_option_has_is_unknown() -> None:
    items = Getopt("cuse", ["--bogus", "-Z", "--tpm", "--name"], OPTIONS)
    assert [item.unknown for item in items if isinstance(item, Complaint)] == [
        True,
        True,
        False,
        False,
    ]


def test_one_dash_is_enough_for_long_options_only() -> None:
    assert ours(["-name", "a", "-h"], long_only=True)[0] == [("name", "a"), ("help", None)]


def test_second_value_is_taken_unless_it_looks_like_an_option() -> None:
    options = (Option("save", "", metavar="TYPE FILE"),)
    items = list(Getopt("ioctl", ["--save", "a", "file", "--save=b", "-x"], options))
    assert items[:2] == [("save", "a", "--save", "file"), ("save", "b", "--save", None)]


class GlibcOption(ctypes.Structure):
    _fields_ = (  # type: ignore[mutable-override]  # as ctypes wants it
        ("name", ctypes.c_char_p),
        ("has_arg", ctypes.c_int),
        ("flag", ctypes.c_void_p),
        ("val", ctypes.c_int),
    )


def glibc(words: Sequence[str], *, long_only: bool = False) -> Outcome:
    libc = ctypes.CDLL(None)
    optind = ctypes.c_int.in_dll(libc, "optind")
    optarg = ctypes.c_char_p.in_dll(libc, "optarg")
    table = (GlibcOption * (len(OPTIONS) + 1))()
    for index, option in enumerate(OPTIONS):
        table[index] = GlibcOption(option.name.encode(), option.takes_value, None, 256 + index)
    letters = {ord(o.letter): index for index, o in enumerate(OPTIONS) if o.letter}
    short = (
        "" if long_only else "".join(o.letter + ":" * o.takes_value for o in OPTIONS if o.letter)
    )
    arguments = [b"cuse", *(word.encode() for word in words)]
    argv = (ctypes.c_char_p * (len(arguments) + 1))(*arguments)
    function = libc.getopt_long_only if long_only else libc.getopt_long
    optind.value = 0  # starts anew
    found: list[tuple[str, str | None]] = []
    with tempfile.TemporaryFile() as errors:
        stderr = os.dup(2)
        os.dup2(errors.fileno(), 2)
        try:
            while (code := function(len(arguments), argv, short.encode(), table, None)) != -1:
                if code == ord("?"):
                    continue
                option = OPTIONS[letters[code] if code < 256 else code - 256]
                value = (optarg.value or b"").decode() if option.takes_value else None
                found.append((option.name, value))
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
        errors.seek(0)
        complaints = errors.read().decode().splitlines()
    operands = [(argv[i] or b"").decode() for i in range(optind.value, len(arguments))]
    return found, operands, complaints


WORDS = st.sampled_from(
    [
        *(
            "",
            "-",
            "--",
            "---",
            "x",
            "y=1",
            "-n",
            "-na",
            "-p",
            "-hp",
            "-hZ",
            "-pn",
            "-Z",
            "-=",
            "--=",
        ),
        *("--name", "--name=a", "--n", "--tpm2", "--tpm2=1", "--tpm", "--tpms", "--tpms=dir=x"),
        *(
            "--print",
            "--print=",
            "--pri",
            "--print-",
            "--print-s",
            "--print-i=0",
            "--bogus",
            "--h=1",
        ),
        *("-name", "-name=b", "-tpm2", "-tp", "-print-s", "-bogus=3", "-h=2"),
    ]
)


@given(st.lists(WORDS, max_size=6), st.booleans())
def test_equals_glibc(words: list[str], long_only: bool) -> None:
    assert ours(words, long_only=long_only) == glibc(words, long_only=long_only)


@pytest.mark.parametrize(
    ("text", "base", "found"),
    [
        ("12", 0, (12, "")),
        (" +0x1fg", 0, (31, "g")),
        ("0x", 0, (0, "x")),
        ("-010", 0, (-8, "")),
        ("09", 0, (0, "9")),
        ("0640", 8, (0o640, "")),
        ("8", 8, None),
        ("010", 10, (10, "")),
        ("", 0, None),
        ("x1", 10, None),
        ("\N{ARABIC-INDIC DIGIT ONE}", 10, None),
    ],
)
def test_numbers_as_strtol(text: str, base: int, found: tuple[int, str] | None) -> None:
    assert leading_number(text, base) == found


def test_number_must_be_all_and_in_bounds() -> None:
    assert number("0xffff", 0, 0xFFFF) == 0xFFFF
    assert number("65536", 0, 0xFFFF) is None
    assert number("-1", 0, 0xFFFF) is None
    assert number("1 ", 0, 0xFFFF) is None


@given(st.text(max_size=12), st.sampled_from([0, 8, 10]))
def test_any_text_is_a_number_or_none(text: str, base: int) -> None:
    found = leading_number(text, base)
    assert found is None or text.endswith(found[1])


def test_a_command_has_words_of_its_own() -> None:
    words = ["--name", "a", "run", "--name", "--", "-x"]
    items = list(Getopt("cuse", words, OPTIONS, in_order=True))
    assert isinstance(items[0], Given)
    assert items[1:] == [Operand(word) for word in words[2:]]
    assert list(Getopt("cuse", ["--", "-x"], OPTIONS, in_order=True)) == [Operand("-x")]
