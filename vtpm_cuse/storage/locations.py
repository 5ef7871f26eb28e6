"""What a state's URI says: read here and nowhere else."""

from __future__ import annotations

import errno
import os
from typing import Final, NamedTuple

_WITH_PATH: Final = ("dir", "file")


class Location(NamedTuple):
    """Where a state is.

    Attributes:
        scheme: "dir", "file" or "mem"; empty for a URI that says nothing of the kind.
        path: The directory, the file or the block device, absolute; empty for memory.
    """

    scheme: str
    path: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.path}"

    @property
    def folder(self) -> str:
        """The folder that must be there before the state is; empty for memory."""
        return os.path.dirname(self.path) if self.scheme == "file" else self.path

    @property
    def folder_to_make(self) -> str:
        """The folder that a program may make for the state alone; empty where there is none."""
        return self.path if self.scheme == "dir" else ""


def absolute_path(path: str) -> str:
    """Where a relative path leads from the present directory.

    Raises:
        FileNotFoundError: It leads nowhere: the present directory has been removed.
    """
    try:
        return os.path.abspath(path)
    except FileNotFoundError:
        reason = "The current directory has been removed"
        raise FileNotFoundError(errno.ENOENT, reason, path) from None


def parse(uri: str) -> Location:
    """What *uri* says; a relative path is one below the present directory."""
    scheme, separator, path = uri.partition("://")
    if separator and path and scheme in _WITH_PATH:
        return Location(scheme, absolute_path(path))
    if separator and not path and scheme == "mem":
        return Location(scheme, "")
    return Location("", "")


def absolute(uri: str) -> str:
    """The same without a relative path, for who leaves the directory; others stay as they are."""
    found = parse(uri)
    return str(found) if found.scheme else uri
