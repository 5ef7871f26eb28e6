"""Character devices as data connections, and the devices that the kernel makes of a descriptor.

A `CharDevice` has the few calls of a socket that `serve.sockets` uses for a
connection, so that device and socket are served by the same code.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import select
import signal
import socket
import stat
from typing import Final, NoReturn

from vtpm_cuse.acquire.keeper import settle_down
from vtpm_cuse.errors import FrontendError, UsageError
from vtpm_cuse.wire.layout import HOST
from vtpm_cuse.wire.vtpmx import VTPM_PROXY_FLAG_TPM2, VTPM_PROXY_IOC_NEW_DEV, VtpmProxyNewDev

log = logging.getLogger(__name__)

VTPMX_PATH: Final = "/dev/vtpmx"

_NO_SUCH_FLAG: Final = 1 << 31
_GO: Final = b"G"
_ANSWER_MAX: Final = 64
_PROXY: Final = "anon_inode:[vtpms]"
_OPEN_HINTS: Final = {
    errno.ENOENT: "try 'modprobe tpm_vtpm_proxy' first",
    errno.ENODEV: "try 'modprobe tpm_vtpm_proxy' first",
    errno.EACCES: "run it as root",
    errno.EPERM: "the container or service has to be allowed this device (10:124)",
}
_IOCTL_HINTS: Final = {
    errno.EPERM: "it takes root, or the capability CAP_SYS_ADMIN",
    errno.EMFILE: "the limit of open files is reached: see 'ulimit -n'",
    errno.ENFILE: "the system's limit of open files is reached",
}


class CharDevice:
    """A device, or other descriptor, that bytes are read from and written to without waiting.

    Attributes:
        messages: Whether one read is one whole command.
    """

    messages = False

    def __init__(self, fd: int) -> None:
        """Takes *fd* over."""
        self._fd = fd
        os.set_inheritable(fd, False)
        self._prepare()

    def _prepare(self) -> None:
        os.set_blocking(self._fd, False)

    def fileno(self) -> int:
        """The descriptor, -1 once it is closed."""
        return self._fd

    def recv(self, size: int) -> bytes:
        """Up to *size* bytes, none at the end.

        Raises:
            BlockingIOError: There is nothing to read yet.
            OSError: The device has gone away.
        """
        return os.read(self._fd, size)

    def send(self, data: bytes | memoryview) -> int:
        """Writes; returns how many bytes. Raises OSError, among them BlockingIOError."""
        return os.write(self._fd, data)

    def detach(self) -> int:
        """Gives the descriptor away, as a socket does; returns it."""
        fd, self._fd = self._fd, -1
        return fd

    def close(self) -> None:
        """Closes it; again is harmless."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class ProxyDevice(CharDevice):
    """Serves a TPM device of the kernel's, which ends with the descriptor.

    The kernel ignores O_NONBLOCK here, so every read is preceded by a look whether it may be done.
    """

    messages = True

    def _prepare(self) -> None:
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLIN)

    def recv(self, size: int) -> bytes:
        """The next command, none when the kernel has given the device up."""
        if not self._poll.poll(0):
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        try:
            return os.read(self._fd, size)
        except BrokenPipeError:
            return b""

    def send(self, data: bytes | memoryview) -> int:
        """A whole response, in one write."""
        try:
            os.write(self._fd, data)
        except OSError as exc:
            if exc.errno != errno.EIO:
                raise
            # The kernel has waited too long and has asked something else, which is read next.
            log.warning("The kernel did not wait for a response")
        return len(data)

    @property
    def gone(self) -> bool:
        """Whether the kernel has given the device up."""
        return any(events & select.POLLHUP for _, events in self._poll.poll(0))


def open_device(path: str) -> CharDevice:
    """The device at *path*, for reading and writing.

    Raises:
        UsageError: It cannot be opened, or is no device.
    """
    try:
        # Non-blocking from the start: opening a terminal line may wait for its other end.
        fd = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as exc:
        raise UsageError(f"Cannot open {path}: {exc.strerror}") from exc
    return take_device(fd)


def take_device(fd: int) -> CharDevice:
    """The device that descriptor *fd* stands for; not for sockets.

    Raises:
        UsageError: It is no open descriptor, or a file's.
    """
    try:
        mode = os.fstat(fd).st_mode
    except OSError as exc:
        raise UsageError(f"Cannot stat file descriptor: {exc.strerror}") from exc
    if _is_proxy(fd, mode):
        return ProxyDevice(fd)
    # PEER: -c takes a file, too, and writes over it.
    if not (stat.S_ISCHR(mode) or stat.S_ISFIFO(mode)):
        os.close(fd)
        raise UsageError("Given file descriptor type is not supported.")
    return CharDevice(fd)


def _is_proxy(fd: int, mode: int) -> bool:
    """Whether it is what VTPM_PROXY_IOC_NEW_DEV gave, which is a file of no kind."""
    if stat.S_IFMT(mode):
        return False
    try:
        return os.readlink(f"/proc/self/fd/{fd}") == _PROXY
    except OSError:  # no /proc below this root: then it can be nothing else that is of use
        return True


class ProxyMaker:
    """Asks the kernel for a TPM device, /dev/tpmN and for a TPM 2.0 /dev/tpmrmN.

    That takes a right which the process that serves has given up by then, so another one keeps it
    until then. It is forked before anything is read that could turn against us.

    Raises:
        FrontendError: The kernel cannot make one, or this process may not have one.
    """

    def __init__(self, *, tpm2: bool) -> None:
        control = _open_control()
        try:
            _check_right(control)
        except FrontendError:
            os.close(control)
            raise
        try:
            self._ours, theirs = socket.socketpair()
        except OSError:
            os.close(control)
            raise
        # Nobody waits for the other one, which must not stay behind when it has ended.
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        try:
            if os.fork() == 0:
                _make_when_asked(control, theirs, tpm2=tpm2)
        except OSError:
            self._ours.close()
            raise
        finally:
            os.close(control)
            theirs.close()

    def make(self) -> tuple[ProxyDevice, VtpmProxyNewDev]:
        """Has the device made; the kernel shows it when it has set the TPM up, which must answer.

        Raises:
            FrontendError: The kernel refuses.
        """
        os.write(self._ours.fileno(), _GO)
        answer, fds, told, _ = socket.recv_fds(self._ours, _ANSWER_MAX, 1)
        self._ours.recv(1)  # the other one has ended: who looks for this process finds one
        self.close()
        if not fds:
            raise _refused(errno.EMFILE if told & socket.MSG_CTRUNC else int(answer or errno.EIO))
        os.set_inheritable(fds[0], False)
        return ProxyDevice(fds[0]), VtpmProxyNewDev.unpack_untrusted(answer, HOST)

    def close(self) -> None:
        """Ends the other process; again is harmless."""
        self._ours.close()


def make_proxy() -> VtpmProxyNewDev:
    """A TPM 2.0 of the kernel's; its ``fd`` is the caller's. Raises FrontendError: it is refused."""
    control = _open_control()
    try:
        made = _new_device(control, VTPM_PROXY_FLAG_TPM2)
    except OSError as exc:
        raise _refused(exc.errno or errno.EIO) from exc
    finally:
        os.close(control)
    os.set_inheritable(made.fd, False)
    return made


def _open_control() -> int:
    """Raises FrontendError."""
    try:
        return os.open(VTPMX_PATH, os.O_RDWR | os.O_CLOEXEC)
    except OSError as exc:
        reason = f"Could not open {VTPMX_PATH}: {exc.strerror}"
        raise FrontendError(reason, _OPEN_HINTS.get(exc.errno or 0, "")) from exc


def _check_right(control: int) -> None:
    """Raises FrontendError where the kernel would refuse later, when a new TPM has been made."""
    try:
        _new_device(control, _NO_SUCH_FLAG)
    except OSError as exc:
        if exc.errno != errno.EOPNOTSUPP:  # for the flag, so the rest is right
            raise _refused(exc.errno or errno.EIO) from exc


def _new_device(control: int, flags: int) -> VtpmProxyNewDev:
    """Raises OSError."""
    argument = bytearray(VtpmProxyNewDev(flags, 0, 0, 0, 0).pack(HOST))
    fcntl.ioctl(control, VTPM_PROXY_IOC_NEW_DEV, argument, True)
    return VtpmProxyNewDev.unpack_untrusted(argument, HOST)


def _refused(number: int) -> FrontendError:
    reason = f"Ioctl to create vtpm proxy failed: {os.strerror(number)}"
    return FrontendError(reason, _IOCTL_HINTS.get(number, ""))


def _make_when_asked(control: int, theirs: socket.socket, *, tpm2: bool) -> NoReturn:
    try:
        settle_down("vtpm-maker: asks for a TPM device", {control, theirs.fileno()})
        if theirs.recv(len(_GO)):
            _make(control, theirs, VTPM_PROXY_FLAG_TPM2 if tpm2 else 0)
    finally:
        os._exit(0)


def _make(control: int, theirs: socket.socket, flags: int) -> None:
    try:
        made = _new_device(control, flags)
    except OSError as exc:
        theirs.send(b"%d" % (exc.errno or errno.EIO))
    else:
        socket.send_fds(theirs, [made.pack(HOST)], [made.fd])
