"""Packet captures: what the writer has written, and others, is read back."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support import commands as tpm
from vtpm_cuse.wire.pcapng import CaptureReader, Conversation, Exchange, file_header

if TYPE_CHECKING:
    from collections.abc import Callable

ASKED: Final = tpm.get_random(8)
ANSWERED: Final = struct.pack(">HII", 0x8001, 20, 0) + bytes(10)
SECOND: Final = 1_000_000
FIN: Final = 1


def read(*pieces: bytes) -> tuple[list[Exchange], str]:
    reader = CaptureReader()
    found = [exchange for piece in pieces for exchange in reader.feed(piece)]
    return [*found, *reader.end()], reader.trouble


def block(kind: int, body: bytes, order: str = "<") -> bytes:
    body += bytes(-len(body) % 4)
    size = struct.pack(f"{order}I", len(body) + 12)
    return struct.pack(f"{order}I", kind) + size + body + size


def header(order: str = "<", linktype: int = 1, options: bytes = b"") -> bytes:
    section = block(0x0A0D0D0A, struct.pack(f"{order}IHHq", 0x1A2B3C4D, 1, 0, -1), order)
    return section + block(1, struct.pack(f"{order}HHI", linktype, 0, 0) + options, order)


def frames_of(capture: bytes) -> list[bytes]:
    """The frames in a capture of ours."""
    found = []
    while capture:
        kind, size = struct.unpack_from("<II", capture)
        if kind == 6:
            (length,) = struct.unpack_from("<I", capture, 20)
            found.append(capture[28 : 28 + length])
        capture = capture[size:]
    return found


def packet(frame: bytes, stamp: int, order: str = "<", interface: int = 0, cut: int = 0) -> bytes:
    sizes = len(frame) - cut, len(frame)
    head = struct.pack(f"{order}5I", interface, stamp >> 32, stamp & 0xFFFF_FFFF, *sizes)
    return block(6, head + frame[: len(frame) - cut], order)


def conversation(*messages: bytes, port: int = 50000, at: int = SECOND) -> bytes:
    """Commands and responses in turn, a millisecond apart."""
    talk = Conversation(port)
    found = talk.begin(at)
    for number, message in enumerate(messages):
        say = talk.response if number % 2 else talk.command
        found += say(message, at + 1000 * (number + 1))
    return found + talk.end(at + 1000 * (len(messages) + 1))


ONE: Final = Exchange(SECOND + 1000, ASKED, ANSWERED, 1000)
CAPTURE: Final = file_header() + conversation(ASKED, ANSWERED)
FRAMES: Final = frames_of(CAPTURE)
MESSAGES: Final = st.lists(
    st.binary(max_size=40).map(
        lambda body: struct.pack(">HI", 0x8001, 10 + len(body)) + bytes(4) + body
    ),
    max_size=9,
)


def test_our_own() -> None:
    assert read(CAPTURE) == ([ONE], "")
    assert read(CAPTURE, CAPTURE) == ([ONE, ONE], "")


@given(MESSAGES, st.integers(1, 60), st.booleans())
def test_what_was_said_is_heard_whatever_the_pieces(
    messages: list[bytes], size: int, checksums: bool
) -> None:
    talk = Conversation(50001, checksums=checksums)
    capture = file_header() + talk.begin(0)
    for number, message in enumerate(messages):
        capture += (talk.response if number % 2 else talk.command)(message, 1 << 50)
    capture += talk.end(1 << 60)
    pieces = [capture[at : at + size] for at in range(0, len(capture), size)]
    found, trouble = read(*pieces)
    assert trouble == ""
    pairs = zip(messages[::2], [*messages[1::2], None], strict=False)
    assert found == [
        Exchange(1 << 50, command, response, None if response is None else 0)
        for command, response in pairs
    ]


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize(
    ("options", "ticks"),
    [
        (lambda _: b"", 10**6),
        (lambda order: struct.pack(f"{order}HHB3x", 9, 1, 9), 10**9),
        (lambda order: struct.pack(f"{order}HHB3xHH", 9, 1, 0x80 | 20, 0, 0), 1 << 20),
        (lambda order: struct.pack(f"{order}HH4sHHB3x", 2, 3, b"lo", 9, 1, 3), 10**3),
        (lambda order: struct.pack(f"{order}HHHHB3x", 0, 0, 9, 1, 3), 10**6),
    ],
)
def test_byte_orders_and_clocks(order: str, options: Callable[[str], bytes], ticks: int) -> None:
    capture = header(order, options=options(order))
    for second, frame in enumerate(FRAMES):
        capture += packet(frame, second * ticks, order)
    assert read(capture) == ([Exchange(3 * SECOND, ASKED, ANSWERED, SECOND)], "")


def test_what_is_not_a_tpms_is_left_out() -> None:
    asked, answered = FRAMES[3:5]
    other_port = asked[:36] + b"\1\2" + asked[38:]
    capture = header()
    capture += block(1, struct.pack("<HHI", 113, 0, 0))  # another kind of link
    capture += block(0x0BAD, b"of the future") + block(5, b"statistics")
    capture += packet(asked, 5) + packet(answered, 7)
    for frame in (other_port, asked[:12] + b"\x86\xdd" + asked[14:], asked[:40], b""):
        capture += packet(frame, 8)
    capture += packet(asked, 8, interface=1) + packet(asked, 8, interface=9)
    capture += packet(asked, 8, cut=3)
    assert read(capture) == ([Exchange(5, ASKED, ANSWERED, 2)], "")


def test_padding_of_short_frames_is_not_taken_for_data() -> None:
    acknowledgement = FRAMES[2] + b"padding"
    capture = header() + packet(acknowledgement, 1)
    assert read(capture) == ([], "")


def test_messages_in_several_segments() -> None:
    """As a stream has them: they end where their header says."""
    talk = Conversation(50002)
    capture = file_header() + talk.begin(0)
    for number, part in enumerate((ASKED[:4], ASKED[4:10], ASKED[10:])):
        capture += talk.command(part, 10 + number)
    capture += talk.response(ANSWERED[:11], 20) + talk.response(ANSWERED[11:], 25)
    assert read(capture) == ([Exchange(10, ASKED, ANSWERED, 15)], "")


def test_commands_without_a_response() -> None:
    """At the end, before the next command, at the end of a connection, and of the file."""
    talk = Conversation(50003)
    capture = file_header() + talk.begin(0)
    capture += talk.command(ASKED, 1) + talk.command(tpm.TPM2_READ_CLOCK, 2)
    capture += talk.end(3)
    capture += talk.response(ANSWERED, 4)
    capture += talk.command(ASKED[:7], 5)
    assert read(capture) == (
        [
            Exchange(1, ASKED, None, None),
            Exchange(2, tpm.TPM2_READ_CLOCK, None, None),
            Exchange(4, b"", ANSWERED, None),
            Exchange(5, ASKED[:7], None, None),
        ],
        "",
    )


def test_connections_do_not_disturb_each_other() -> None:
    first, second = Conversation(50004), Conversation(50005)
    capture = file_header() + first.command(ASKED, 1) + second.command(tpm.TPM2_READ_CLOCK, 2)
    capture += first.response(ANSWERED, 3) + second.response(ANSWERED, 1)
    assert read(capture) == (
        [Exchange(1, ASKED, ANSWERED, 2), Exchange(2, tpm.TPM2_READ_CLOCK, ANSWERED, None)],
        "",
    )


def test_a_new_connection_ends_one_of_the_same_port() -> None:
    talk, again = Conversation(50006), Conversation(50006)
    capture = file_header() + talk.command(ASKED, 1) + again.begin(2) + again.response(ANSWERED, 3)
    assert [e.command for e in read(capture)[0]] == [ASKED, b""]


def test_cut_off_anywhere() -> None:
    ends = {0}
    while (end := max(ends)) < len(CAPTURE):
        ends.add(end + struct.unpack_from("<I", CAPTURE, end + 4)[0])
    for size in range(1, len(CAPTURE)):
        found, trouble = read(CAPTURE[:size])
        there = size - max(end for end in ends if end <= size)
        said = f"the file ends within a block, {there} bytes of which are there"
        assert trouble == (said if there else "")
        assert [(e.command, e.response) for e in found] in (
            [],
            [(ASKED, None)],
            [(ASKED, ANSWERED)],
        )
    assert read(b"") == ([], "the file is empty")


@pytest.mark.parametrize(
    ("data", "trouble"),
    [
        (b"root:x:0:0:root", "the file is no capture of the format pcapng"),
        (
            bytes.fromhex("d4c3b2a1020004000000000000000000"),
            "the file is an old pcap file; 'editcap -F pcapng' converts it",
        ),
        (bytes.fromhex("1f8b0800000000000003aaaa"), "the file is compressed; 'gunzip' it first"),
        (block(0x0A0D0D0A, b"nono"), "the file is no capture of the format pcapng"),
        (
            CAPTURE + block(6, b"")[:4] + b"\x0b\0\0\0" * 2,
            f"the file is damaged at byte {len(CAPTURE)}",
        ),
        (CAPTURE + b"\0\0\0\0" * 3, f"the file is damaged at byte {len(CAPTURE)}"),
        (
            CAPTURE + struct.pack("<III", 6, 1 << 30, 0),
            f"the file is damaged at byte {len(CAPTURE)}",
        ),
        (CAPTURE[:-4] + b"\0\0\0\0", f"the file is damaged at byte {len(CAPTURE) - 88}"),
    ],
)
def test_what_is_no_capture_or_a_damaged_one(data: bytes, trouble: str) -> None:
    found, said = read(data, CAPTURE)
    assert said == trouble
    assert found in ([], [ONE])


ORDERED: Final = st.lists(st.sampled_from(FRAMES) | st.binary(max_size=80), max_size=8)


@given(st.binary(max_size=200), ORDERED, st.integers(0, 300), st.sampled_from("<>"))
def test_anything_is_taken(data: bytes, frames: list[bytes], at: int, order: str) -> None:
    capture = header(order) + b"".join(packet(f, n, order) for n, f in enumerate(frames))
    for mixed in (data, capture + data, capture[:at] + data + capture[at + 9 :]):
        whole, trouble = read(mixed)
        assert read(*(mixed[n : n + 7] for n in range(0, len(mixed), 7))) == (whole, trouble)
