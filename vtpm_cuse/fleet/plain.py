"""Named tuples of plain values as JSON, and back: nothing in it could run. No I/O."""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from typing import TYPE_CHECKING, Any

from vtpm_cuse.errors import ChannelError

if TYPE_CHECKING:
    from collections.abc import Mapping


# Any: what JSON has.
def packed(value: Any) -> bytes:  # noqa: ANN401
    """The bytes, in one line."""
    return json.dumps(_plain(value), separators=(",", ":")).encode()


def unpacked(data: bytes, kinds: Mapping[str, type[Any]]) -> Any:  # noqa: ANN401
    """The reverse; *kinds* has the named tuples that there may be. Raises ChannelError."""
    try:
        return _value(json.loads(data), kinds)
    except (ValueError, LookupError, TypeError, AttributeError) as exc:
        raise ChannelError(f"no saved value: {exc}") from exc


def form(kinds: Mapping[str, type[Any]], numbers: Mapping[str, int]) -> str:
    """What two versions of these have to be equal in to understand each other, as a text."""
    fields = {name: list(kind.__annotations__) for name, kind in kinds.items()}
    return json.dumps([fields, numbers], sort_keys=True)


def _plain(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, bytes):
        return {"": b64encode(value).decode()}
    if isinstance(value, tuple):
        fields = [_plain(one) for one in value]
        return {type(value).__name__: fields} if type(value) is not tuple else fields
    return value


def _value(plain: Any, kinds: Mapping[str, type[Any]]) -> Any:  # noqa: ANN401
    if isinstance(plain, list):
        return tuple(_value(one, kinds) for one in plain)
    if not isinstance(plain, dict):
        return plain
    ((kind, content),) = plain.items()
    if not kind:
        return b64decode(content)
    return kinds[kind](*(_value(one, kinds) for one in content))
