"""A disk in memory that stands in for the module ``os`` below a store, and forgets what it may.

Each file has what programs see (the page cache) and what is on the medium. A flush moves the
one to the other. When the power goes, each 512-byte sector that was not flushed has any of the
contents it had since, or, if it was just being written, none of them; each name in the directory
has any of the meanings it had since the directory was flushed. A sector is written whole or not.
"""

from __future__ import annotations

import copy
import errno
import os
import random
import stat
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SECTOR: Final = 512
GARBAGE: Final = b"\xa5" * SECTOR
_DIRECTORY: Final = "/state"
_STEPS: Final = {
    *{"open", "close", "write", "pwrite", "fsync", "fdatasync", "replace", "link", "unlink"},
    *{"ftruncate", "posix_fallocate", "fchmod", "pread", "read", "fstat", "stat", "lseek"},
}


class PowerCut(BaseException):
    """The process is gone; no handler for errors of ours may see this."""


@dataclass
class Inode:
    """A file, or a block device of fixed size."""

    device: bool = False
    seen: bytearray = field(default_factory=bytearray)
    medium: bytearray = field(default_factory=bytearray)
    pending: list[tuple[int, bytes]] = field(default_factory=list)

    def write(self, offset: int, data: bytes) -> None:
        if len(self.seen) < offset + len(data):
            self.grow(offset + len(data))
        self.seen[offset : offset + len(data)] = data
        first, last = offset // SECTOR, (offset + len(data) - 1) // SECTOR
        for sector in range(first, last + 1):
            at = sector * SECTOR
            self.pending.append((sector, bytes(self.seen[at : at + SECTOR])))

    def grow(self, size: int) -> None:
        self.seen.extend(bytes(max(0, size - len(self.seen))))

    def flush(self) -> None:
        self.medium[:] = self._with(dict(self.pending))
        self.pending.clear()

    def lose(self, every: int) -> None:
        """A flush that fails: nobody writes these sectors again, but every *every*-th was."""
        self.medium[:] = self._with(dict(self.pending[::every] if every else []))
        self.pending.clear()

    def _with(self, sectors: dict[int, bytes], size: int | None = None) -> bytearray:
        out = bytearray(self.medium)
        size = len(self.seen) if size is None else size
        out.extend(bytes(max(0, size - len(out))))
        for sector, data in sectors.items():
            out[sector * SECTOR : sector * SECTOR + len(data)] = data
        del out[size:]
        return out

    def outcomes(self, chance: random.Random) -> Iterator[bytearray]:
        """What may be on the medium after a power cut."""
        if not self.pending:
            yield bytearray(self.medium)
            if len(self.seen) != len(self.medium):
                yield self._with({})
            return
        versions: dict[int, list[bytes | None]] = {}
        for sector, data in self.pending:
            versions.setdefault(sector, [None]).append(data)
        sectors = sorted(versions)
        latest = {sector: versions[sector][-1] for sector in sectors}
        choices: list[dict[int, bytes | None]] = [{}, dict(latest)]
        for at in range(1, len(sectors)):
            choices.append({sector: latest[sector] for sector in sectors[:at]})
            choices.append({sector: latest[sector] for sector in sectors[at:]})
        for sector in sectors:
            choices.append({sector: latest[sector]})
            choices.append({other: latest[other] for other in sectors if other != sector})
        choices += [
            {sector: chance.choice(versions[sector]) for sector in sectors} for _ in range(6)
        ]
        torn = {sector: GARBAGE for sector in sectors if self._is_being_written(sector)}
        choices.append({**latest, **torn})
        for choice in choices:
            written = {sector: data for sector, data in choice.items() if data is not None}
            yield self._with(written)
            if not self.device:
                yield self._with(written, len(self.medium))

    def _is_being_written(self, sector: int) -> bool:
        """Whether it may be garbage: not a header, nor a neighbour of what was flushed."""
        if sector == 0:
            return False
        old = self.medium[sector * SECTOR : (sector + 1) * SECTOR]
        return not old.strip(b"\0")


class Disk:
    """Implements what the stores use of ``os``.

    Args:
        device: Makes ``/state`` a block device of that many bytes instead of a directory.
        room: Bytes that all files together may have.

    Attributes:
        trace: The names of the calls so far, from the last `restart` on.
        stop: Number of the call before which the power goes; None for never.
        fault: Number of the call that fails.
        fault_errno: What it fails with.
        links: Whether a file can have two names.
    """

    def __init__(self, *, device: int = 0, room: int | None = None) -> None:
        self.room = room
        self.names: dict[str, Inode] = {}
        self.history: dict[str, list[Inode | None]] = {}
        self.trace: list[str] = []
        self.stop: int | None = None
        self.fault: int | None = None
        self.fault_errno = errno.EIO
        self.links = True
        self._fds: dict[int, tuple[Inode | None, int]] = {}
        self._next_fd = 1000
        if device:
            inode = Inode(device=True, seen=bytearray(device), medium=bytearray(device))
            self.names["state.bin"] = inode

    def restart(self, *, stop: int | None = None, fault: int | None = None) -> None:
        """A new process, or a new look at the present one."""
        self.trace, self.stop, self.fault = [], stop, fault

    def copied(self) -> Disk:
        return copy.deepcopy(self)

    def after_power_cut(self) -> Iterator[Disk]:
        """Every disk that a machine may find which starts again."""
        chance = random.Random(len(self.trace))  # noqa: S311 - repeatable, not secret
        for names in self._name_outcomes():
            inodes = list({id(inode): inode for inode in names.values()}.values())
            if not inodes:
                yield Disk()
            for number, inode in enumerate(inodes):
                for contents in inode.outcomes(chance):
                    yield self._rebuilt(names, inodes, number, contents)

    def _name_outcomes(self) -> Iterator[dict[str, Inode]]:
        """Each name on its own; and none of the changes, which a journal would give."""
        found: list[dict[str, Inode]] = [dict(self.names)]
        for name, meanings in self.history.items():
            found = [
                {**{k: v for k, v in one.items() if k != name}, **({name: m} if m else {})}
                for one in found
                for m in [*meanings, self.names.get(name)]
            ]
        yield from found

    @staticmethod
    def _rebuilt(
        names: dict[str, Inode], inodes: list[Inode], number: int, contents: bytearray
    ) -> Disk:
        """One file with *contents*; the others with what was surely written."""
        disk = Disk()
        made = {}
        for at, inode in enumerate(inodes):
            data = contents if at == number else inode.medium
            made[id(inode)] = Inode(inode.device, bytearray(data), bytearray(data))
        disk.names = {name: made[id(inode)] for name, inode in names.items()}
        return disk

    # -- os -------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever os has
        if name.startswith("__"):
            raise AttributeError(name)
        if name not in _STEPS:
            return getattr(os, name)
        function: Callable[..., Any] = getattr(self, f"_do_{name}")

        def call(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            number = len(self.trace)
            self.trace.append(name)
            if number == self.stop:
                raise PowerCut
            if number == self.fault:
                self._fail(name, args)
            return function(*args, **kwargs)

        return call

    def _fail(self, name: str, args: tuple[Any, ...]) -> None:
        if name in {"fsync", "fdatasync"} and (inode := self._fds[args[0]][0]) is not None:
            inode.lose(len(self.trace) % 3)
        if name == "close":
            self._fds.pop(args[0])
        raise OSError(self.fault_errno, os.strerror(self.fault_errno))

    def _do_open(self, path: str, flags: int, _mode: int = 0, dir_fd: int | None = None) -> int:
        del dir_fd
        self._next_fd = fd = self._next_fd + 1
        if path == _DIRECTORY:
            self._fds[fd] = (None, 0)
            return fd
        name = os.path.basename(path)
        if name not in self.names:
            if not flags & os.O_CREAT:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            self._rename(name, Inode())
        elif flags & os.O_EXCL:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        self._fds[fd] = (self.names[name], 0)
        return fd

    def _rename(self, name: str, inode: Inode | None) -> None:
        self.history.setdefault(name, []).append(self.names.get(name))
        self.names.pop(name, None)
        if inode is not None:
            self.names[name] = inode

    def _inode(self, fd: int) -> Inode:
        inode = self._fds[fd][0]
        assert inode is not None
        return inode

    def _do_close(self, fd: int) -> None:
        del self._fds[fd]

    def _do_write(self, fd: int, data: bytes) -> int:
        inode, at = self._fds[fd]
        done = self._do_pwrite(fd, data, at)
        self._fds[fd] = (inode, at + done)
        return done

    def _do_pwrite(self, fd: int, data: bytes, offset: int) -> int:
        inode = self._inode(fd)
        data = bytes(data)
        if inode.device:
            data = data[: len(inode.seen) - offset]
        elif self.room is not None:
            free = self.room - sum(len(one.seen) for one in {*map(_Same, self.names.values())})
            data = data[: max(0, free + max(0, len(inode.seen) - offset))]
        if not data:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        inode.write(offset, data)
        return len(data)

    def _do_posix_fallocate(self, fd: int, offset: int, length: int) -> None:
        inode = self._inode(fd)
        used = sum(len(one.seen) for one in {*map(_Same, self.names.values())})
        if self.room is not None and used + max(0, offset + length - len(inode.seen)) > self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        inode.grow(offset + length)

    def _do_fsync(self, fd: int) -> None:
        inode = self._fds[fd][0]
        if inode is None:
            self.history.clear()
        else:
            inode.flush()

    _do_fdatasync = _do_fsync

    def _do_replace(self, old: str, new: str, **_directories: int) -> None:
        inode = self.names[old]
        if self.names.get(new) is not inode:  # two names of one file: rename(2) does nothing
            self._rename(new, inode)
            self._rename(old, None)

    def _do_link(self, old: str, new: str, **_directories: int) -> None:
        if new in self.names:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        if not self.links:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        self._rename(new, self.names[old])

    def _do_unlink(self, name: str, **_directories: int) -> None:
        if name not in self.names:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        self._rename(name, None)

    def _do_pread(self, fd: int, count: int, offset: int) -> bytes:
        return bytes(self._inode(fd).seen[offset : offset + count])

    def _do_read(self, fd: int, count: int) -> bytes:
        return self._do_pread(fd, count, self._fds[fd][1])

    def _do_lseek(self, fd: int, _offset: int, _whence: int) -> int:
        return len(self._inode(fd).seen)

    def _do_fchmod(self, fd: int, mode: int) -> None:
        pass

    def _do_fstat(self, fd: int) -> SimpleNamespace:
        return _status(self._inode(fd))

    def _do_stat(self, name: str, **_options: Any) -> SimpleNamespace:  # noqa: ANN401
        if name not in self.names:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return _status(self.names[name])


class _Same:
    """An inode that a set counts once, whatever its names."""

    def __init__(self, inode: Inode) -> None:
        self.seen, self._id = inode.seen, id(inode)

    def __hash__(self) -> int:
        return self._id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other._id == self._id


def _status(inode: Inode) -> SimpleNamespace:
    kind = stat.S_IFBLK if inode.device else stat.S_IFREG
    return SimpleNamespace(
        st_mode=kind | 0o640, st_size=len(inode.seen), st_nlink=1, st_uid=os.geteuid()
    )
