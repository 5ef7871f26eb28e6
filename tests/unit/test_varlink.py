"""Varlink's messages, and what is made of an interface's declaration."""

from __future__ import annotations

import json
from typing import Any, Literal, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtpm_cuse.errors import MessageError
from vtpm_cuse.wire import varlink
from vtpm_cuse.wire.manager import MANAGER, Create
from vtpm_cuse.wire.varlink import BadParameter, Call, Messages, Reply, from_json, to_json

WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
INTS = st.integers(-(1 << 63), (1 << 63) - 1)
JSON = st.recursive(
    st.none() | st.booleans() | INTS | st.floats(allow_nan=False, allow_infinity=False) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(WORDS, JSON, max_size=4)


@given(st.builds(Call, WORDS, OBJECTS, st.booleans(), st.booleans(), st.booleans()))
def test_a_call_comes_as_it_was_sent(call: Call) -> None:
    message = varlink.encode_call(call)
    assert message.index(b"\0") == len(message) - 1
    assert varlink.decode_call(message[:-1]) == call


@given(st.builds(Reply, OBJECTS, st.booleans(), WORDS))
def test_a_reply_comes_as_it_was_sent(reply: Reply) -> None:
    message = varlink.encode_reply(reply)
    assert message.index(b"\0") == len(message) - 1
    assert varlink.decode_reply(message[:-1]) == reply


@given(st.binary(max_size=64) | JSON.map(lambda value: json.dumps(value).encode()))
def test_whatever_comes_is_a_message_or_none(message: bytes) -> None:
    for decode in (varlink.decode_call, varlink.decode_reply):
        try:
            found = decode(message)
        except MessageError:
            continue
        assert isinstance(found.parameters, dict)


@pytest.mark.parametrize(
    "message",
    [
        b'{"method": "a", "parameters": {"x": NaN}}',
        b'{"method": "a", "parameters": {"x": -Infinity}}',
        b'{"method": "a", "parameters": {"x": 1' + b"0" * 5000 + b"}}",
        b'{"method": "a", "parameters": ' + b'{"x":' * 20000,
        b'{"method": "a", "more": 1}',
        b'{"method": null}',
    ],
)
def test_json_that_others_read_otherwise_is_refused(message: bytes) -> None:
    with pytest.raises(MessageError):
        varlink.decode_call(message)


@given(
    st.lists(st.binary(max_size=12).map(lambda data: data.replace(b"\0", b"x")), max_size=6),
    st.lists(st.integers(1, 9)),
)
def test_messages_are_cut_wherever_they_were_split(sent: list[bytes], sizes: list[int]) -> None:
    stream = b"".join(message + b"\0" for message in sent)
    messages, found = Messages(12), []
    while stream:
        size = sizes.pop() if sizes else len(stream)
        messages.feed(stream[:size])
        stream = stream[size:]
        while (message := messages.take()) is not None:
            found.append(message)
    assert found == sent
    assert not messages


@pytest.mark.parametrize("end", [b"", b"\0"])
def test_no_message_is_longer_than_allowed(end: bytes) -> None:
    messages = Messages(12)
    messages.feed(b"x" * 12 + end)
    assert messages.take() == (b"x" * 12 if end else None)
    messages = Messages(12)
    messages.feed(b"x" * 13 + end)
    with pytest.raises(MessageError):
        messages.take()


# -- values -------------------------------------------------------------------------------


class Inner(NamedTuple):
    """Of one."""

    some_name: str


class Outer(NamedTuple):
    """One of each.

    And more that the description leaves out.
    """

    a: str
    b: int
    c: float
    d: bool
    e: Literal["new", "same"]
    f: list[Inner]
    g: dict[str, int]
    last_used: float | None = None
    h: Inner | None = None


INNERS = st.builds(Inner, WORDS)
OUTERS = st.builds(
    Outer,
    *(WORDS, INTS, st.floats(-1e9, 1e9), st.booleans(), st.sampled_from(["new", "same"])),
    *(st.lists(INNERS, max_size=2), st.dictionaries(WORDS, INTS, max_size=2)),
    *(st.none() | st.floats(-1e9, 1e9), st.none() | INNERS),
)
ONE = Outer("x", 1, 1.5, True, "new", [Inner("y")], {"z": 2}, 3.0, Inner("w"))


@given(OUTERS)
def test_a_value_comes_as_it_was_sent(value: Outer) -> None:
    assert from_json(Outer, json.loads(json.dumps(to_json(value)))) == value


def test_names_on_the_wire_are_varlinks() -> None:
    assert to_json(ONE)["lastUsed"] == 3.0
    assert to_json(ONE)["h"] == {"someName": "w"}
    assert "h" not in to_json(ONE._replace(h=None))
    assert from_json(Outer, {**to_json(ONE), "h": None}).h is None


@pytest.mark.parametrize(
    ("name", "value", "where"),
    [
        *((name, None, name) for name in "abcdefg"),
        *((name, ["x"], name) for name in "abcdegh"),
        *(("b", value, "b") for value in (True, 1.0, "1", 1 << 63, -(1 << 63) - 1)),
        *(("c", value, "c") for value in (True, 1 << 64, "1")),
        *(("d", value, "d") for value in (0, 1, "true")),
        ("a", "\ud800", "a"),
        ("e", "old", "e"),
        ("f", [{"someName": 1}], "f.someName"),
        ("f", {"someName": "x"}, "f"),
        ("g", {"x": "y"}, "g"),
        ("g", {"\udc00": 1}, "g"),
        ("h", {}, "h.someName"),
        ("h", {"someName": "x", "more": 1}, "h.more"),
        ("nobody", 1, "nobody"),
    ],
)
def test_what_is_not_of_the_type_is_named(name: str, value: object, where: str) -> None:
    with pytest.raises(BadParameter) as info:
        from_json(Outer, {**to_json(ONE), name: value})
    assert info.value.name == where


@given(OBJECTS | st.dictionaries(st.sampled_from("abcdefgh"), JSON))
def test_whatever_comes_is_a_value_or_none(found: dict[str, Any]) -> None:
    try:
        value = from_json(Outer, found)
    except BadParameter:
        return
    assert isinstance(value, Outer)


def test_a_newer_server_may_tell_more() -> None:
    assert from_json(Outer, {**to_json(ONE), "more": 1}, strict=False) == ONE


def test_the_description_is_made_of_the_declaration() -> None:
    interface = varlink.Interface(
        "org.example.It",
        "About it.",
        (Inner, Outer),
        (varlink.Method("Do", Inner, varlink.Nothing, "Does."),),
        (varlink.Failure("No", Inner, "Not done."),),
    )
    assert interface.description == (
        "# About it.\n"
        "interface org.example.It\n"
        "\n# Of one.\n"
        "type Inner (someName: string)\n"
        "\n# One of each.\n"
        "type Outer (a: string, b: int, c: float, d: bool, e: (new, same), f: []Inner, "
        "g: [string]int, lastUsed: ?float, h: ?Inner)\n"
        "\n# Does.\n"
        "method Do(someName: string) -> ()\n"
        "\n# Not done.\n"
        "error No (someName: string)\n"
    )


def test_the_managers_interface_has_all_that_its_types_need() -> None:
    text = MANAGER.description
    assert "\ntype Event (kind: (created, changed, removed), tpm: Tpm)\n" in text
    assert "\nmethod Watch() -> (event: ?Event)\n" in text
    assert Create("web1") == from_json(Create, {"name": "web1"})
