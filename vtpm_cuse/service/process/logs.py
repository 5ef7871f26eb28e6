"""The log of a running vTPM: ``--log`` on top of the standard logging module.

A message has a level from 1 up and is written when the log's level reaches it.
Errors, warnings and what an operator wants to know are level 1; level 2 is
DEBUG, and each level more is one below it. A level-n line starts with n-1
spaces, as the C suite's do, so that a reader can filter by them.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import time
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NamedTuple

from vtpm_cuse.errors import UsageError, shown
from vtpm_cuse.files import open_to_write
from vtpm_cuse.service.process.behalf import making

if TYPE_CHECKING:
    from collections.abc import Callable

    from vtpm_cuse.config import LogConfig

_LOGGER: Final = logging.getLogger("vtpm_cuse")
_ENGINE_LEVEL: Final = 5  # from here on libtpms logs too
_SILENT: Final = logging.CRITICAL + 1
_STDERR: Final = 2
_RECENT_LINES: Final = 200
_OF_A_KIND: Final = 10
_KIND_SECONDS: Final = 10.0
_KINDS_MAX: Final = 64
_NUMBER: Final = re.compile(r"0x[0-9a-fA-F]+|\d+")


class EngineDebug(NamedTuple):
    """How libtpms is to log: into *fd*, at its own *level*, each line after *prefix*."""

    fd: int
    level: int
    prefix: str


def logging_level(level: int) -> int:
    """The logging module's number for messages of *level*: INFO for 1, DEBUG for 2, then down."""
    return logging.INFO if level <= 1 else max(1, logging.DEBUG + 2 - level)


class _Kind:
    """Messages that are alike but for their numbers: since when, how many, how many left out."""

    def __init__(self, since: float) -> None:
        self.since = since
        self.count = 0
        self.left_out = 0


class _Sparing(logging.Handler):
    """Keeps clients from filling a disk: of many messages of a kind the first ones are written.

    How many were left out is said when some seconds have passed, or at the end. What is asked
    for by a level above 1 is for looking closely, and always written.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kinds: dict[str, _Kind] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """A log that cannot be written, on a full disk say, must not stop the TPM."""
        now = time.monotonic()
        self._say_what_was_left_out(now - _KIND_SECONDS)
        if record.levelno < logging.INFO or self._is_wanted(record, now):
            self.write(self.format(record), record.levelno)

    def write(self, text: str, level: int) -> None:
        """Where the messages go."""
        raise NotImplementedError

    def close(self) -> None:
        self._say_what_was_left_out(float("inf"))
        super().close()

    def _is_wanted(self, record: logging.LogRecord, now: float) -> bool:
        name = _NUMBER.sub("N", record.getMessage())
        if name not in self._kinds and len(self._kinds) == _KINDS_MAX:
            self._forget(next(iter(self._kinds)))
        kind = self._kinds.setdefault(name, _Kind(now))
        kind.count += 1
        kind.left_out += kind.count > _OF_A_KIND
        return kind.count <= _OF_A_KIND

    def _say_what_was_left_out(self, until: float) -> None:
        """Of the kinds that began by *until*; they stand in the order in which they did."""
        while self._kinds:
            name, kind = next(iter(self._kinds.items()))
            if kind.since > until:
                break
            self._forget(name)

    def _forget(self, name: str) -> None:
        kind = self._kinds.pop(name)
        if kind.left_out:
            text = f"{kind.left_out} more like this: {name}"
            self.write(self.format(logging.makeLogRecord({"msg": text})), logging.INFO)


class _LogHandler(_Sparing):
    """Writes each message with one system call, so that lines of two processes do not mix."""

    def __init__(self, fd: int, config: LogConfig) -> None:
        super().__init__()
        self.fd, self._config = fd, config

    def write(self, text: str, level: int) -> None:
        start = self._config.prefix + " " * max(0, logging.DEBUG + 1 - level)
        text = "".join(f"{start}{shown(line)}\n" for line in text.splitlines())
        with suppress(OSError):
            os.write(self.fd, text.encode(errors="backslashreplace"))

    def engine_debug(self) -> EngineDebug | None:
        level = self._config.level + 1 - _ENGINE_LEVEL
        return EngineDebug(self.fd, level, self._config.prefix + " " * 4) if level > 0 else None

    def close(self) -> None:
        super().close()
        if self._config.path is not None:
            os.close(self.fd)


class _RecentHandler(_Sparing):
    def __init__(self) -> None:
        super().__init__()
        self._lines: deque[str] = deque(maxlen=_RECENT_LINES)

    def write(self, text: str, _level: int) -> None:
        self._lines.append("".join(f"{shown(line)}\n" for line in text.splitlines()))

    def text(self) -> bytes:
        return "".join(self._lines).encode(errors="backslashreplace")


def configure(config: LogConfig) -> None:
    """Sends all messages where *config* says, from now on.

    Raises:
        UsageError: The log file cannot be opened, or the descriptor not written to.
    """
    handler = None if config.path == "-" else _LogHandler(_open(config), config)
    for old in _LOGGER.handlers[:]:
        _LOGGER.removeHandler(old)
        old.close()
    _LOGGER.propagate = False
    _LOGGER.setLevel(logging_level(config.level) if handler else _SILENT)
    if handler:
        _LOGGER.addHandler(handler)


def keep_recent() -> Callable[[], bytes]:
    """From now on the last messages are kept in memory; returns what gives them as one text."""
    handler = _RecentHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    _LOGGER.addHandler(handler)
    return handler.text


def engine_debug() -> EngineDebug | None:
    """What libtpms is to be told about logging; None below level 5."""
    for handler in _LOGGER.handlers:
        if isinstance(handler, _LogHandler):
            return handler.engine_debug()
    return None


def descriptors() -> set[int]:
    """What messages are written to."""
    return {handler.fd for handler in _LOGGER.handlers if isinstance(handler, _LogHandler)}


def _open(config: LogConfig) -> int:
    if config.path is None:
        return _STDERR if config.fd is None else _writable(config.fd)
    try:
        with making(config.runas, config.path) as owner:
            return open_to_write(config.path, 0o600, owner, truncate=config.truncate)
    except OSError as exc:
        reason = f"Could not open logfile for writing: {exc.strerror} ({config.path})"
        raise UsageError(reason) from exc


def _writable(fd: int) -> int:
    try:
        access = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
    except OSError as exc:
        raise UsageError(f"Could not log to file descriptor {fd}: {exc.strerror}") from exc
    if access == os.O_RDONLY:
        raise UsageError(f"Could not log to file descriptor {fd}: it is open for reading only")
    if fd > _STDERR:
        os.set_inheritable(fd, False)  # taken over
    return fd
