"""Packet captures: a conversation with a TPM as the TCP connection that analysers know.

draft-ietf-opsawg-pcapng; Wireshark takes port 2321 for a TPM's. Pure: gives the bytes of a file.

By hand, for three kinds of block are all there is, and the headers of Ethernet, IP and TCP in them,
for which a library of captures would need a second one.
"""

from __future__ import annotations

import struct
from typing import Final

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
