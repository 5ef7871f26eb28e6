"""Imports what a process may still need when no module can be found any more.

That is so below another root, and as a user who may not read where this program is installed.
"""

from __future__ import annotations

import contextlib
import ctypes.util
import importlib
import sys

import vtpm_cuse

_OTHER_PROGRAMS = ("vtpm_cuse.cli", "vtpm_cuse.manual", "vtpm_cuse.manufacture")
_LAZY = (
    "cryptography.hazmat.primitives.ciphers",
    "encodings.idna",
    "tokenize",
)
"""Modules that ours, or Python itself, import when they are first used."""


def import_trio() -> None:
    """Imports trio; first, for it then has ctypes look for libpthread, by running ldconfig or gcc.

    That is a tenth of a start, for the names of threads. It takes None for an answer.
    """

    def find_nothing(name: str) -> str | None:
        return None

    find, ctypes.util.find_library = ctypes.util.find_library, find_nothing
    try:
        importlib.import_module("trio")
    finally:
        ctypes.util.find_library = find


def import_all() -> None:
    """Imports every module that a service may come to; nothing more can be imported afterwards."""
    import pkgutil

    import_trio()
    for module in pkgutil.walk_packages(vtpm_cuse.__path__, "vtpm_cuse."):
        if not module.name.startswith(_OTHER_PROGRAMS) and not module.name.endswith("._build"):
            importlib.import_module(module.name)
    for name in _LAZY:
        importlib.import_module(name)
    _open_libraries()
    sys.path.clear()  # what lies below the new root is not ours


def _open_libraries() -> None:
    for name in ("libtpms.so.0", "libseccomp.so.2", "libkeyutils.so.1"):
        with contextlib.suppress(OSError):  # who needs it will say so
            ctypes.CDLL(name)  # stays loaded, and is then found by its name
