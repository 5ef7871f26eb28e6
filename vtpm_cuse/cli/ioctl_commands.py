"""The commands of ``swtpm_ioctl``: one table, and what each of them does."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Final, NamedTuple

from vtpm_cuse.cli.words.table import Option
from vtpm_cuse.errors import AnswerError, UsageError, shown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vtpm_cuse.client.base import Control
    from vtpm_cuse.wire.ptm import PtmBlobType

_HASH_CHUNK: Final = 4096
_HIGHEST_LOCALITY: Final = 4
_BLOB_TYPES: Final = ("permanent", "volatile", "savestate")
_TPM_RETRY: Final = 0x800  # there is no such state blob


class Asked(NamedTuple):
    """The values given to a command: as typed, as a number, and the file's name."""

    value: str = ""
    number: int = 0
    file: str = ""


class Command(NamedTuple):
    """A row of the command table.

    Attributes:
        option: How it is written; the parser lets other spellings through, for the C suite's sake.
        ptm: The request, for messages.
        run: Does it.
        read: Reads the value as a number, before anything is connected to. Raises UsageError.
    """

    option: Option
    ptm: str
    run: Callable[[Control, Asked], None]
    read: Callable[[str], int] = lambda _: 0

    @property
    def word(self) -> str:
        """The one spelling that works."""
        return self.option.words[0]


def _count(complaint: str) -> Callable[[str], int]:
    """Reads a decimal number that may have anything behind it; else *complaint* is made."""

    def read(text: str) -> int:
        from vtpm_cuse.cli.words.numbers import leading_number

        found = leading_number(text, base=10)
        if found is None:
            raise UsageError(f"{complaint} {text}.")
        return found[0] & 0xFFFF_FFFF

    return read


def _locality(text: str) -> int:
    locality = _count("Could not get locality number from")(text)
    if locality > _HIGHEST_LOCALITY:
        raise UsageError("Locality outside valid range of [0..4].")
    return locality


def _info_flags(text: str) -> int:
    from vtpm_cuse.cli.words.numbers import number

    found = number(text, 0, (1 << 64) - 1)
    if found is None:
        raise UsageError("Cannot parse info flags.")
    return found


def _capability(tpm: Control, _asked: Asked) -> None:
    print(f"ptm capability is 0x{tpm.capability():x}")


def _init(tpm: Control, _asked: Asked) -> None:
    from vtpm_cuse.wire.ptm import PtmInitFlag

    tpm.init(PtmInitFlag.PTM_INIT_FLAG_DELETE_VOLATILE)


def _hash(tpm: Control, asked: Asked) -> None:
    data = os.fsencode(asked.value)
    tpm.hash(
        _chunks_of_stdin()
        if asked.value == "-"
        else (data[start : start + _HASH_CHUNK] for start in range(0, len(data), _HASH_CHUNK))
    )


def _chunks_of_stdin() -> Iterator[bytes]:
    while True:
        chunk = sys.stdin.buffer.read(_HASH_CHUNK)
        yield chunk
        if len(chunk) < _HASH_CHUNK:
            return


def _save(tpm: Control, asked: Asked) -> None:
    from vtpm_cuse.files import write_output
    from vtpm_cuse.service.confine.secrecy import hide_process
    from vtpm_cuse.wire.ptm import PtmStateFlag

    hide_process()  # before the TPM's seeds are in memory
    # PEER: empties the file before it asks, and so loses an earlier copy when the vTPM says no.
    try:
        blob = tpm.get_state(_blob_type(asked.value), PtmStateFlag.PTM_STATE_FLAG_DECRYPTED)
    except AnswerError as exc:
        if exc.result != _TPM_RETRY:
            raise
        blob = b""
    try:
        write_output(asked.file, blob, 0o600, streams=True)
    except OSError as exc:
        reason = f"Could not open file '{asked.file}' for writing: {exc.strerror}"
        raise UsageError(reason) from exc


def _load(tpm: Control, asked: Asked) -> None:
    from vtpm_cuse.files import read_small
    from vtpm_cuse.service.confine.secrecy import hide_process

    hide_process()
    kind = _blob_type(asked.value)
    try:
        blob = read_small(asked.file, streams=True)
    except (OSError, ValueError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else str(exc)
        raise UsageError(f"Could not open file '{asked.file}' for reading: {reason}") from exc
    tpm.set_state(kind, blob)


def _blob_type(name: str) -> PtmBlobType:
    from vtpm_cuse.wire.ptm import PtmBlobType

    types = {
        "permanent": PtmBlobType.PTM_BLOB_TYPE_PERMANENT,
        "volatile": PtmBlobType.PTM_BLOB_TYPE_VOLATILE,
        "savestate": PtmBlobType.PTM_BLOB_TYPE_SAVESTATE,
    }
    if name not in types:
        raise UsageError(f"Unknown TPM state type '{name}'")
    return types[name]


def _config(tpm: Control, _asked: Asked) -> None:
    print(f"ptm configuration flags: 0x{tpm.config():x}")


def _buffer(tpm: Control, asked: Asked) -> None:
    sizes = tpm.set_buffer_size(asked.number)
    print(f"TPM buffersize: {sizes.buffersize}")
    print(f"minimum size  : {sizes.minsize}")
    print(f"maximum size  : {sizes.maxsize}")


def _letter(name: str, text: str, metavar: str = "") -> Option:
    return Option(name, text, metavar=metavar, single_dash=True, group="Commands")


def _word(name: str, text: str, metavar: str = "", choices: tuple[str, ...] = ()) -> Option:
    return Option(name, text, metavar=metavar, choices=choices, group="Commands")


COMMANDS: Final = (
    Command(_letter("c", "show the capabilities as a bit mask"), "PTM_GET_CAPABILITY", _capability),
    Command(
        _letter(
            "i",
            "power the TPM on, or reset it; volatile state, if there is any, is resumed and deleted",
        ),
        "PTM_INIT",
        _init,
    ),
    Command(_word("stop", "power the TPM off"), "PTM_STOP", lambda tpm, _: tpm.stop()),
    Command(
        _letter("s", "power it off and end the vTPM"), "PTM_SHUTDOWN", lambda tpm, _: tpm.shutdown()
    ),
    Command(
        _letter("e", "show the tpmEstablished bit"),
        "PTM_GET_TPMESTABLISHED",
        lambda tpm, _: print(f"tpmEstablished is {tpm.established()}"),
    ),
    Command(
        _letter("r", "reset the tpmEstablished bit, in this locality (3 or 4)", "LOCALITY"),
        "PTM_RESET_TPMESTABLISHED",
        lambda tpm, asked: tpm.reset_established(asked.number),
        _locality,
    ),
    Command(
        _letter("v", "store the volatile state beside the permanent state"),
        "PTM_STORE_VOLATILE",
        lambda tpm, _: tpm.store_volatile(),
    ),
    Command(
        _letter("C", "cancel the TPM command that is running"),
        "PTM_CANCEL_TPM_CMD",
        lambda tpm, _: tpm.cancel(),
    ),
    Command(
        _letter("l", "set the locality of later TPM commands, 0 to 4", "LOCALITY"),
        "PTM_SET_LOCALITY",
        lambda tpm, asked: tpm.set_locality(asked.number),
        _locality,
    ),
    Command(
        _letter("h", "measure the data; '-' reads standard input", "DATA"), "PTM_HASH_DATA", _hash
    ),
    Command(
        _word(
            "save",
            "save the permanent, volatile or savestate blob in a file",
            "TYPE FILE",
            _BLOB_TYPES,
        ),
        "PTM_GET_STATEBLOB",
        _save,
    ),
    Command(
        _word(
            "load",
            "load the permanent, volatile or savestate blob from a file into a TPM that is off",
            "TYPE FILE",
            _BLOB_TYPES,
        ),
        "PTM_SET_STATEBLOB",
        _load,
    ),
    Command(_letter("g", "show which keys are in use as a bit mask"), "PTM_GET_CONFIG", _config),
    Command(
        _letter("b", "set the buffer size in bytes, 0 to show it; shows the limits too", "SIZE"),
        "PTM_SET_BUFFERSIZE",
        _buffer,
        _count("Could not get buffersize from"),
    ),
    Command(
        _word(
            "info",
            "show facts about the TPM as JSON: 1 specification, 2 attributes, 4 features and so on",
            "FLAGS",
        ),
        "PTM_GET_INFO",
        lambda tpm, asked: print(shown(tpm.info(asked.number))),
        _info_flags,
    ),
    Command(
        _word("lock-storage", "lock the state, with so many retries of 10 ms", "RETRIES"),
        "PTM_LOCK_STORAGE",
        lambda tpm, asked: tpm.lock_storage(asked.number),
        _count("Could not parse lock retries from"),
    ),
)
