"""The tree as a file system, by pyfuse3: looks at nothing before somebody does, and keeps nothing.

The names that pyfuse3 has for its integers are for types alone: Debian 12's does not have them.

The folder of a TPM is its owner's. What a file has is asked for when it is opened.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

import pyfuse3

from vtpm_cuse.tree import contents

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vtpm_cuse.client.manager import Manager
    from vtpm_cuse.tree.source import Source
    from vtpm_cuse.wire.manager import Tpm

    Answer = TypeVar("Answer")

_TOP_MODE: Final = stat.S_IFDIR | 0o711
"""Others pass through it to what is theirs."""
_FOLDER_MODE: Final = stat.S_IFDIR | 0o500
_FILE_MODE: Final = stat.S_IFREG | 0o400


class _Place(NamedTuple):
    """A folder or file of the TPM with that id, by its path there; the top has no id."""

    tpm: str = ""
    path: str = ""


class _Numbers:
    """Of inodes that the kernel knows."""

    def __init__(self) -> None:
        self._places = {int(pyfuse3.ROOT_INODE): _Place()}
        self._numbers = {place: number for number, place in self._places.items()}
        self._uses: dict[int, int] = {}
        self._last = int(pyfuse3.ROOT_INODE)

    def place(self, number: int) -> _Place:
        return self._places[number]

    def look_up(self, place: _Place) -> int:
        """Its number, which is used once more."""
        number = self._numbers.get(place)
        if number is None:
            self._last = number = self._last + 1
            self._numbers[place], self._places[number] = number, place
        self._uses[number] = self._uses.get(number, 0) + 1
        return number

    def forget(self, number: int, uses: int) -> None:
        left = self._uses.get(number, 0) - uses
        if left > 0:
            self._uses[number] = left
        elif number != pyfuse3.ROOT_INODE and number in self._places:
            self._uses.pop(number, None)
            del self._numbers[self._places.pop(number)]


class _Listing(NamedTuple):
    """What an open folder has: names with their places, and whether that is a folder, and whose."""

    entries: Sequence[tuple[str, _Place, bool, int]]


class Tree(pyfuse3.Operations):
    """The requests of the kernel.

    Args:
        source: Whom it asks.
    """

    def __init__(self, source: Source) -> None:
        super().__init__()
        self._source = source
        self._numbers = _Numbers()
        self._open: dict[int, bytes | _Listing] = {}
        self._last = 0

    async def lookup(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """What has that name in a folder. Raises FUSEError, as all of these do."""
        folder, text = self._numbers.place(parent_inode), os.fsdecode(name)
        if folder == _Place():
            tpm = await self._described(text) if text.isascii() else None
            if tpm is None or tpm.name != text:  # an id, say
                raise pyfuse3.FUSEError(errno.ENOENT)
            return self._found(_Place(tpm.id), tpm.owner, is_folder=True)
        tpm = await self._described(folder.tpm)
        for entry, place, is_folder, owner in _entries(tpm, folder.path):
            if entry == text:
                return self._found(place, owner, is_folder=is_folder)
        raise pyfuse3.FUSEError(errno.ENOENT)

    async def forget(self, inode_list: Sequence[tuple[pyfuse3.InodeT, int]]) -> None:
        """The kernel does not know them any more."""
        for number, uses in inode_list:
            self._numbers.forget(number, uses)

    async def getattr(
        self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Owner and mode."""
        place = self._numbers.place(inode)
        if place == _Place():
            return _attributes(inode, os.geteuid(), _TOP_MODE)
        tpm = await self._described(place.tpm)
        is_folder = place.path in {"", *contents.folders("")}
        return _attributes(inode, tpm.owner, _FOLDER_MODE if is_folder else _FILE_MODE)

    async def opendir(
        self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.FileHandleT:
        """A folder, as it is now."""
        place = self._numbers.place(inode)
        if place == _Place():
            tpms = await self._asked(lambda manager: manager.list())
            return self._opened(
                _Listing([(tpm.name, _Place(tpm.id), True, tpm.owner) for tpm in tpms])
            )
        return self._opened(_Listing(_entries(await self._described(place.tpm), place.path)))

    async def readdir(
        self, fh: pyfuse3.FileHandleT, start_id: int, token: pyfuse3.ReaddirToken
    ) -> None:
        """The entries behind the first *start_id*, as many as there is room for."""
        listing = self._open[fh]
        assert isinstance(listing, _Listing)  # noqa: S101  it is a folder's
        for at, (name, place, is_folder, owner) in enumerate(
            listing.entries[start_id:], start_id + 1
        ):
            found = self._found(place, owner, is_folder=is_folder)
            if not pyfuse3.readdir_reply(token, os.fsencode(name), found, at):
                self._numbers.forget(found.st_ino, 1)
                return

    async def releasedir(self, fh: pyfuse3.FileHandleT) -> None:
        """It is closed."""
        del self._open[fh]

    async def open(
        self, inode: pyfuse3.InodeT, flags: pyfuse3.FlagT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.FileInfo:
        """A file, with what is in it now; EAGAIN where the TPM cannot be asked without a noise."""
        number, path = self._numbers.place(inode)
        tpm = await self._described(number)
        text = contents.known(tpm, path)
        if path == contents.LOG:
            text = contents.log_text(await self._asked(lambda manager: manager.logs(number)))
        elif text is None:
            if tpm.state in {"stopped", "failed"}:
                raise pyfuse3.FUSEError(errno.EIO)
            text = await self._asked(lambda manager: manager.look(number, path))
            if text is None:
                raise pyfuse3.FUSEError(errno.ENOENT)
        return pyfuse3.FileInfo(fh=self._opened(text), direct_io=True)

    async def read(self, fh: pyfuse3.FileHandleT, off: int, size: int) -> bytes:
        """Of what was there when it was opened."""
        text = self._open[fh]
        assert isinstance(text, bytes)  # noqa: S101  it is a file's
        return text[off : off + size]

    async def release(self, fh: pyfuse3.FileHandleT) -> None:
        """It is closed."""
        del self._open[fh]

    def _opened(self, what: bytes | _Listing) -> pyfuse3.FileHandleT:
        self._last += 1
        self._open[self._last] = what
        return self._last

    def _found(self, place: _Place, owner: int, *, is_folder: bool) -> pyfuse3.EntryAttributes:
        number = self._numbers.look_up(place)
        return _attributes(number, owner, _FOLDER_MODE if is_folder else _FILE_MODE)

    async def _described(self, key: str) -> Tpm:
        return await self._asked(lambda manager: manager.describe(key))

    async def _asked(self, request: Callable[[Manager], Answer]) -> Answer:
        try:
            return await self._source.ask(request)
        except OSError as exc:
            raise pyfuse3.FUSEError(exc.errno or errno.EIO) from exc


def _entries(tpm: Tpm, folder: str) -> Sequence[tuple[str, _Place, bool, int]]:
    """As `_Listing` has them."""
    before = f"{folder}/" if folder else ""
    return [
        *((name, _Place(tpm.id, name), True, tpm.owner) for name in contents.folders(folder)),
        *(
            (name, _Place(tpm.id, before + name), False, tpm.owner)
            for name in contents.files(tpm, folder)
        ),
    ]


def _attributes(number: pyfuse3.InodeT, owner: int, mode: int) -> pyfuse3.EntryAttributes:
    found = pyfuse3.EntryAttributes()
    found.st_ino = number
    found.st_mode = mode
    found.st_uid = owner
    found.st_nlink = 2 if stat.S_ISDIR(mode) else 1
    found.entry_timeout = found.attr_timeout = 0  # it is asked for each time
    return found
