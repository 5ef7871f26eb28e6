"""Distinguished names: the text of ``--subject`` to DER. Source: RFC 4514, as GnuTLS reads it.

Attribute names count in either case; an identifier with dots may stand for each,
and alone can be of an attribute without a name, whose value is then an encoding.
A name of several attributes in one component (``CN=a+OU=b``) and quotation marks
are refused, as the C suite refuses them.

By hand: `cryptography` knows neither `cn` nor `EMAIL`, refuses what is longer than X.520 has it,
and makes UTF8Strings of common names and most others, where the C suite has PrintableStrings.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from vtpm_cuse.ca import der

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_X520: Final = {
    "cn": 3,
    "surname": 4,
    "serialnumber": 5,
    "c": 6,
    "l": 7,
    "st": 8,
    "street": 9,
    "o": 10,
    "ou": 11,
    "title": 12,
    "description": 13,
    "businesscategory": 15,
    "postalcode": 17,
    "telephonenumber": 20,
    "name": 41,
    "givenname": 42,
    "initials": 43,
    "generationqualifier": 44,
    "dnqualifier": 46,
    "pseudonym": 65,
}
_ATTRIBUTES: Final[dict[str, tuple[str, Callable[[str], bytes]]]] = {
    **{name: (f"2.5.4.{number}", der.directory_string) for name, number in _X520.items()},
    "uid": ("0.9.2342.19200300.100.1.1", der.directory_string),
    "dc": ("0.9.2342.19200300.100.1.25", der.ia5_string),
    "email": ("1.2.840.113549.1.9.1", der.ia5_string),
}

_BY_IDENTIFIER: Final = dict(_ATTRIBUTES.values())
_IDENTIFIER: Final = re.compile(
    r"([01]\.[1-3]?[0-9]|2\.(0|[1-9][0-9]{0,9}))(\.(0|[1-9][0-9]{0,9}))+"
)

_PART: Final = re.compile(r"(?:\\.|[^\\,])+|,", re.DOTALL)
_PLAIN_PLUS: Final = re.compile(r'(?<!\\)(?:\\\\)*[+"]')
_ESCAPE: Final = re.compile(r"((?:\\[0-9a-fA-F]{2})+)|\\(.)", re.DOTALL)
_ESCAPABLE: Final = frozenset(' "#+,;<=>\\')
_HALF_ESCAPE: Final = re.compile(r"(?<!\\)(?:\\\\)*\\\Z")
_ENCODED: Final = re.compile(r"#((?:[0-9a-fA-F]{2})+)")
_STRING_TAGS: Final = {0x0C: "utf-8", 0x13: "ascii", 0x16: "ascii"}
_MAX: Final = 4096


def directory_name(text: str) -> bytes:
    """The Name (DER) of "C=US,ST=NY,CN=vm1"; its components come in reverse, as RFC 4514 has it.

    Raises:
        ValueError: *text* is no such name; the message says where.
    """
    components = [
        der.set_of(der.sequence(der.oid(identifier), value))
        for identifier, value in _components(text)
    ]
    return der.sequence(*reversed(components))


def common_name(value: str) -> bytes:
    """The Name (DER) of one CN."""
    identifier, encode = _ATTRIBUTES["cn"]
    return der.sequence(der.set_of(der.sequence(der.oid(identifier), encode(value))))


def escaped(value: str) -> str:
    """*value* so that it stands for itself in the text of a name."""
    return re.sub(r'([\\,+"]|^#)', r"\\\1", value)


def _components(text: str) -> Iterator[tuple[str, bytes]]:
    if len(text) > _MAX:
        raise ValueError(f"longer than {_MAX} characters")
    if _HALF_ESCAPE.search(text):
        raise ValueError("a backslash at its end, with nothing behind it")
    if not text:
        raise ValueError("it is empty")
    for part in _parts(text):
        name, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"no '=' in '{part}'")
        identifier, encode = _attribute(name.strip())
        if _PLAIN_PLUS.search(value):
            raise ValueError(f"'+' and '\"' need a backslash in '{part}'")
        if (bare := _stripped(value)).startswith("#"):
            yield identifier, _encoded(bare)
            continue
        if encode is None:
            raise ValueError(f"{name.strip()} needs its value's encoding in hex, as '#0c0161'")
        if not (plain := _ESCAPE.sub(_unescaped, bare)):
            raise ValueError(f"no value in '{part}'")
        try:
            yield identifier, encode(plain)
        except UnicodeEncodeError:
            raise ValueError(f"characters that {name.strip()} cannot have, in '{part}'") from None


def _parts(text: str) -> list[str]:
    parts = [""]
    for found in _PART.findall(text):
        if found == ",":
            parts.append("")
        else:
            parts[-1] = found
    if not parts[-1]:
        parts.pop()  # a comma at the end is none too many, as in the C suite
    if "" in parts:
        raise ValueError("there is nothing before a comma")
    return parts


def _attribute(name: str) -> tuple[str, Callable[[str], bytes] | None]:
    """Its identifier, and how its text is encoded, if that is known."""
    if name.lower() in _ATTRIBUTES:
        return _ATTRIBUTES[name.lower()]
    if not _IDENTIFIER.fullmatch(name):
        raise ValueError(f"unknown attribute '{name}'")
    return name, _BY_IDENTIFIER.get(name)


def _unescaped(match: re.Match[str]) -> str:
    """One character after a backslash, or the bytes of UTF-8 that pairs of digits stand for."""
    if match[1] is None:
        if match[2] not in _ESCAPABLE:
            raise ValueError(f"'\\{match[2]}' stands for nothing; a backslash is '\\\\'")
        return match[2]
    octets = bytes.fromhex(match[1].replace("\\", ""))
    try:
        text = octets.decode()
    except UnicodeDecodeError:
        raise ValueError(f"the bytes '{match[1]}' are no text in UTF-8") from None
    if "\0" in text:
        raise ValueError("a name cannot have a zero byte")
    return text


def _encoded(value: str) -> bytes:
    """A value that is given as its encoding, in hex: a string."""
    found = _ENCODED.fullmatch(value)
    octets = bytes.fromhex(found[1]) if found else b""
    charset = _STRING_TAGS.get(octets[0]) if octets else None
    if charset is None:
        raise ValueError(f"'{value}' is no string's encoding in hex; a number sign is '\\#'")
    try:
        text = octets[2:].decode(charset)
    except UnicodeDecodeError:
        text = ""
    if not text or "\0" in text or octets != der.tlv(octets[0], octets[2:]):
        raise ValueError(f"'{value}' is damaged, or encodes no text of up to 127 bytes")
    return octets


def _stripped(value: str) -> str:
    """Without the spaces around, but with an escaped one at the end."""
    bare = value.strip()
    return bare + " " if bare.endswith("\\") and value.lstrip() != bare else bare
