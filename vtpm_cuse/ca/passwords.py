"""Where a password is: ``pass:``, ``fd:``, ``file:``, ``env:``, or the word itself."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from vtpm_cuse.errors import UsageError
from vtpm_cuse.files import read_small

if TYPE_CHECKING:
    from collections.abc import Mapping

PASSWORD_MAX: Final = 255
"""Bytes that are read from a file or descriptor; there may be no more."""


def read_password(spec: str, option: str, environ: Mapping[str, str] = os.environ) -> bytes:
    """The password that *spec* of ``--option`` leads to; a line feed at its end is part of it.

    Raises:
        UsageError: It cannot be read; the message does not show it.
    """
    kind, colon, rest = spec.partition(":")
    if not colon or kind not in {"pass", "fd", "file", "env"}:
        return os.fsencode(spec)
    if kind == "pass":
        return os.fsencode(rest)
    if kind == "env":
        if rest not in environ:
            raise UsageError(
                f"Could not get password from environment variable {rest} of --{option}"
            )
        return os.fsencode(environ[rest])
    if kind == "fd" and not (rest.isascii() and rest.isdigit() and len(rest) < 10):
        raise UsageError(f"Bad file descriptor for password: '{rest}' of --{option}")
    what = f"file descriptor {rest}" if kind == "fd" else f"file {rest}"
    try:
        data = _of_descriptor(int(rest)) if kind == "fd" else read_small(rest, streams=True)
    except OSError as exc:
        raise UsageError(
            f"Could not read password from {what} of --{option}: {exc.strerror}"
        ) from exc
    except ValueError as exc:
        raise UsageError(f"Could not read password from {what} of --{option}: {exc}") from exc
    if len(data) > PASSWORD_MAX:
        raise UsageError(
            f"The password in {what} of --{option} is longer than {PASSWORD_MAX} bytes"
        )
    return data


def _of_descriptor(fd: int) -> bytes:
    with open(fd, "rb") as file:
        return file.read(PASSWORD_MAX + 1)
