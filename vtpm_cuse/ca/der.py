"""DER, as much of it as a certificate needs. Source: ITU-T X.690.

By hand, for `cryptography`'s builder signs nothing with SHA-1, as the certificates of a TPM 1.2
are signed, takes no serial number of 160 bits, and has no PrintableString for common names, as
those of the C suite have.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import datetime

NULL: Final = b"\x05\x00"

_PRINTABLE: Final = re.compile(r"[A-Za-z0-9 '()+,\-./:=?]*")


def tlv(tag: int, *parts: bytes) -> bytes:
    """Tag, length and the *parts* one after the other."""
    body = b"".join(parts)
    if len(body) < 0x80:
        return bytes([tag, len(body)]) + body
    size = len(body).to_bytes((len(body).bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(size)]) + size + body


def sequence(*parts: bytes) -> bytes:
    """SEQUENCE."""
    return tlv(0x30, *parts)


def set_of(*parts: bytes) -> bytes:
    """SET OF, in the order that DER wants."""
    return tlv(0x31, *sorted(parts))


def context(number: int, *parts: bytes) -> bytes:
    """Context tag, constructed."""
    return tlv(0xA0 | number, *parts)


def boolean(value: bool) -> bytes:
    """BOOLEAN."""
    return tlv(0x01, b"\xff" if value else b"\x00")


def integer(value: int) -> bytes:
    """INTEGER. Raises ValueError for a negative one: nothing in a certificate is."""
    if value < 0:
        raise ValueError(f"{value} is negative")
    return tlv(0x02, value.to_bytes(value.bit_length() // 8 + 1, "big"))


def bit_string(octets: bytes, unused_bits: int = 0) -> bytes:
    """BIT STRING."""
    return tlv(0x03, bytes([unused_bits]), octets)


def named_bits(*numbers: int) -> bytes:
    """BIT STRING with these bits set, without zero bits at its end."""
    last = max(numbers)
    value = sum(0x80 >> number % 8 << 8 * (last // 8 - number // 8) for number in numbers)
    return bit_string(value.to_bytes(last // 8 + 1, "big"), 7 - last % 8)


def octet_string(octets: bytes) -> bytes:
    """OCTET STRING."""
    return tlv(0x04, octets)


def oid(dotted: str) -> bytes:
    """OBJECT IDENTIFIER, of "2.23.133.8.1" for example."""
    first, second, *rest = (int(number) for number in dotted.split("."))
    return tlv(0x06, *(_base128(number) for number in (first * 40 + second, *rest)))


def _base128(number: int) -> bytes:
    septets = [number & 0x7F]
    while number := number >> 7:
        septets.append(number & 0x7F | 0x80)
    return bytes(reversed(septets))


def utf8_string(text: str) -> bytes:
    """UTF8String."""
    return tlv(0x0C, text.encode())


def directory_string(text: str) -> bytes:
    """PrintableString where its alphabet allows, else UTF8String."""
    return tlv(0x13, text.encode()) if _PRINTABLE.fullmatch(text) else utf8_string(text)


def ia5_string(text: str) -> bytes:
    """IA5String. Raises ValueError for what is not ASCII."""
    return tlv(0x16, text.encode("ascii"))


def time(moment: datetime) -> bytes:
    """UTCTime up to 2049 and GeneralizedTime from 2050, as RFC 5280 wants. *moment* is UTC."""
    if 1950 <= moment.year < 2050:
        return tlv(0x17, moment.strftime("%y%m%d%H%M%SZ").encode())
    return tlv(0x18, f"{moment.year:04}{moment:%m%d%H%M%SZ}".encode())


def elements(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Tag and contents of the elements that *data* is, one after the other.

    Raises ValueError for what is none, and for tags of more than a byte, which nothing here has.
    """
    at = 0
    while at < len(data):
        head = data[at : at + 2]
        if len(head) < 2 or head[0] & 0x1F == 0x1F:
            raise ValueError("it is no DER")
        at, size = at + 2, head[1]
        if size & 0x80:
            width = size & 0x7F
            size = int.from_bytes(data[at : at + width], "big")
            at += width
            if not width or at > len(data):
                raise ValueError("it is no DER")
        if size > len(data) - at:
            raise ValueError("it is cut off")
        yield head[0], data[at : at + size]
        at += size
