"""``--pcap``: all commands and responses of a TPM, its own ones too, in a packet capture."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import time
from typing import TYPE_CHECKING, Any, Final

from vtpm_cuse.errors import UsageError
from vtpm_cuse.files import open_to_write, set_mode
from vtpm_cuse.wire.pcapng import Conversation, file_header

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vtpm_cuse.config import PcapConfig
    from vtpm_cuse.engine.base import Engine

_MODE: Final = 0o640
_PORTS: Final = range(50000, 55000)
_MICROSECOND: Final = 1000


class RecordedTpm:
    """An engine whose commands and responses are written down; a full disk does not stop it.

    What else the engine can do, it does itself: this stands before it where it goes on and off.

    Raises:
        UsageError: The file cannot be opened, emptied or given its mode.
    """

    def __init__(self, tpm: Engine, pcap: PcapConfig) -> None:
        self._tpm = tpm
        self._pcap = _open(pcap)
        self._checksums = pcap.checksums
        self._talk = self._new_talk()
        self._write(file_header())

    # Any: whatever the engine behind has.
    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._tpm, name)

    @property
    def locality(self) -> int:
        """As the TPM's."""
        return self._tpm.locality

    @locality.setter
    def locality(self, locality: int) -> None:
        self._tpm.locality = locality

    def _new_talk(self) -> Conversation:
        return Conversation(secrets.choice(_PORTS), checksums=self._checksums)

    def start(self) -> None:
        """As the TPM's; each power-on is a connection of its own."""
        self._tpm.start()
        self._talk = self._new_talk()
        self._write(self._talk.begin(_now()))

    def stop(self) -> None:
        """As the TPM's; the connection ends too."""
        if self._tpm.running:
            self._write(self._talk.end(_now()))
        self._tpm.stop()

    def process(self, command: bytes) -> bytes:
        """As the TPM's."""
        self._write(self._talk.command(command, _now()))
        response = self._tpm.process(command)
        self._write(self._talk.response(response, _now()))
        return response

    def _write(self, packets: bytes) -> None:
        with contextlib.suppress(OSError):
            os.write(self._pcap, packets)


def _now() -> int:
    return time.time_ns() // _MICROSECOND


def _open(config: PcapConfig) -> int:
    """Where the capture goes on: at the end of what is there. Raises UsageError."""
    with contextlib.ExitStack() as undo:
        with _saying("open pcap file for writing", config):
            if config.path is None:
                fd = os.dup(-1 if config.fd is None else config.fd)
            else:
                mode = _MODE if config.mode is None else config.mode
                fd = open_to_write(config.path, mode, umask=False)
            undo.callback(os.close, fd)
        # PEER: takes no pipe, and gives a mode to /dev/null and terminals, too.
        if stat.S_ISREG(found := os.fstat(fd).st_mode):
            with _saying("chmod the pcap file", config):
                # PEER: lets the group read what was for its owner alone, if nothing is said.
                set_mode(fd, found & _MODE if config.mode is None else config.mode)
            with _saying("seek to desired position in pcap file", config):
                os.lseek(fd, 0, os.SEEK_SET if config.truncate else os.SEEK_END)
            if config.truncate:
                with _saying("ftruncate the pcap file", config):
                    os.ftruncate(fd, 0)
        undo.pop_all()
        return fd


@contextlib.contextmanager
def _saying(what: str, config: PcapConfig) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        where = f"descriptor {config.fd}" if config.path is None else config.path
        raise UsageError(f"Could not {what}: {exc.strerror} ({where})") from exc
