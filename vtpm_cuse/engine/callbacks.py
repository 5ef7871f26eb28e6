"""C functions that call Python ones, with no memory that is writable and executable.

By ctypes and not by cffi, whose closures lie in a page that is both as long as the process lives
(and can not be made where PR_SET_MDWE, systemd's MemoryDenyWriteExecute= or SELinux forbid that).
libffi below ctypes runs code that is part of it (3.8 in Debian unstable), or maps a file without
a name twice, to write and to execute (3.4 in Debian 12), of which `_seal` ends the writing.

The kernel is told first, where it can be (6.3 and later): from then on nothing in this process
becomes code that was not mapped as such. An older one gives libffi one page of both kinds, for
the instant until it is sealed.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import signal
from typing import TYPE_CHECKING, Final, NamedTuple

from vtpm_cuse.errors import NO_PROC, EngineUnavailable
from vtpm_cuse.files import file_limit, open_end

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

WORD: Final = ctypes.c_uint32
FLAG: Final = ctypes.c_ubyte
POINTER: Final = ctypes.c_void_p  # a Python function gets its address
TEXT: Final = ctypes.c_char_p  # a Python function gets its bytes

_MAPS: Final = "/proc/self/maps"
_CALLBACK_MEMORY: Final = 1 << 20
"""Bytes, more than libffi asks for at once: its own unit is 64 KiB, or a page if that is larger."""
_PR_SET_MDWE: Final = 65
_REFUSE_EXEC_GAIN: Final = 1
_NO_INHERIT: Final = 2  # what we start, a user's own tool say, may be of another kind
_libc: Final = ctypes.CDLL(None, use_errno=True)


def make(functions: Mapping[str, tuple[Callable[..., int], Sequence[type]]]) -> dict[str, int]:
    """The address of a C function for each, that returns a 32-bit result; once in a process.

    What a function raises is lost, and its result then anything: it is to raise nothing.

    Args:
        functions: By a name, the function and the types of its arguments.

    Raises:
        EngineUnavailable: Closures cannot be had here.
    """
    _refuse_new_code()
    addresses = {}
    try:
        for name, (function, arguments) in functions.items():
            closure = ctypes.CFUNCTYPE(WORD, *arguments)(function)
            # For ever: libffi would write into what is sealed to free it.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(closure))
            addresses[name] = ctypes.cast(closure, ctypes.c_void_p).value or 0
        _seal(addresses.values())
    except (OSError, MemoryError) as exc:
        if (limit := file_limit(_CALLBACK_MEMORY, "libtpms' callbacks")) is not None:
            raise EngineUnavailable(*limit) from exc  # libffi's memory is a file
        if not os.path.exists(_MAPS):  # nothing else says where libffi has put them
            raise EngineUnavailable(*NO_PROC) from exc
        hint = "let it map a memfd as executable (vm.memfd_noexec, SELinux), or use a newer libffi"
        raise EngineUnavailable("this system has no memory for libtpms' callbacks", hint) from exc
    return addresses


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """No Ctrl-C within: one that comes on the way from C is raised before any line of Python."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _refuse_new_code() -> None:
    # Kernels below 6.6 know the first alone, those below 6.3 none.
    for flags in (_REFUSE_EXEC_GAIN | _NO_INHERIT, _REFUSE_EXEC_GAIN):
        if _libc.prctl(_PR_SET_MDWE, *map(ctypes.c_ulong, (flags, 0, 0, 0))) == 0:
            return


class _Mapping(NamedTuple):
    start: int
    end: int
    rights: str
    file: tuple[str, str]


def _mappings() -> list[_Mapping]:
    found = []
    with open(_MAPS, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            place, rights, _, device, inode, *_ = line.split()
            start, end = (int(part, 16) for part in place.split("-"))
            found.append(_Mapping(start, end, rights, (device, inode)))
    return found


def _seal(addresses: Collection[int]) -> None:
    """Takes the right to write from the code at these addresses, wherever it is mapped. OSError."""
    mappings = _mappings()
    code = {m for m in mappings if any(m.start <= address < m.end for address in addresses)}
    shared = {mapping.file for mapping in code if mapping.rights[3] == "s"}
    for mapping in mappings:
        if mapping.rights[1] == "w" and (mapping in code or mapping.file in shared):
            rights = mmap.PROT_READ | (mmap.PROT_EXEC if mapping.rights[2] == "x" else 0)
            size = mapping.end - mapping.start
            if _libc.mprotect(ctypes.c_void_p(mapping.start), ctypes.c_size_t(size), rights):
                raise OSError(ctypes.get_errno(), "mprotect")
    if shared:
        _replace_descriptors(shared)


def _replace_descriptors(files: set[tuple[str, str]]) -> None:
    """Closes libffi's descriptor of its file; the number stays taken, for libffi remembers it."""
    nothing = open_end()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found = os.fstat(int(name))
            device = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}"
            if (device, str(found.st_ino)) in files:
                os.dup2(nothing, int(name), inheritable=False)
    os.close(nothing)
