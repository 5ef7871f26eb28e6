"""One declaration for each structure, two byte orders.

A `WireStruct` lists its integer fields once; `wire` makes it a frozen
dataclass and compiles a `struct.Struct` for the host order (ioctl arguments,
kernel protocols) and for big-endian (TPM, control channel). Field offsets agree
in both because padding is explicit. A structure may end in one field of bytes,
its tail.

Modules that declare structures do without ``from __future__ import
annotations``: the field types are read here, at import.
"""

import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, ClassVar, Self, TypeVar, dataclass_transform

from vtpm_cuse.errors import WireError

U8 = Annotated[int, "B"]
U16 = Annotated[int, "H"]
U32 = Annotated[int, "I"]
I32 = Annotated[int, "i"]
U64 = Annotated[int, "Q"]
Tail = Annotated[bytes, ""]

Buffer = bytes | bytearray | memoryview


class ByteOrder(Enum):
    """HOST for ioctl arguments and kernel protocols, BIG for the TPM, LITTLE for linear files."""

    HOST = "<" if sys.byteorder == "little" else ">"
    BIG = ">"
    LITTLE = "<"  # one of the two is an alias of HOST, and rightly so


HOST, BIG, LITTLE = ByteOrder.HOST, ByteOrder.BIG, ByteOrder.LITTLE


@dataclass(frozen=True, slots=True)
class WireStruct:
    """Base of all structures; `wire` fills in the class variables.

    Attributes:
        SIZE: Bytes of the fixed part, padding included.
        TAIL: Largest size of the tail in bytes (the array's size in the ioctl
            argument); 0 for a structure without a tail.
    """

    SIZE: ClassVar[int]
    TAIL: ClassVar[int]
    _structs: ClassVar[dict[ByteOrder, struct.Struct]]
    _names: ClassVar[tuple[str, ...]]

    @classmethod
    def compiled(cls, order: ByteOrder) -> struct.Struct:
        """The fixed part's `struct.Struct`, for hot paths that want a bare tuple."""
        return cls._structs[order]

    def pack(self, order: ByteOrder) -> bytes:
        """The fixed part with zero padding, then the tail as it is."""
        values = [getattr(self, name) for name in self._names]
        if self.TAIL:
            return self._structs[order].pack(*values[:-1]) + bytes(values[-1])
        return self._structs[order].pack(*values)

    @classmethod
    def unpack_untrusted(cls, data: Buffer, order: ByteOrder) -> Self:
        """Reads the structure at the start of *data*; what follows is the tail, if it has one.

        Raises:
            WireError: *data* is shorter than `SIZE`.
        """
        if len(data) < cls.SIZE:
            raise WireError(cls.__name__, cls.SIZE, len(data))
        make: Callable[..., Self] = cls
        values = cls._structs[order].unpack_from(data)
        return make(*values, bytes(data[cls.SIZE :])) if cls.TAIL else make(*values)


S = TypeVar("S", bound=WireStruct)


@dataclass_transform(frozen_default=True)
def wire(*, pad: int = 0, tail: int = 0) -> Callable[[type[S]], type[S]]:
    """Completes a structure declaration.

    Args:
        pad: Zero bytes that end the fixed part.
        tail: Largest size of the last field, which is then declared as `Tail`.
    """

    def complete(cls: type[S]) -> type[S]:
        made = dataclass(frozen=True, slots=True)(cls)
        made._names = tuple(cls.__annotations__)
        codes = "".join(kind.__metadata__[0] for kind in cls.__annotations__.values())
        made._structs = {order: struct.Struct(f"{order.value}{codes}{pad}x") for order in ByteOrder}
        made.SIZE = made._structs[HOST].size
        made.TAIL = tail
        return made

    return complete
