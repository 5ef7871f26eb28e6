"""Packet captures: a conversation with a TPM as the TCP connection that analysers know.

draft-ietf-opsawg-pcapng; Wireshark takes port 2321 for a TPM's. Pure: gives the bytes of a file,
and takes them.

By hand, for three kinds of block are all there is, and the headers of Ethernet, IP and TCP in them,
for which a library of captures would need a second one.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from vtpm_cuse.wire.tpm import TPM_HEADER_SIZE, command_size

TPM_PORT: Final = 2321

_BYTE_ORDER_MAGIC: Final = 0x1A2B3C4D
_SECTION_HEADER: Final = 0x0A0D0D0A
_INTERFACE_DESCRIPTION: Final = 1
_ENHANCED_PACKET: Final = 6
_LINKTYPE_ETHERNET: Final = 1

_ETHERNET_IPV4: Final = bytes(12) + b"\x08\x00"
_LOOPBACK: Final = bytes([127, 0, 0, 1])
_IPPROTO_TCP: Final = 6
_FIN, _SYN, _PSH, _ACK = 1, 2, 8, 16
_WINDOW: Final = 0xFFFF

_BLOCK_MAX: Final = 16 << 20
"""Bytes of a block beyond which a capture is taken for damaged."""
_OPTION_END: Final = 0
_OPTION_RESOLUTION: Final = 9  # if_tsresol
_MICROSECONDS: Final = 1_000_000
_OTHERS: Final = {
    bytes.fromhex(magic): what
    for magics, what in (
        (
            "d4c3b2a1 a1b2c3d4 4d3cb2a1 a1b23c4d",
            "an old pcap file; 'editcap -F pcapng' converts it",
        ),
        ("1f8b0800 1f8b0808", "compressed; 'gunzip' it first"),
    )
    for magic in magics.split()
}
"""What else may be named as a capture, by its first bytes."""


def file_header() -> bytes:
    """What a capture begins with; in the middle of one it begins another section."""
    section = struct.pack("<IHHq", _BYTE_ORDER_MAGIC, 1, 0, -1)
    interface = struct.pack("<HHI", _LINKTYPE_ETHERNET, 0, 0)
    return _block(_SECTION_HEADER, section) + _block(_INTERFACE_DESCRIPTION, interface)


class Conversation:
    """The packets of one connection, from 127.0.0.1 to itself.

    Args:
        port: The client's.
        checksums: Compute them; analysers take zeros for work left to the network card.
    """

    def __init__(self, port: int, *, checksums: bool = False) -> None:
        self._ports = (port, TPM_PORT)
        self._checksums = checksums
        self._sent = [0, 0]  # sequence numbers of client and server

    def begin(self, micros: int) -> bytes:
        """The handshake, at *micros* since 1970."""
        return (
            self._packet(0, _SYN, micros)
            + self._packet(1, _SYN | _ACK, micros)
            + self._packet(0, _ACK, micros)
        )

    def command(self, data: bytes, micros: int) -> bytes:
        """What the client sends."""
        return self._packet(0, _PSH | _ACK, micros, data)

    def response(self, data: bytes, micros: int) -> bytes:
        """What the server answers."""
        return self._packet(1, _PSH | _ACK, micros, data)

    def end(self, micros: int) -> bytes:
        """The client closes, then the server."""
        return (
            self._packet(0, _FIN | _ACK, micros)
            + self._packet(1, _FIN | _ACK, micros)
            + self._packet(0, _ACK, micros)
        )

    def _packet(self, sender: int, flags: int, micros: int, data: bytes = b"") -> bytes:
        peer = 1 - sender
        acknowledged = self._sent[peer] if flags & _ACK else 0
        ports = (self._ports[sender], self._ports[peer])
        tcp = struct.pack(
            "!HHIIBBHHH", *ports, self._sent[sender], acknowledged, 5 << 4, flags, _WINDOW, 0, 0
        )
        length = len(tcp) + len(data)
        ip = struct.pack(
            "!BBHHHBBH4s4s",
            *(0x45, 0, 20 + length, 0, 0x4000, 64, _IPPROTO_TCP, 0, _LOOPBACK, _LOOPBACK),
        )
        if self._checksums:
            pseudo = _LOOPBACK * 2 + struct.pack("!HH", _IPPROTO_TCP, length)
            tcp = tcp[:16] + _checksum(pseudo + tcp + data) + tcp[18:]
            ip = ip[:10] + _checksum(ip) + ip[12:]
        step = len(data) + bool(flags & (_SYN | _FIN))
        self._sent[sender] = (self._sent[sender] + step) & 0xFFFF_FFFF
        frame = _ETHERNET_IPV4 + ip + tcp + data
        head = struct.pack("<IIIII", 0, micros >> 32, micros & 0xFFFF_FFFF, len(frame), len(frame))
        return _block(_ENHANCED_PACKET, head + frame)


def _block(kind: int, body: bytes) -> bytes:
    body += bytes(-len(body) % 4)
    size = len(body) + 12
    return struct.pack("<II", kind, size) + body + struct.pack("<I", size)


def _checksum(data: bytes) -> bytes:
    """The ones' complement sum of RFC 1071."""
    data += bytes(len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return struct.pack("!H", ~total & 0xFFFF)


class Exchange(NamedTuple):
    """A command and its response, as a capture has them.

    Attributes:
        micros: When the command was sent, in microseconds since 1970.
        command: The command; empty where the capture begins with a response.
        response: The response; None where none came.
        duration: Microseconds between the two; None where nobody can tell.
    """

    micros: int
    command: bytes
    response: bytes | None
    duration: int | None


class _Interface(NamedTuple):
    linktype: int
    ticks: int  # a second


class CaptureReader:
    """Takes a capture as it comes, in pieces of any size, and gives what TPMs were asked in it.

    Ours, and what others capture of TCP over IPv4 on Ethernet with a TPM's port. Blocks and packets
    of any other kind are left out. Nothing here raises.

    Attributes:
        trouble: Why it cannot be read from here on; empty while it can.
        packets: How many packets have been read, those that are none of a TPM among them.
    """

    def __init__(self) -> None:
        self.trouble = ""
        self.packets = 0
        self._left = bytearray()
        self._at = 0  # of all that came, what was read
        self._order = ""
        self._interfaces: list[_Interface] = []
        self._talks: dict[bytes, _Talk] = {}

    def feed(self, data: bytes) -> list[Exchange]:
        """What is complete with these bytes, in the order of its end."""
        found: list[Exchange] = []
        self._left += data
        start = 0
        while not self.trouble and (size := self._block_size(start)):
            found += self._read_block(bytes(self._left[start : start + size]))
            start += size
            self._at += size
        del self._left[: len(self._left) if self.trouble else start]
        return found

    def end(self) -> list[Exchange]:
        """Nothing follows: the commands without a response, in the order of their beginning."""
        if self._left:
            self.trouble = (
                f"the file ends within a block, {len(self._left)} bytes of which are there"
            )
        elif not self._order and not self.trouble:
            self.trouble = "the file is empty"
        found = [exchange for talk in self._talks.values() for exchange in talk.end()]
        self._talks.clear()
        return sorted(found, key=lambda exchange: exchange.micros)

    def _block_size(self, start: int) -> int:
        """The size of the block that begins there, 0 if more has to come; sets *trouble*."""
        head = bytes(self._left[start : start + 12])
        if len(head) < 12:
            return 0
        if head[:4] == _SECTION_HEADER.to_bytes(4, "big"):  # the same in both orders
            magic = _BYTE_ORDER_MAGIC.to_bytes(4, "little")
            self._order = {magic: "<", magic[::-1]: ">"}.get(head[8:], "")
        if not self._order:
            what = _OTHERS.get(head[:4], "no capture of the format pcapng")
            self.trouble = f"the file is {what}" if not self._at else self._damaged()
            return 0
        (size,) = struct.unpack_from(f"{self._order}I", head, 4)
        if size < 12 or size % 4 or size > _BLOCK_MAX:
            self.trouble = self._damaged()
            return 0
        return size if len(self._left) - start >= size else 0

    def _damaged(self) -> str:
        return f"the file is damaged at byte {self._at}"

    def _read_block(self, block: bytes) -> list[Exchange]:
        order = self._order
        (kind,) = struct.unpack_from(f"{order}I", block)
        if block[-4:] != block[4:8]:
            self.trouble = self._damaged()
            return []
        body = block[8:-4]
        if kind == _SECTION_HEADER:
            self._interfaces = []
        elif kind == _INTERFACE_DESCRIPTION and len(body) >= 8:
            (linktype,) = struct.unpack_from(f"{order}H", body)
            self._interfaces.append(_Interface(linktype, _ticks(body[8:], order)))
        elif kind == _ENHANCED_PACKET and len(body) >= 20:
            number, high, low, size, whole = struct.unpack_from(f"{order}5I", body)
            self.packets += 1
            if number < len(self._interfaces) and size == whole and size <= len(body) - 20:
                interface = self._interfaces[number]
                micros = (high << 32 | low) * _MICROSECONDS // interface.ticks
                if interface.linktype == _LINKTYPE_ETHERNET:
                    return self._read_frame(body[20 : 20 + size], micros)
        return []

    def _read_frame(self, frame: bytes, micros: int) -> list[Exchange]:
        segment = _segment(frame)
        if segment is None:
            return []
        talk = self._talks.setdefault(segment.client, _Talk())
        found = talk.end() if segment.flags & _SYN else []
        if segment.data:
            found += (talk.command if segment.to_tpm else talk.response)(segment.data, micros)
        if segment.flags & _FIN:
            found += talk.end()
        return found


class _Segment(NamedTuple):
    client: bytes  # address and port
    to_tpm: bool
    flags: int
    data: bytes


def _segment(frame: bytes) -> _Segment | None:
    """The TCP segment of a TPM's connection in an Ethernet frame, None for any other frame."""
    ip = frame[14:]
    if frame[12:14] != _ETHERNET_IPV4[12:] or len(ip) < 20 or ip[9] != _IPPROTO_TCP:
        return None
    head, size = (ip[0] & 15) * 4, int.from_bytes(ip[2:4], "big")
    tcp = ip[head : size or None]  # 0 is work left to the network card
    if ip[0] >> 4 != 4 or head < 20 or len(tcp) < 20:
        return None
    to_tpm = tcp[2:4] == TPM_PORT.to_bytes(2, "big")
    if not to_tpm and tcp[:2] != TPM_PORT.to_bytes(2, "big"):
        return None
    client = ip[12:16] + tcp[:2] if to_tpm else ip[16:20] + tcp[2:4]
    return _Segment(client, to_tpm, tcp[13], tcp[(tcp[12] >> 4) * 4 :])


def _ticks(options: bytes, order: str) -> int:
    """How often the clock of an interface ticks in a second, by its options."""
    at = 0
    while at + 4 <= len(options):
        kind, size = struct.unpack_from(f"{order}HH", options, at)
        if kind == _OPTION_END:
            break
        if kind == _OPTION_RESOLUTION and size == 1 and at + 4 < len(options):
            exponent = options[at + 4]
            return int(1 << (exponent & 0x7F)) if exponent & 0x80 else int(10**exponent)
        at += 4 + size + -size % 4
    return _MICROSECONDS


class _Talk:
    """One connection: commands and responses in turn, of one segment or several.

    A message ends where its header says, or where the other side speaks: of two commands with no
    response between, the first was never answered.
    """

    def __init__(self) -> None:
        self._command, self._sent = bytearray(), 0
        self._response, self._answered = bytearray(), 0

    def command(self, data: bytes, micros: int) -> list[Exchange]:
        """A segment from the client; what it brings to an end."""
        found = self.end() if self._response or _complete(self._command) else []
        if not self._command:
            self._sent = micros
        self._command += data
        return found

    def response(self, data: bytes, micros: int) -> list[Exchange]:
        """A segment from the TPM; what it brings to an end."""
        self._response += data
        self._answered = micros
        return self.end() if _complete(self._response) else []

    def end(self) -> list[Exchange]:
        """What there is, if anything."""
        if not self._command and not self._response:
            return []
        known = self._command and self._response and self._answered >= self._sent
        found = Exchange(
            self._sent if self._command else self._answered,
            bytes(self._command),
            bytes(self._response) or None,
            self._answered - self._sent if known else None,
        )
        self._command, self._response = bytearray(), bytearray()
        return [found]


def _complete(message: bytearray) -> bool:
    return len(message) >= TPM_HEADER_SIZE and len(message) >= command_size(message)
