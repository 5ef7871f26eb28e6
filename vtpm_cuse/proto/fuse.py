"""The FUSE side: a folder that holds TPM device files and, beside them, texts to read.

Requests on a device file are `DeviceSession`'s. The texts are made when they
are read from their beginning; one that cannot be made yet waits as a read of the
device does. Nothing in the folder can be changed. Source: linux/fuse.h.

By hand, for the reasons that `proto.device` has.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from vtpm_cuse.errors import DeviceError
from vtpm_cuse.proto.device import (
    MAX_TRANSFER,
    DeviceSession,
    Saved,
    error_reply,
    handle_of,
    read_init,
    reply_to,
)
from vtpm_cuse.wire.fuse import (
    FUSE_ATOMIC_O_TRUNC,
    FUSE_KERNEL_VERSION,
    FUSE_ROOT_ID,
    FuseAttr,
    FuseAttrOut,
    FuseDirent,
    FuseEntryOut,
    FuseInHeader,
    FuseInitIn,
    FuseInitOut,
    FuseOpcode,
    FuseOpenFlag,
    FuseOpenIn,
    FuseOpenOut,
    FusePollOut,
    FuseReadWriteIn,
    FuseStatfsOut,
)
from vtpm_cuse.wire.layout import HOST

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vtpm_cuse.proto.device import DeviceFile, Handler, SavedDeviceSession

_IN = FuseInHeader.compiled(HOST)
_FIRST_DEVICE_ID: Final = 2
_S_IFDIR, _S_IFREG = 0o040000, 0o100000
_TEXT_SIZE: Final = 4096
"""What sysfs calls the size of a text that is not made yet."""
_NAME_MAX: Final = 255
_POLL_READABLE: Final = 0x41  # POLLIN | POLLRDNORM: a text can always be read
_BY_NODE: Final = frozenset(
    {
        FuseOpcode.FUSE_OPEN,
        FuseOpcode.FUSE_READ,
        FuseOpcode.FUSE_WRITE,
        FuseOpcode.FUSE_RELEASE,
        FuseOpcode.FUSE_IOCTL,
        FuseOpcode.FUSE_POLL,
    }
)
_CHANGES: Final = frozenset(
    {
        FuseOpcode.FUSE_SETATTR,
        FuseOpcode.FUSE_SYMLINK,
        FuseOpcode.FUSE_MKNOD,
        FuseOpcode.FUSE_MKDIR,
        FuseOpcode.FUSE_UNLINK,
        FuseOpcode.FUSE_RMDIR,
        FuseOpcode.FUSE_RENAME,
        FuseOpcode.FUSE_RENAME2,
        FuseOpcode.FUSE_LINK,
        FuseOpcode.FUSE_CREATE,
        FuseOpcode.FUSE_WRITE,
    }
)


class Texts(Protocol):
    """The files beside the device: at the top and in folders, none deeper."""

    def files(self, folder: str) -> tuple[str, ...]:
        """Names in a folder; "" is the top."""

    def folders(self) -> tuple[str, ...]:
        """Names of the folders at the top."""

    def size(self, path: str) -> int | None:
        """Bytes of a text, where that is known before it is read."""

    def read(self, path: str) -> bytes | None:
        """The text; None where that is to be tried again after a change. Raises VtpmError."""


class FileOwnership(NamedTuple):
    """What stat(2) tells of every file.

    Attributes:
        uid: Owner.
        gid: Group.
        device_mode: Permission bits of the device files.
        since: Seconds since the epoch.
    """

    uid: int
    gid: int
    device_mode: int
    since: int


class FuseSession(DeviceSession[Saved]):
    """One mount: *devices* are the device files by their names."""

    def __init__(
        self, devices: Mapping[str, DeviceFile[Saved]], texts: Texts, ownership: FileOwnership
    ) -> None:
        super().__init__(*devices.values())
        self._texts = texts
        self._devices = tuple(devices)
        self._ownership = ownership
        self._paths = ["", "", *devices]  # by node id; 0 is none
        self._open_texts: dict[int, bytes] = {}
        self._tree_handlers: dict[int, Handler] = {
            FuseOpcode.FUSE_LOOKUP: self._lookup,
            FuseOpcode.FUSE_GETATTR: self._getattr,
            FuseOpcode.FUSE_OPENDIR: self._opendir,
            FuseOpcode.FUSE_READDIR: self._readdir,
            FuseOpcode.FUSE_RELEASEDIR: lambda _, unique: reply_to(unique, b""),
            FuseOpcode.FUSE_STATFS: self._statfs,
            FuseOpcode.FUSE_FORGET: lambda _message, _unique: None,
            FuseOpcode.FUSE_BATCH_FORGET: lambda _message, _unique: None,
            FuseOpcode.FUSE_INTERRUPT: self._interrupt,
            FuseOpcode.FUSE_OPEN: self._open_text,
            FuseOpcode.FUSE_READ: self._read_text,
            FuseOpcode.FUSE_RELEASE: self._release_text,
            # ENOSYS would mean that no file of this mount knows poll.
            FuseOpcode.FUSE_POLL: self._poll_text,
            FuseOpcode.FUSE_IOCTL: lambda _, unique: error_reply(unique, errno.ENOTTY),
            **dict.fromkeys(_CHANGES, self._refuse),
        }

    def suspend(self) -> SavedDeviceSession[Saved]:
        """With what the kernel's node ids stand for, and the texts that are open."""
        texts = tuple(self._open_texts.items())
        return super().suspend()._replace(paths=tuple(self._paths), texts=texts)

    def resume(self, saved: SavedDeviceSession[Saved]) -> None:
        """Goes on where *saved* was suspended; called once, before anything else."""
        super().resume(saved)
        self._paths, self._open_texts = list(saved.paths), dict(saved.texts)

    def _handler(self, opcode: int, nodeid: int) -> Handler | None:
        device = 0 <= nodeid - _FIRST_DEVICE_ID < len(self._devices)
        if device and opcode in _BY_NODE:
            return self._handlers[opcode]
        return self._tree_handlers.get(opcode)

    def _file_number(self, message: memoryview) -> int:
        return int(_IN.unpack_from(message)[3]) - _FIRST_DEVICE_ID

    # -- the tree -------------------------------------------------------------------------

    def _lookup(self, message: memoryview, unique: int) -> bytes:
        folder = self._path(message)
        name = bytes(message[_IN.size :]).partition(b"\0")[0].decode(errors="surrogateescape")
        if name not in self._names(folder):
            raise DeviceError(errno.ENOENT)
        nodeid = self._id(f"{folder}/{name}" if folder else name)
        # Nothing is kept by the kernel: sizes and PCR banks change.
        return reply_to(
            unique, FuseEntryOut(nodeid, 0, 0, 0, 0, 0, self._attributes(nodeid)).pack(HOST)
        )

    def _getattr(self, message: memoryview, unique: int) -> bytes:
        self._path(message)
        nodeid = _IN.unpack_from(message)[3]
        return reply_to(unique, FuseAttrOut(0, 0, 0, self._attributes(nodeid)).pack(HOST))

    def _opendir(self, message: memoryview, unique: int) -> bytes:
        self._path(message)
        return reply_to(unique, FuseOpenOut(0, 0).pack(HOST))

    def _readdir(self, message: memoryview, unique: int) -> bytes:
        folder = self._path(message)
        request = FuseReadWriteIn.unpack_untrusted(message[_IN.size :], HOST)
        listing = b""
        names = (".", "..", *self._names(folder))
        for place, name in enumerate(names[request.offset :], request.offset + 1):
            path = f"{folder}/{name}" if folder else name
            nodeid = FUSE_ROOT_ID if name in {".", ".."} else self._id(path)
            encoded = name.encode(errors="surrogateescape")
            kind = self._mode(self._paths[nodeid]) >> 12
            entry = FuseDirent(nodeid, place, len(encoded), kind, encoded).pack(HOST)
            entry = entry.ljust(-(-len(entry) // 8) * 8, b"\0")
            if len(listing) + len(entry) > request.size:
                break
            listing += entry
        return reply_to(unique, listing)

    def _statfs(self, _message: memoryview, unique: int) -> bytes:
        answer = FuseStatfsOut(0, 0, 0, 0, 0, bsize=4096, namelen=_NAME_MAX, frsize=4096)
        return reply_to(unique, answer.pack(HOST))

    def _refuse(self, _message: memoryview, unique: int) -> bytes:
        return error_reply(unique, errno.EPERM)

    def _names(self, folder: str) -> tuple[str, ...]:
        if folder:
            return self._texts.files(folder)
        return (*self._devices, *self._texts.files(""), *self._texts.folders())

    def _path(self, message: memoryview) -> str:
        nodeid = int(_IN.unpack_from(message)[3])
        if not FUSE_ROOT_ID <= nodeid < len(self._paths):
            raise DeviceError(errno.ENOENT)
        return self._paths[nodeid]

    def _id(self, path: str) -> int:
        """Numbers are given once: there are only so many names."""
        if path not in self._paths:
            self._paths.append(path)
        return self._paths.index(path, FUSE_ROOT_ID)

    def _mode(self, path: str) -> int:
        if path in self._devices:
            return _S_IFREG | self._ownership.device_mode
        is_folder = not path or ("/" not in path and path not in self._texts.files(""))
        return _S_IFDIR | 0o555 if is_folder else _S_IFREG | 0o444

    def _attributes(self, nodeid: int) -> bytes:
        path, owner = self._paths[nodeid], self._ownership
        mode = self._mode(path)
        size = 0
        if mode & _S_IFREG and path not in self._devices:
            known = self._texts.size(path)
            size = _TEXT_SIZE if known is None else known
        return FuseAttr(
            ino=nodeid,
            size=size,
            blocks=0,
            atime=owner.since,
            mtime=owner.since,
            ctime=owner.since,
            atimensec=0,
            mtimensec=0,
            ctimensec=0,
            mode=mode,
            nlink=2 if mode & _S_IFDIR else 1,
            uid=owner.uid,
            gid=owner.gid,
        ).pack(HOST)

    # -- texts ----------------------------------------------------------------------------

    def _open_text(self, message: memoryview, unique: int) -> bytes:
        self._path(message)
        request = FuseOpenIn.unpack_untrusted(message[_IN.size :], HOST)
        if request.flags & os.O_ACCMODE != os.O_RDONLY:
            raise DeviceError(errno.EACCES)
        handle = self._take_handle()
        self._open_texts[handle] = b""
        return reply_to(unique, FuseOpenOut(handle, FuseOpenFlag.FOPEN_DIRECT_IO).pack(HOST))

    def _read_text(self, message: memoryview, unique: int) -> bytes | None:
        path = self._path(message)
        request = FuseReadWriteIn.unpack_untrusted(message[_IN.size :], HOST)
        if request.offset:
            text: bytes | None = self._open_texts.get(request.fh, b"")
        else:
            text = self._texts.read(path)
        if text is None:
            return None
        if request.fh in self._open_texts:
            self._open_texts[request.fh] = text
        return reply_to(unique, text[request.offset : request.offset + request.size])

    def _release_text(self, message: memoryview, unique: int) -> bytes:
        self._open_texts.pop(handle_of(message), None)
        return reply_to(unique, b"")

    def _poll_text(self, _message: memoryview, unique: int) -> bytes:
        return reply_to(unique, FusePollOut(_POLL_READABLE).pack(HOST))


def init_reply(message: memoryview) -> bytes:
    """Answers INIT.

    Raises:
        FrontendError: The request is no INIT that can be answered.
    """
    unique, request = read_init(message, FuseInitIn, FuseOpcode.FUSE_INIT, "/dev/fuse")
    answer = FuseInitOut(
        FUSE_KERNEL_VERSION,
        request.minor,
        max_readahead=request.max_readahead,
        flags=request.flags & FUSE_ATOMIC_O_TRUNC,
        max_background=0,
        congestion_threshold=0,
        max_write=MAX_TRANSFER,
        time_gran=1,
    )
    return reply_to(unique, answer.pack(HOST))
