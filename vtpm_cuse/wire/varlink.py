"""Varlink (https://varlink.org): messages, and interfaces that are declared once.

A message is a JSON object that ends with a NUL byte. What a method takes and gives is a named
tuple: of its annotations the interface's description is made, and by them what comes is checked.
A field ``last_used`` is ``lastUsed`` on the wire. Annotations are str, int, float, bool, a Literal
(an enum), another named tuple, ``list[X]``, ``dict[str, X]``, and ``X | None`` for what may be
left out, whose default is None.
"""

from __future__ import annotations

import json
import re
import types
from collections.abc import Callable
from functools import cache
from typing import (
    TYPE_CHECKING,
    Any,
    Final,
    Literal,
    NamedTuple,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from vtpm_cuse.errors import MessageError

if TYPE_CHECKING:
    from collections.abc import Iterator

# Any: JSON, and annotations at run time.
Json = dict[str, Any]
Value = TypeVar("Value")
Reader = Callable[[Any], Any]

CALL_MAX: Final = 1 << 19
REPLY_MAX: Final = 1 << 20
"""Bytes of a message, the NUL left out: a reply may show what several calls have set."""
_END: Final = b"\0"
_INT_MAX: Final = (1 << 63) - 1

# -- messages -----------------------------------------------------------------------------


class Call(NamedTuple):
    """What a client wants.

    Attributes:
        method: With its interface in front.
        parameters: As JSON has them.
        more: Several replies are welcome.
        oneway: None is wanted.
        upgrade: Something else is to be spoken afterwards.
    """

    method: str
    parameters: Json
    more: bool = False
    oneway: bool = False
    upgrade: bool = False


class Reply(NamedTuple):
    """What it is answered.

    Attributes:
        parameters: As JSON has them, the error's where there is one.
        continues: Another reply follows.
        error: Its name, with its interface in front; else empty.
    """

    parameters: Json
    continues: bool = False
    error: str = ""


def encode_call(call: Call) -> bytes:
    """The message with its end."""
    flags = {name: True for name in ("more", "oneway", "upgrade") if getattr(call, name)}
    return _encoded({"method": call.method, "parameters": call.parameters, **flags})


def encode_reply(reply: Reply) -> bytes:
    """The message with its end."""
    message: Json = {"parameters": reply.parameters}
    if reply.continues:
        message["continues"] = True
    if reply.error:
        message["error"] = reply.error
    return _encoded(message)


def decode_call(message: bytes) -> Call:
    """A message without its end. Raises MessageError."""
    found = _decoded(message)
    flags = (_typed(found, name, bool, default=False) for name in ("more", "oneway", "upgrade"))
    return Call(_typed(found, "method", str), _parameters(found), *flags)


def decode_reply(message: bytes) -> Reply:
    """A message without its end. Raises MessageError."""
    found = _decoded(message)
    continues = _typed(found, "continues", bool, default=False)
    return Reply(_parameters(found), continues, _typed(found, "error", str, default=""))


class Messages:
    """Cuts messages from a stream; none has more than *most* bytes."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._begun = bytearray()
        self._searched = 0

    def __bool__(self) -> bool:
        """Whether there is a part of a message, or one that nobody has taken."""
        return bool(self._begun)

    def feed(self, data: bytes) -> None:
        """Takes what has come."""
        self._begun += data

    def take(self) -> bytes | None:
        """The next message without its end, None while it has not come whole.

        Raises:
            MessageError: It is longer than any.
        """
        end = self._begun.find(_END, self._searched)
        if (len(self._begun) if end < 0 else end) > self._most:
            raise MessageError(f"A message is longer than {self._most} bytes")
        if end < 0:
            self._searched = len(self._begun)
            return None
        message = bytes(self._begun[:end])
        del self._begun[: end + 1]
        self._searched = 0
        return message


def _encoded(message: Json) -> bytes:
    """NUL is escaped in JSON as all control characters are; so is what is not ASCII here."""
    return _ENCODER.encode(message).encode() + _END


def _decoded(message: bytes) -> Json:
    try:
        found = _DECODER.decode(message.decode("utf-8"))
    except (ValueError, RecursionError) as exc:
        raise MessageError("A message is no JSON") from exc
    if not isinstance(found, dict):
        raise MessageError("A message is no object")
    return found


def _no_number(word: str) -> float:
    raise ValueError(word)


_ENCODER: Final = json.JSONEncoder(separators=(",", ":"), allow_nan=False)
_DECODER: Final = json.JSONDecoder(parse_constant=_no_number)


def _parameters(found: Json) -> Json:
    if found.get("parameters") is None:
        return {}
    parameters: Json = _typed(found, "parameters", dict)
    return parameters


def _typed(found: Json, name: str, kind: type[Any], *, default: object = None) -> Any:  # noqa: ANN401
    value = found.get(name, default)
    if type(value) is not kind:
        raise MessageError(f"'{name}' of a message is no {kind.__name__}")
    return value


# -- values -------------------------------------------------------------------------------


class BadParameter(ValueError):
    """A value is not what its annotation says.

    Attributes:
        name: Where it is, as the wire has it.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


def to_json(value: NamedTuple) -> Json:
    """As it goes over the wire; what is None is left out."""
    pairs = zip(value._fields, value, strict=True)
    return {_wire_name(name): _plain(part) for name, part in pairs if part is not None}


def from_json(kind: Callable[..., Value], found: Json, *, strict: bool = True) -> Value:
    """The value that JSON says.

    Args:
        kind: Its type, a named tuple.
        found: What has come.
        strict: A name that the type does not know is an error, as it is in what clients ask for; a
            newer server may tell more than its client knows.

    Raises:
        BadParameter: It is not of this type.
    """
    known = _readers(kind, strict=strict)
    if strict and (unknown := found.keys() - known.keys()):
        raise BadParameter(min(unknown))
    values = {}
    for name, (field, read) in known.items():
        try:
            values[field] = read(found.get(name))
        except BadParameter as exc:
            raise BadParameter(f"{name}.{exc.name}") from None
        except ValueError as exc:
            raise BadParameter(name) from exc
    return kind(**values)


@cache
def _fields(kind: Callable[..., object]) -> dict[str, tuple[str, Any]]:
    """Name on the wire to name in Python and annotation."""
    return {_wire_name(name): (name, hint) for name, hint in get_type_hints(kind).items()}


@cache
def _readers(kind: Callable[..., object], *, strict: bool) -> dict[str, tuple[str, Reader]]:
    """Name on the wire to name in Python and what checks a value."""
    fields = _fields(kind).items()
    return {name: (field, _reader(hint, strict=strict)) for name, (field, hint) in fields}


@cache
def _wire_name(name: str) -> str:
    first, *others = name.split("_")
    return first + "".join(map(str.capitalize, others))


def _plain(value: Any) -> Any:  # noqa: ANN401
    if type(value) in _BASIC:
        return value
    if isinstance(value, tuple):
        return to_json(value)  # type: ignore[arg-type]  # lists are lists, other tuples are named
    if isinstance(value, list):
        return list(map(_plain, value))
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    return value


def _reader(annotation: Any, *, strict: bool) -> Reader:  # noqa: ANN401
    """What gives the value that JSON says, and raises ValueError where it is none."""
    optional, kind = _optional(annotation)
    origin, of = get_origin(kind), get_args(kind)
    read: Reader
    if origin is Literal:
        read = _checked(lambda value: isinstance(value, str) and value in of)
    elif origin is list:
        read = _list_reader(_reader(of[0], strict=strict))
    elif origin is dict:
        read = _dict_reader(_reader(of[1], strict=strict))
    elif _is_named(kind):
        read = _named_reader(kind, strict=strict)
    else:
        read = _BASIC_READERS[kind]
    if optional:
        return lambda value: None if value is None else read(value)
    return read


def _checked(fits: Callable[[Any], bool]) -> Reader:
    def read(value: Any) -> Any:  # noqa: ANN401
        if fits(value):
            return value
        raise _another_type()

    return read


def _list_reader(part: Reader) -> Reader:
    def read(value: Any) -> Any:  # noqa: ANN401
        if isinstance(value, list):
            return list(map(part, value))
        raise _another_type()

    return read


def _dict_reader(part: Reader) -> Reader:
    def read(value: Any) -> Any:  # noqa: ANN401
        if isinstance(value, dict) and all(map(_is_text, value)):
            return {name: part(of) for name, of in value.items()}
        raise _another_type()

    return read


def _named_reader(kind: Callable[..., Value], *, strict: bool) -> Reader:
    def read(value: Any) -> Value:  # noqa: ANN401
        if isinstance(value, dict):
            return from_json(kind, value, strict=strict)
        raise _another_type()

    return read


def _read_float(value: Any) -> float:  # noqa: ANN401
    if type(value) in {int, float} and abs(value) <= _INT_MAX:
        return float(value)
    raise _another_type()


def _another_type() -> ValueError:
    return ValueError("another type")


def _is_text(value: Any) -> bool:  # noqa: ANN401
    """JSON has halves of surrogate pairs, that no file can keep."""
    return type(value) is str and not _SURROGATE.search(value)


def _is_int(value: Any) -> bool:  # noqa: ANN401
    """JSON has numbers without end."""
    return type(value) is int and -_INT_MAX - 1 <= value <= _INT_MAX


_SURROGATE: Final = re.compile("[\ud800-\udfff]")
_BASIC_READERS: Final[dict[type, Reader]] = {
    str: _checked(_is_text),
    int: _checked(_is_int),
    bool: _checked(lambda value: type(value) is bool),
    float: _read_float,
}


def _optional(annotation: Any) -> tuple[bool, Any]:  # noqa: ANN401
    """Whether None is a value, and the rest of the annotation."""
    if get_origin(annotation) in {Union, types.UnionType}:
        (kind,) = (part for part in get_args(annotation) if part is not types.NoneType)
        return True, kind
    return False, annotation


def _is_named(kind: Any) -> bool:  # noqa: ANN401
    return isinstance(kind, type) and issubclass(kind, tuple)


_BASIC: Final = {str: "string", int: "int", float: "float", bool: "bool"}

# -- interfaces ---------------------------------------------------------------------------


class Nothing(NamedTuple):
    """No parameters."""


class Method(NamedTuple):
    """A method of an interface.

    Attributes:
        name: Without its interface.
        given: Its parameters.
        answer: Those of its replies.
        about: A sentence.
        more: It gives several replies, to a client that wants them.
    """

    name: str
    given: type[NamedTuple]
    answer: type[NamedTuple]
    about: str
    more: bool = False


class Failure(NamedTuple):
    """An error that its methods give: its name without the interface, and its parameters."""

    name: str
    parameters: type[NamedTuple]
    about: str


class Interface(NamedTuple):
    """What a server offers under one name."""

    name: str
    about: str
    types: tuple[type[NamedTuple], ...]
    methods: tuple[Method, ...]
    failures: tuple[Failure, ...]

    @property
    def description(self) -> str:
        """Its definition in varlink's language."""
        return "\n".join(_definition(self))


def _definition(interface: Interface) -> Iterator[str]:
    yield f"# {interface.about}"
    yield f"interface {interface.name}"
    for kind in interface.types:
        yield f"\n# {(kind.__doc__ or '').partition(chr(10))[0]}"
        yield f"type {kind.__name__} {_struct(kind)}"
    for method in interface.methods:
        yield f"\n# {method.about}"
        yield f"method {method.name}{_struct(method.given)} -> {_struct(method.answer)}"
    for failure in interface.failures:
        yield f"\n# {failure.about}"
        yield f"error {failure.name} {_struct(failure.parameters)}"
    yield ""


def _struct(kind: type[NamedTuple]) -> str:
    return f"({', '.join(f'{name}: {_words(hint)}' for name, (_, hint) in _fields(kind).items())})"


def _words(annotation: Any) -> str:  # noqa: ANN401
    optional, kind = _optional(annotation)
    if optional:
        return f"?{_words(kind)}"
    if kind in _BASIC:
        return _BASIC[kind]
    if get_origin(kind) is Literal:
        return f"({', '.join(get_args(kind))})"
    if get_origin(kind) is list:
        return f"[]{_words(get_args(kind)[0])}"
    if get_origin(kind) is dict:
        return f"[string]{_words(get_args(kind)[1])}"
    name: str = kind.__name__
    return name


# -- what every server has ----------------------------------------------------------------


class Info(NamedTuple):
    """Who serves."""

    vendor: str
    product: str
    version: str
    url: str
    interfaces: list[str]


class Asked(NamedTuple):
    """Which interface is to be described."""

    interface: str


class Described(NamedTuple):
    """Its definition."""

    description: str


class OfInterface(NamedTuple):
    """Which interface."""

    interface: str


class OfMethod(NamedTuple):
    """Which method."""

    method: str


class OfParameter(NamedTuple):
    """Which parameter."""

    parameter: str


SERVICE: Final = Interface(
    "org.varlink.service",
    "What every varlink service tells of itself.",
    (),
    (
        Method("GetInfo", Nothing, Info, "Who serves, and what."),
        Method("GetInterfaceDescription", Asked, Described, "An interface's definition."),
    ),
    (
        Failure("InterfaceNotFound", OfInterface, "There is no such interface."),
        Failure("MethodNotFound", OfMethod, "The interface has no such method."),
        Failure("MethodNotImplemented", OfMethod, "The method is not there in this way."),
        Failure("InvalidParameter", OfParameter, "A parameter is missing, unknown, or no value."),
        Failure("PermissionDenied", Nothing, "The caller may not do this."),
        Failure("ExpectedMore", Nothing, "The method gives several replies: ask for more."),
    ),
)
