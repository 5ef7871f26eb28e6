"""The grammar of name=value,name: which texts are which values, and the sentences about the rest."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtpm_cuse.cli.words.suboptions import SubOptionError, SubValues, parse
from vtpm_cuse.cli.words.table import Kind, SubOption

TABLE = (
    SubOption("dir", ""),
    SubOption("truncate", "", Kind.BOOL),
    SubOption("fd", "", Kind.INT),
    SubOption("level", "", Kind.UINT),
    SubOption("mode", "", Kind.MODE),
    SubOption("uid", "", Kind.UID),
    SubOption("gid", "", Kind.GID),
    SubOption("action", "", choices=("kill", "none")),
    SubOption("later", "", available=False),
)


def error_of(text: str) -> str:
    with pytest.raises(SubOptionError) as info:
        parse(text, TABLE)
    return str(info.value)


def value_of(text: str) -> str | int | None:
    name = text.partition("=")[0]
    values: SubValues = parse(text, TABLE)
    assert values.has(name)
    return values.integer(name) if values.text(name) is None else values.text(name)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("dir=/a=b", "/a=b"),
        ("dir", "true"),
        ("dir=first,dir=second", "first"),
        ('dir={"a":{"b":"c,d"}}', '{"a":{"b":"c,d"}}'),
        ('dir={"a":1,"b":2},truncate', '{"a":1,"b":2}'),
        ("truncate", True),
        ("truncate=TRUE", True),
        ("truncate=1", True),
        ("truncate=yes", False),
        ("truncate=0", False),
        ("fd=-3", -3),
        ("level= +7", 7),
        ("mode=0640", 0o640),
        ("mode=777", 0o777),
        ("uid=0", 0),
        ("uid=root", 0),
        ("gid=12", 12),
        ("gid=root", 0),
        ("action=kill", "kill"),
    ],
)
def test_values(text: str, value: str | int) -> None:
    assert value_of(text) == value


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "Unknown option ''"),
        ("foo", "Unknown option 'foo'"),
        ("foo=1,bar=2", "Unknown option 'foo=1'"),
        ("dir=", "Unknown option 'dir='"),
        ("dir=x,", "Unknown option ''"),
        ("DIR=x", "Unknown option 'DIR=x'"),
        (" dir=x", "Unknown option ' dir=x'"),
        ("fd=3x", "invalid number '3x'"),
        ("fd=3 ", "invalid number '3 '"),
        ("fd=0x10", "invalid number '0x10'"),
        ("fd", "invalid number 'true'"),
        ("fd=2147483648", "number 2147483648 outside valid range"),
        ("level=-1", "invalid required positive number '-1'"),
        ("level=4294967296", "number 4294967296 outside valid range"),
        ("level=x", "invalid number 'x'"),
        ("mode=9", "invalid number '9'"),
        ("mode=64x", "invalid number '64x'"),
        ("uid=-1", "invalid required positive number '-1'"),
        ("gid=4294967295", "number 4294967295 outside valid range"),
        ("mode=1777", "mode 1777 is invalid"),
        ("mode=-7", "invalid required positive number '-7'"),
        ("uid=no such", "User 'no such' does not exist."),
        ("gid=no such", "Group 'no such' does not exist."),
        ("dir={a", "Unterminated JSON map."),
        ("dir={a}b", "Unexpected character following JSON map."),
        ("action=log", "'log' is not one of kill, none"),
        ("later", "'later' is not available yet"),
        ("dir=first,dir=", "Unknown option 'dir='"),
    ],
)
def test_errors(text: str, reason: str) -> None:
    assert error_of(text) == reason


def test_what_is_not_given_has_a_default() -> None:
    values = parse("dir=x", TABLE)
    assert (values.text("action"), values.integer("fd"), values.flag("truncate")) == (
        None,
        None,
        False,
    )
    assert values.flag("truncate", default=True)
    assert not values.has("fd")


@given(st.text(alphabet="dirmode=,{}0123 truncateéx\0", max_size=30))
def test_any_text_gives_values_or_an_error(text: str) -> None:
    with contextlib.suppress(SubOptionError):
        parse(text, TABLE)


@given(
    st.dictionaries(
        st.sampled_from(["dir", "action"]),
        st.text(st.characters(exclude_characters=",{\0"), min_size=1),
    )
)
def test_round_trip(given_values: dict[str, str]) -> None:
    table = (SubOption("dir", ""), SubOption("action", ""))
    text = ",".join(f"{name}={value}" for name, value in given_values.items())
    if text:
        values = parse(text, table)
        assert all(values.text(name) == value for name, value in given_values.items())
