"""Structures of no fixed size, as TPM commands and responses have them: declared once.

A `TpmStruct` lists its fields in order; `marshalled` makes it a frozen dataclass
that packs itself and is read back from front to back, big-endian. Besides the
integers of `wire.layout` a field may be another `TpmStruct`, or one of the kinds
below. Nothing is ever read at a fixed offset.

Modules that declare structures do without ``from __future__ import
annotations``: the field types are read here, at import.

By hand: tpm2-pytss knows no TPM 1.2, and has to be compiled, with tpm2-tss there.
"""

import struct
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Protocol, Self, TypeVar, dataclass_transform

from vtpm_cuse.errors import WireError
from vtpm_cuse.wire.layout import Buffer


class Reader:
    """Takes received bytes apart, from front to back.

    Args:
        data: The bytes.
        what: Their name, for errors.
    """

    def __init__(self, data: Buffer, what: str) -> None:
        self._data, self._what, self._at = bytes(data), what, 0

    @property
    def left(self) -> int:
        """Bytes not taken yet."""
        return len(self._data) - self._at

    def take(self, size: int) -> bytes:
        """The next *size* bytes. Raises WireError when fewer are left."""
        if size > self.left:
            raise WireError(self._what, self._at + size, len(self._data))
        start, self._at = self._at, self._at + size
        return self._data[start : self._at]

    def number(self, size: int) -> int:
        """The next *size* bytes as a number. Raises WireError."""
        return int.from_bytes(self.take(size), "big")

    def end(self) -> None:
        """Raises WireError when anything is left."""
        if self.left:
            raise WireError(self._what, self._at, len(self._data))


class Codec(Protocol):
    """How one kind of field is written and read."""

    def write(self, value: Any) -> bytes:  # noqa: ANN401 - each codec has its own type
        """The bytes of *value*."""

    def read(self, reader: Reader) -> Any:  # noqa: ANN401
        """The value at the front of what *reader* has left. Raises WireError."""


class _Int:
    def __init__(self, code: str) -> None:
        self._struct = struct.Struct(">" + code)

    def write(self, value: int) -> bytes:
        return self._struct.pack(value)

    def read(self, reader: Reader) -> int:
        (value,) = self._struct.unpack(reader.take(self._struct.size))
        return int(value)


class _Sized:
    """Bytes behind their length, a number of *width* bytes."""

    def __init__(self, width: int) -> None:
        self._width = width

    def write(self, value: bytes) -> bytes:
        return len(value).to_bytes(self._width, "big") + value

    def read(self, reader: Reader) -> bytes:
        return reader.take(reader.number(self._width))


class _Fixed:
    def __init__(self, size: int) -> None:
        self._size = size

    def write(self, value: bytes) -> bytes:
        if len(value) != self._size:
            raise WireError("field", self._size, len(value))
        return value

    def read(self, reader: Reader) -> bytes:
        return reader.take(self._size)


class _Nested:
    def __init__(self, kind: "type[TpmStruct]") -> None:
        self._kind = kind

    def write(self, value: "TpmStruct") -> bytes:
        return value.pack()

    def read(self, reader: Reader) -> "TpmStruct":
        return self._kind.read(reader)


class ListOf:
    """Structures behind their count, a number of 4 bytes (TPML_*); for ``Annotated``."""

    def __init__(self, kind: "type[TpmStruct]") -> None:
        self._kind = kind

    def write(self, value: "tuple[TpmStruct, ...]") -> bytes:
        """The count, then each structure."""
        return len(value).to_bytes(4, "big") + b"".join(item.pack() for item in value)

    def read(self, reader: Reader) -> "tuple[TpmStruct, ...]":
        """As many as the count says; WireError when the bytes run out before."""
        return tuple(self._kind.read(reader) for _ in range(reader.number(4)))


Sized16 = Annotated[bytes, _Sized(2)]
"""TPM 2.0's sized buffer (TPM2B_*)."""
Sized32 = Annotated[bytes, _Sized(4)]
"""TPM 1.2's: a size of 4 bytes, then the bytes."""
Sized8 = Annotated[bytes, _Sized(1)]
Digest20 = Annotated[bytes, _Fixed(20)]
"""SHA-1 digest, nonce or auth value of TPM 1.2."""


@dataclass(frozen=True)
class TpmStruct:
    """Base of all such structures; `marshalled` fills in the class variable."""

    _codecs: ClassVar[dict[str, Codec]]

    def pack(self) -> bytes:
        """The structure as it goes over the wire."""
        return b"".join(codec.write(getattr(self, name)) for name, codec in self._codecs.items())

    @classmethod
    def read(cls, reader: Reader) -> Self:
        """The structure at the front of what *reader* has left. Raises WireError."""
        return cls(**{name: codec.read(reader) for name, codec in cls._codecs.items()})

    @classmethod
    def unpack_untrusted(cls, data: Buffer) -> Self:
        """*data* as this structure and nothing else. Raises WireError."""
        reader = Reader(data, cls.__name__)
        value = cls.read(reader)
        reader.end()
        return value


S = TypeVar("S", bound=TpmStruct)


@dataclass_transform(frozen_default=True)
def marshalled(cls: type[S]) -> type[S]:
    """Completes a structure declaration."""
    made = dataclass(frozen=True)(cls)
    made._codecs = {name: _codec(kind) for name, kind in cls.__annotations__.items()}
    return made


def _codec(kind: Any) -> Codec:  # noqa: ANN401 - an annotation may be anything
    if isinstance(kind, type) and issubclass(kind, TpmStruct):
        return _Nested(kind)
    codec = kind.__metadata__[0]
    return _Int(codec) if isinstance(codec, str) else codec
