"""How the bytes of a data connection become commands."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support import commands as tpm
from vtpm_cuse.proto.stream import CommandStream, MessageStream, Request, framed

A, B = tpm.get_random(8), tpm.pcr_read(7)
PREFIX = bytes.fromhex("00000008 03 0000000c")
PREFIXED = PREFIX + A


def requests(*pieces: bytes, prefix: bool = True, flush: bool = False) -> list[Request]:
    """All requests that come out of *pieces*, the last of which is flushed if wanted."""
    stream = CommandStream(prefix=prefix)
    found = []
    for number, piece in enumerate(pieces, 1):
        stream.feed(piece)
        while request := stream.next_request(flush=flush and number == len(pieces)):
            found.append(request)
    return found


def commands(*pieces: bytes, prefix: bool = True, flush: bool = False) -> list[bytes]:
    return [request.command for request in requests(*pieces, prefix=prefix, flush=flush)]


def test_one_command() -> None:
    assert requests(A) == [Request(A, None)]


def test_two_commands_in_one_read() -> None:
    assert commands(A + B) == [A, B]


@given(st.lists(st.sampled_from([A, B, PREFIXED, tpm.nv_write(1, bytes(3000))])), st.data())
def test_wherever_the_stream_is_cut_the_commands_are_the_same(
    sent: list[bytes], data: st.DataObject
) -> None:
    stream = b"".join(sent)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=9)))
    pieces = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    assert commands(*pieces) == [part.removeprefix(PREFIX) for part in sent]


def test_byte_by_byte() -> None:
    assert requests(*(bytes([byte]) for byte in PREFIXED + A)) == [Request(A, 3), Request(A, None)]


def test_prefix_in_three_writes_as_the_ibm_tss_sends_it() -> None:
    assert requests(PREFIX[:4], PREFIX[4:5], PREFIX[5:], A) == [Request(A, 3)]


def test_length_in_the_prefix_is_not_looked_at() -> None:
    assert requests(bytes.fromhex("00000008 63 ffffffff") + A) == [Request(A, 0x63)]


def test_tpm12_knows_no_prefix() -> None:
    assert requests(PREFIXED, prefix=False) == [Request(PREFIXED, None)]


def test_another_first_word_is_no_prefix() -> None:
    other = bytes.fromhex("00000009 00 0000000c") + A
    assert requests(other) == [Request(other, None)]


@pytest.mark.parametrize("size", [0, 9, 4097, 0xFFFFFFFF])
def test_size_that_no_command_has_makes_all_that_came_one_command(size: int) -> None:
    bad = A[:2] + size.to_bytes(4, "big") + A[6:]
    assert commands(bad) == [bad]


def test_longest_command() -> None:
    longest = A[:2] + (4096).to_bytes(4, "big") + bytes(4090)
    assert commands(longest[:4000], longest[4000:]) == [longest]


@pytest.mark.parametrize("surplus", [b"x", b"\n", b"abc", b"\x80\x03", bytes(20), b"x" * 5000])
def test_surplus_belongs_to_the_command_which_so_is_answered_once(surplus: bytes) -> None:
    assert commands(A + surplus) == [A + surplus]


@pytest.mark.parametrize("start", [b"\x80", A[:9], PREFIX[:3], tpm.TPM12_STARTUP_CLEAR[:4]])
def test_start_of_another_command_is_no_surplus(start: bytes) -> None:
    assert commands(A + start) == [A]


def test_rest_that_does_not_come() -> None:
    stream = CommandStream(prefix=True)
    stream.feed(A[:11])
    assert stream.next_request() is None
    awaited = [stream.awaits_rest]
    assert stream.next_request(flush=True) == Request(A[:11], None)
    assert [*awaited, stream.awaits_rest] == [True, False]
    assert stream.next_request(flush=True) is None


@pytest.mark.parametrize("start", [b"", A[:1], A[:9], PREFIX])
def test_less_than_a_header_is_waited_for_without_end(start: bytes) -> None:
    stream = CommandStream(prefix=True)
    stream.feed(start)
    assert not stream.awaits_rest
    assert stream.next_request(flush=True) is None


def test_prefixed_command_shorter_than_a_header() -> None:
    """The prefix makes it long enough to be looked at."""
    assert requests(PREFIX + A[:5]) == []
    assert requests(PREFIX + A[:5], flush=True) == [Request(A[:5], 3)]


@given(st.binary(max_size=200), st.booleans())
def test_no_byte_is_lost_or_made_up(data: bytes, prefix: bool) -> None:
    found = requests(data, prefix=prefix, flush=True)
    taken = sum(len(r.command) + (9 if r.locality is not None else 0) for r in found)
    assert len(data) - 9 - 9 <= taken <= len(data)
    if found:
        assert found[0].command in data


def test_answers_of_prefixed_commands_are_framed() -> None:
    response = bytes.fromhex("80010000000a00000101")
    assert framed(response, Request(A, None)) == response
    assert framed(response, Request(A, 0)) == bytes.fromhex("0000000a") + response + bytes(4)


@pytest.mark.parametrize("message", [A, A + B, A[:4], A[:10], PREFIXED, b"\0" * 10])
def test_message_is_one_command_whatever_it_is(message: bytes) -> None:
    """As from a device: what begins here must not wait for, or be mixed with, what comes next."""
    stream = MessageStream()
    for _ in range(2):
        stream.feed(message)
        assert stream.next_request() == Request(message, None)
        assert stream.next_request(flush=True) is None
        assert stream.empty
        assert not stream.awaits_rest


def test_a_stream_is_empty_between_commands() -> None:
    """What the socket loop asks before it hands bytes to the TPM without cutting them."""
    stream = CommandStream(prefix=True)
    seen = [stream.empty]
    for piece in (A[:1], A[1:11], A[11:], PREFIXED[:5], PREFIXED[5:] + B):
        stream.feed(piece)
        while stream.next_request() is not None:
            seen.append(stream.empty)
        seen.append(stream.empty)
    assert seen == [True, False, False, True, True, False, False, True, True]


# -- clients that may be anybody's ----------------------------------------------------------


def strict(*pieces: bytes, flush: bool = False) -> tuple[list[bytes], bool]:
    """The commands that come out of *pieces*, and whether the connection must end."""
    stream = CommandStream(prefix=True, strict=True)
    found = []
    for piece in pieces:
        stream.feed(piece)
        while not stream.broken and (request := stream.next_request(flush=flush)):
            found.append(request.command)
    return found, stream.broken


@pytest.mark.parametrize("start", [b"P", b"POST", b"\x80P", A[:2] + b"POST", A[:2] + bytes(4)])
def test_what_begins_no_command_breaks_a_strict_stream(start: bytes) -> None:
    assert strict(start) == ([], True)
    assert strict(start + A) == ([], True)
    assert strict(A, start) == ([A], True)
    assert strict(PREFIX + start) == ([], True)


@pytest.mark.parametrize("rest", [b"P", b"\n", b"POST / HTTP/1.1"])
def test_surplus_breaks_a_strict_stream_before_the_command_is_executed(rest: bytes) -> None:
    assert strict(A + rest) == ([], True)
    assert strict(PREFIXED + rest) == ([], True)


def test_rest_that_does_not_come_breaks_a_strict_stream_after_its_answer() -> None:
    assert strict(A[:11], flush=True) == ([A[:11]], True)


@given(st.lists(st.sampled_from([A, B, PREFIXED]), min_size=1), st.data())
def test_commands_do_not_break_a_strict_stream(sent: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(sent)
    cut = data.draw(st.integers(0, len(stream)))
    expected = [part.removeprefix(PREFIX) for part in sent]
    assert strict(stream[:cut], stream[cut:]) == (expected, False)
