"""One declaration for each structure, two byte orders.

A `WireStruct` lists its integer fields once; `wire` makes it a tuple with
names (a dataclass takes a program's start ten times as long) and compiles a `struct.Struct` for the host order (ioctl arguments,
kernel protocols) and for big-endian (TPM, control channel). Field offsets agree
in both because padding is explicit. A structure may end in one field of bytes,
its tail.

Modules that declare structures do without ``from __future__ import
annotations``: the field types are read here, at import.
"""

import struct
import sys
from collections.abc import Callable
from enum import Enum
from operator import itemgetter
from typing import Annotated, Any, ClassVar, Self, TypeVar, dataclass_transform

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


class WireStruct(tuple[Any, ...]):  # Any: integers, and bytes as the tail
    """Base of all structures; `wire` fills in the class variables.

    Attributes:
        SIZE: Bytes of the fixed part, padding included.
        TAIL: Largest size of the tail in bytes (the array's size in the ioctl
            argument); 0 for a structure without a tail.
    """

    __slots__ = ()
    SIZE: ClassVar[int]
    TAIL: ClassVar[int]
    _structs: ClassVar[dict[ByteOrder, struct.Struct]]
    _names: ClassVar[tuple[str, ...]]
    _defaults: ClassVar[dict[str, int]]

    def __new__(cls, *values: int | bytes, **named: int | bytes) -> Self:
        """Each field by its place or its name."""
        if named or len(values) != len(cls._names):
            given = {**cls._defaults, **dict(zip(cls._names, values, strict=False)), **named}
            if len(values) > len(cls._names) or given.keys() != set(cls._names):
                raise TypeError(f"{cls.__name__} takes {', '.join(cls._names) or 'nothing'}")
            values = tuple(given[name] for name in cls._names)
        return super().__new__(cls, values)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and super().__eq__(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return super().__hash__()

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        fields = (f"{name}={value!r}" for name, value in zip(self._names, self, strict=True))
        return f"{type(self).__name__}({', '.join(fields)})"

    @classmethod
    def compiled(cls, order: ByteOrder) -> struct.Struct:
        """The fixed part's `struct.Struct`, for hot paths that want a bare tuple."""
        return cls._structs[order]

    def pack(self, order: ByteOrder) -> bytes:
        """The fixed part with zero padding, then the tail as it is."""
        if self.TAIL:
            return self._structs[order].pack(*self[:-1]) + bytes(self[-1])
        return self._structs[order].pack(*self)

    @classmethod
    def unpack_untrusted(cls, data: Buffer, order: ByteOrder) -> Self:
        """Reads the structure at the start of *data*; what follows is the tail, if it has one.

        Raises:
            WireError: *data* is shorter than `SIZE`.
        """
        if len(data) < cls.SIZE:
            raise WireError(cls.__name__, cls.SIZE, len(data))
        values = cls._structs[order].unpack_from(data)
        return cls(*values, bytes(data[cls.SIZE :])) if cls.TAIL else cls(*values)


S = TypeVar("S", bound=WireStruct)

_OF_INSTANCES = {"__dict__", "__weakref__"}


@dataclass_transform(frozen_default=True)
def wire(*, pad: int = 0, tail: int = 0) -> Callable[[type[S]], type[S]]:
    """Completes a structure declaration.

    Args:
        pad: Zero bytes that end the fixed part.
        tail: Largest size of the last field, which is then declared as `Tail`.
    """

    def complete(cls: type[S]) -> type[S]:
        kinds = cls.__annotations__
        kept = {name: value for name, value in vars(cls).items() if name not in _OF_INSTANCES}
        fields = {name: property(itemgetter(place)) for place, name in enumerate(kinds)}
        made: type[S] = type(cls.__name__, cls.__bases__, {**kept, **fields, "__slots__": ()})
        made._names = tuple(kinds)
        made._defaults = {name: kept[name] for name in kinds if name in kept}
        codes = "".join(kind.__metadata__[0] for kind in kinds.values())
        made._structs = {order: struct.Struct(f"{order.value}{codes}{pad}x") for order in ByteOrder}
        made.SIZE = made._structs[HOST].size
        made.TAIL = tail
        return made

    return complete
