"""The TPMs of a manager on the disk: a folder for each, called as it is.

In it are tpm.json, what it is; state, in the C suite's format; snapshots. A folder gets
its name when all of it is on the disk, so each that has one is a whole TPM.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import uuid
from typing import TYPE_CHECKING, Any, Final, NamedTuple, get_args

from vtpm_cuse.config import KeySource
from vtpm_cuse.errors import FleetError, StateLocked, StorageError
from vtpm_cuse.files import flush, flush_folder, make_folder, write_all, write_output
from vtpm_cuse.fleet.base import Interface, Offer, Spec
from vtpm_cuse.storage.locking import take_lock
from vtpm_cuse.storage.reserve import Reserve

if TYPE_CHECKING:
    from collections.abc import Container, Iterator

log = logging.getLogger(__name__)

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_FILE: Final = "tpm.json"
_DAMAGED: Final = ".damaged"
_NEW: Final = ".new-"
_OLD: Final = ".old-"
_LOCK: Final = ".lock"
FOLDER_MODE: Final = 0o700
_FILE_MODE: Final = 0o600
_ENTRY_MAX: Final = 1 << 16
_KEY: Final = frozenset({"file", "pwdfile", "credential", "mode", "format", "kdf"})
_LABELS_MAX: Final = 64
_LABEL_MAX: Final = 256
_NUMBER_END: Final = (1 << 32) - 1


class Entry(NamedTuple):
    """What is kept of a TPM besides its state; see `fleet.base.Spec`. No key is, but where one is.

    Of a CUSE device, ``number`` is no other one's, and ``major`` the major number it had last.
    """

    id: str
    owner: int
    profile: str | None
    manufactured: bool
    labels: tuple[tuple[str, str], ...]
    key: KeySource | None = None
    interface: Interface = "socket"
    number: int = 0
    major: int = 0
    cdi: Offer = "off"

    @classmethod
    def of(cls, number: str, spec: Spec, device: int = 0) -> Entry:
        """Of a TPM with that id, whose device, if it is one, has that number."""
        return cls(
            *(number, spec.owner, spec.profile, spec.manufactured, spec.labels, spec.key),
            *(spec.interface, device),
            cdi=spec.cdi,
        )

    def spec(self, name: str) -> Spec:
        """By which it, or one like it, is made; that is for containers only if somebody says so."""
        return Spec(
            *(name, self.owner, self.profile, self.manufactured, self.labels, self.key),
            self.interface,
        )


def check_name(name: str) -> str:
    """The *name*, of a TPM or of a snapshot. Raises FleetError."""
    if not _NAME.fullmatch(name):
        reason = "a name has up to 64 letters, digits, '.', '_' and '-', and begins with no sign"
        raise FleetError("BadName", name[:80], reason)
    return name


def check_labels(name: str, labels: tuple[tuple[str, str], ...]) -> None:
    """Raises FleetError for too many, or too long ones."""
    longest = max((len(text) for label in labels for text in label), default=0)
    if len(labels) > _LABELS_MAX or longest > _LABEL_MAX:
        reason = f"it may have {_LABELS_MAX} labels, with keys and values of {_LABEL_MAX} letters"
        raise FleetError("OverLimit", name, reason)


class Catalogue:
    """The folders below one, which is this process' alone.

    Args:
        path: Of that folder; it is made where there is none.
        lock: The descriptor by which it is this process' already, if it is.

    Attributes:
        path: The same, absolute.
        reserve: Of all stores that stay open in it.
        major: A major number that devices of its TPMs have had lately, 0 if none.
        lock: The descriptor by which it is this process'.

    Raises:
        OSError: It cannot be had.
        StateLocked: Another manager has it.
    """

    def __init__(self, path: str, lock: int | None = None) -> None:
        self.path = os.path.abspath(path)
        self.reserve = Reserve()
        self.major = 0
        if lock is not None:
            self.lock = lock
            return
        make_folder(self.path, FOLDER_MODE)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        self.lock = os.open(os.path.join(self.path, _LOCK), flags, _FILE_MODE)
        try:
            take_lock(self.lock)
        except OSError as exc:
            os.close(self.lock)
            raise StateLocked(self.path, f"another manager has it: {exc.strerror}") from exc

    @staticmethod
    def is_of(path: str, lock: int) -> bool:
        """Whether *lock* is that descriptor, of the folder at *path*."""
        try:
            return os.path.samestat(os.stat(os.path.join(path, _LOCK)), os.fstat(lock))
        except OSError:
            return False

    def leave(self) -> int:
        """The descriptor by which it is this process', which another one is to have."""
        lock, self.lock = self.lock, -1
        return lock

    def close(self) -> None:
        """Another process may have it."""
        if self.lock >= 0:
            os.close(self.lock)

    def entries(self) -> dict[str, Entry]:
        """All TPMs by their names; what a crash left of others goes. Raises OSError.

        One that cannot be read, as by a fault of the disk, is left as it is, and is none of them.
        """
        found: dict[str, Entry] = {}
        ids: set[str] = set()
        for name in sorted(os.listdir(self.path)):
            if name.startswith((_NEW, _OLD)):
                shutil.rmtree(os.path.join(self.path, name), ignore_errors=True)
            elif _NAME.fullmatch(name) and os.path.isdir(self.state_of(name)):
                try:
                    entry = self._entry(name, ids)
                except (OSError, StorageError) as exc:
                    log.error("%s is left out: %s", self._of(name), exc)
                    continue
                found[name] = entry
                ids.add(entry.id)
                self.major = entry.major or self.major
        return found

    def _entry(self, name: str, ids: Container[str]) -> Entry:
        """What is kept of it; another one has each of these *ids*. Raises OSError, StorageError."""
        path = os.path.join(self._of(name), _FILE)
        try:
            with open(path, "rb") as file:
                entry = _read_entry(file.read(_ENTRY_MAX))
        except (FileNotFoundError, ValueError, TypeError) as exc:  # no error of the disk's
            log.error("%s: %s; the TPM is root's, or yours, without labels", path, exc)
            with contextlib.suppress(OSError):
                os.replace(path, path + _DAMAGED)
            entry = Entry(str(uuid.uuid4()), os.geteuid(), None, False, ())
            self.write(name, entry)
        if entry.id in ids:  # who is allowed to one of them must not reach the other
            log.error("%s has another one's id, as a copy of a folder has, and gets its own", path)
            entry = entry._replace(id=str(uuid.uuid4()))
            self.write(name, entry)
        return entry

    def write(self, name: str, entry: Entry) -> None:
        """Replaces what is kept of a TPM, durably. Raises StorageError."""
        self._write(self._of(name), entry)

    def _write(self, folder: str, entry: Entry) -> None:
        path = os.path.join(folder, _FILE)
        with _errors(path):
            write_output(path, _text(entry), _FILE_MODE)

    def _of(self, name: str) -> str:
        return os.path.join(self.path, name)

    def state_of(self, name: str) -> str:
        """The folder of its state."""
        return os.path.join(self._of(name), "state")

    def _snapshot_of(self, name: str, snapshot: str) -> str:
        return os.path.join(self._of(name), "snapshots", check_name(snapshot))

    def need_snapshot(self, name: str, snapshot: str) -> str:
        """The folder of a copy of that. Raises FleetError."""
        folder = self._snapshot_of(name, snapshot)
        if not os.path.isdir(folder):
            raise FleetError("NoSuchTpm", name, f"it has no snapshot {snapshot}")
        return folder

    def begin(self, number: str) -> str:
        """A folder for the state of a TPM that is yet to be, by its id. Raises StorageError."""
        state = os.path.join(self._of(_NEW + number), "state")
        with _errors(state):
            make_folder(state, FOLDER_MODE)
        return state

    def give_up(self, number: str) -> None:
        """That TPM is not to be."""
        shutil.rmtree(self._of(_NEW + number), ignore_errors=True)

    def finish(self, name: str, entry: Entry) -> int:
        """That TPM is there from now on, durably, whatever of it was before; returns `size_of` it.

        Raises:
            StorageError: It cannot be.
        """
        new = self._of(_NEW + entry.id)
        with _errors(self._of(name)):
            _write_new(os.path.join(new, _FILE), _text(entry))
            _flush(new)
            self._rename(new, self._of(name))
        return self.size_of(name)

    def rename(self, name: str, new_name: str) -> None:
        """It has another name from now on, durably. Raises StorageError."""
        with _errors(self._of(name)):
            self._rename(self._of(name), self._of(new_name))

    def remove(self, name: str, entry: Entry) -> None:
        """It is no more, durably, with all that was its. Raises StorageError."""
        old = self._of(_OLD + entry.id)
        with _errors(self._of(name)):
            self._rename(self._of(name), old)
        shutil.rmtree(old, ignore_errors=True)

    @contextlib.contextmanager
    def new_snapshot(self, name: str, snapshot: str) -> Iterator[str]:
        """The folder for a copy; it is there from the end of the block on, durably.

        Raises:
            FleetError: There is one already.
            StorageError: It cannot be had.
        """
        folder = self._snapshot_of(name, snapshot)
        if os.path.lexists(folder):
            raise FleetError("TpmExists", name, f"it has a snapshot {snapshot}")
        number = str(uuid.uuid4())
        try:
            new = self.begin(number)
            yield new
            with _errors(folder):
                above = os.path.dirname(folder)
                make_folder(above, FOLDER_MODE)
                _flush_names(self._of(name))
                self._rename(new, folder)
        finally:
            self.give_up(number)

    def size_of(self, name: str) -> int:
        """Bytes of all that is kept of a TPM; of what is no more, none."""
        total = 0
        for folder, _, files in os.walk(self._of(name)):
            for file in files:
                with contextlib.suppress(OSError):
                    total += os.lstat(os.path.join(folder, file)).st_size
        return total

    def _rename(self, old: str, new: str) -> None:
        os.rename(old, new)  # nobody else makes one of that name, and an old one is not empty
        try:
            _flush_names(os.path.dirname(new))
        except OSError:
            os.rename(new, old)  # who is told that it has failed finds it as it was
            raise


def _flush(folder: str) -> None:
    """All that is in it: files before names, of which a journal then has little left to write."""
    folders = []
    for where, _, files in os.walk(folder):
        folders.append(where)
        for file in files:
            fd = os.open(os.path.join(where, file), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                flush(fd)
            finally:
                os.close(fd)
    for where in reversed(folders):
        _flush_names(where)


def _flush_names(folder: str) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        flush_folder(fd)
    finally:
        os.close(fd)


def _write_new(path: str, text: bytes) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(path, flags, _FILE_MODE)
    try:
        write_all(fd, text)
    finally:
        os.close(fd)


def _text(entry: Entry) -> bytes:
    """What is kept of it. Raises FleetError."""
    text = json.dumps(_kept(entry), indent=1) + "\n"
    if len(text) > _ENTRY_MAX:
        raise FleetError("OverLimit", entry.id, "its profile and its labels are too long")
    return text.encode()


# Any: JSON.
def _kept(entry: Entry) -> dict[str, Any]:
    found = entry._asdict()
    if (key := found.pop("key")) is not None:
        defaults = KeySource._field_defaults
        found["key"] = {name: of for name, of in key._asdict().items() if of != defaults[name]}
    return found


def _read_entry(text: bytes) -> Entry:
    """Raises ValueError, TypeError."""
    try:
        found = Entry(**json.loads(text))
    except RecursionError as exc:
        raise ValueError("there is much in something else") from exc
    labels = tuple((str(key), str(value)) for key, value in found.labels)
    numbers = (found.owner, found.number, found.major)
    if not all(type(one) is int and 0 <= one < _NUMBER_END for one in numbers):
        raise TypeError("a number is something else")
    if not isinstance(found.id, str) or not isinstance(found.manufactured, bool):
        raise TypeError("a value is of another kind")
    if not isinstance(found.profile, str | None) or not (
        found.interface in get_args(Interface) and found.cdi in get_args(Offer)
    ):
        raise TypeError("a value is of another kind")
    key: Any = found.key
    if key is not None:
        if not dict(key).keys() <= _KEY or not all(isinstance(of, str) for of in key.values()):
            raise TypeError("where its key is, is no such place")
        key = KeySource(**key)
    return found._replace(id=str(uuid.UUID(found.id)), labels=labels, key=key)


@contextlib.contextmanager
def _errors(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise StorageError(path, exc.strerror or str(exc)) from exc
