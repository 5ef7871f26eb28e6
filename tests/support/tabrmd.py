"""``tabrmd.py``: connections to tpm2-abrmd, by its own library, for a parent that has none.

A line in, ``open NAME``, ``close NAME`` or ``ask NAME COMMAND`` in hex; a line out, the response in
hex, or ``tcti CODE`` where the library refuses. It runs by itself: GLib's threads stay in here.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Final

_CONF: Final = b"bus_type=session"
_BUFFER: Final = 4096
_FOREVER: Final = -1


class _Context(ctypes.Structure):
    """TSS2_TCTI_CONTEXT_COMMON_V1. Source: TCG TSS 2.0 TPM Command Transmission Interface."""

    _fields_ = (  # type: ignore[mutable-override]  # as ctypes wants it
        ("magic", ctypes.c_uint64),
        ("version", ctypes.c_uint64),
        (
            "transmit",
            ctypes.CFUNCTYPE(ctypes.c_uint32, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p),
        ),
        (
            "receive",
            ctypes.CFUNCTYPE(
                *(ctypes.c_uint32, ctypes.c_void_p, ctypes.POINTER(ctypes.c_size_t)),
                *(ctypes.c_char_p, ctypes.c_int32),
            ),
        ),
        ("finalize", ctypes.CFUNCTYPE(None, ctypes.c_void_p)),
    )


class RefusedError(Exception):
    """The library did not do it, but said a code."""


class Connection:
    """One client. Raises RefusedError."""

    def __init__(self) -> None:
        library = ctypes.CDLL("libtss2-tcti-tabrmd.so.0")
        init = library.Tss2_Tcti_Tabrmd_Init
        init.argtypes = (ctypes.c_void_p, ctypes.POINTER(ctypes.c_size_t), ctypes.c_char_p)
        init.restype = ctypes.c_uint32
        size = ctypes.c_size_t()
        _check(init(None, size, None))
        self._memory = ctypes.create_string_buffer(size.value)
        _check(init(self._memory, size, _CONF))
        self._context = _Context.from_buffer(self._memory)

    def exchange(self, command: bytes) -> bytes:
        """A command, and its response."""
        _check(self._context.transmit(ctypes.addressof(self._memory), len(command), command))
        size = ctypes.c_size_t(_BUFFER)
        buffer = ctypes.create_string_buffer(_BUFFER)
        pointer = ctypes.cast(buffer, ctypes.c_char_p)
        _check(self._context.receive(ctypes.addressof(self._memory), size, pointer, _FOREVER))
        return buffer.raw[: size.value]

    def close(self) -> None:
        """Ends it."""
        self._context.finalize(ctypes.addressof(self._memory))


def _check(code: int) -> None:
    if code:
        raise RefusedError(f"{code:#x}")


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> None:
    there: dict[str, Connection] = {}
    for line in sys.stdin:
        verb, name, *rest = line.split()
        answer = b""
        try:
            if verb == "open":
                there[name] = Connection()
            elif verb == "close":
                there.pop(name).close()
            else:
                answer = there[name].exchange(bytes.fromhex(rest[0]))
        except RefusedError as exc:
            _say(f"tcti {exc}")
        else:
            _say(answer.hex())


if __name__ == "__main__":
    main()
