"""Imports what a process may still need when no module can be found any more.

That is so below another root, and as a user who may not read where this program is installed.
"""

from __future__ import annotations

import ctypes.util
import importlib
import sys
import time
from importlib.machinery import BuiltinImporter, FrozenImporter

import vtpm_cuse

_SET_UP = {"ca", "manufacture"}
"""Packages of ours that no service comes to, only a set-up."""

_LAZY = (
    "cryptography.hazmat.primitives.ciphers",
    "encodings.idna",
    "tokenize",
)
"""Modules that ours, or Python itself, import when they are first used."""

KEYRING = "libkeyutils.so.1"
_LIBRARIES = ("libtpms.so.0", "libseccomp.so.2", KEYRING)


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


def import_all() -> list[str]:
    """Imports every module that a service may come to; nothing more can be imported afterwards.

    Returns the names of those libraries that cannot be loaded: not now, and not later on from
    whatever has their names then.
    """
    _import_packages(but=_SET_UP)
    # What lies below the new root is not ours. The path alone would not do: packages have their own.
    sys.meta_path[:] = [BuiltinImporter, FrozenImporter]
    return [name for name in _LIBRARIES if not _load(name)]


def import_set_up() -> None:
    """Imports what a set-up comes to; it has no other root, so what can be read can be imported."""
    _import_packages(but=set())


def _import_packages(but: set[str]) -> None:
    import pkgutil

    import_trio()
    for module in pkgutil.walk_packages(vtpm_cuse.__path__, "vtpm_cuse."):
        package, _, rest = module.name.partition(".")[2].partition(".")
        if package not in {*but, "cli", "lab", "tree"} and rest != "_build":
            importlib.import_module(module.name)
    for name in _LAZY:
        importlib.import_module(name)
    time.localtime()  # reads the time zone


def _load(name: str) -> bool:
    try:
        ctypes.CDLL(name)  # stays loaded, and is then found by its name
    except OSError:
        return False
    return True
