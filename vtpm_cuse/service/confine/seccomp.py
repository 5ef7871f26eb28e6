"""``--seccomp``: which system calls a serving process may still make, by libseccomp.

Three kinds. Those that serving takes are allowed, with the arguments that it takes. Those that only
an intruder makes end the process. All others fail as on a kernel that does not know them, which
libraries expect: a new version of one must not cost a TPM its life.

By ctypes, for libseccomp's own Python module is no package that pip can install, and pyseccomp,
which is one, was left in 2021.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import socket
import struct
from typing import TYPE_CHECKING, Final, NamedTuple

from vtpm_cuse.errors import FrontendError
from vtpm_cuse.files import file_limit
from vtpm_cuse.service.confine import capabilities

if TYPE_CHECKING:
    from vtpm_cuse.config import SeccompAction

FILE_SIZE_MAX: Final = 1 << 30
"""No file is made larger: much more than any state has, or a log or capture that somebody reads."""

_PROGRAM_MAX: Final = 4096 * 8
"""Bytes of a filter: as many instructions as the kernel takes."""

_ALLOWED: Final = (
    # descriptors that are open
    "read readv pread64 preadv write writev pwrite64 pwritev lseek close close_range "
    "fstat fsync fdatasync fadvise64 getdents64 dup2 dup3 poll ppoll select pselect6 "
    "epoll_wait epoll_pwait epoll_pwait2 epoll_ctl recv recvfrom "
    # paths: the state, see landlock.py
    "stat lstat newfstatat statx getcwd rename renameat unlink "
    # memory and threads that are there
    "brk munmap mremap madvise futex_wait futex_wake futex_waitv membarrier rseq "
    "set_robust_list sched_yield sched_getaffinity sched_getparam sched_getscheduler "
    "set_tid_address "
    # signals to itself are no need: only to receive them
    "rt_sigaction rt_sigprocmask rt_sigreturn sigreturn rt_sigpending sigaltstack "
    "restart_syscall pause "
    # time, chance, itself
    "clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday time times getrandom "
    "getpid gettid getppid getuid geteuid getgid getegid getgroups getresuid getresgid "
    "getrusage uname sysinfo exit exit_group"
)

_SOCKETS: Final = "accept accept4 recvmsg shutdown getsockname getpeername"
"""Of those who have sockets to accept clients on."""

_HANDS_OVER: Final = "sendmsg"
"""Of those who are one of many, each for a while, and give back what they served."""

_FORKS: Final = (
    # processes, and the descriptors that mean them
    "fork wait4 pidfd_open "
    # the beginning of what is forked: its loop, and the sandbox that it goes into
    "socketpair epoll_create1 eventfd2 pipe2 umask prctl capget capset seccomp prlimit64 setrlimit "
    "getrlimit landlock_create_ruleset landlock_add_rule landlock_restrict_self"
)
"""Of those whom others are forked from."""

_DEADLY: Final = (
    # other programs and processes
    "execve execveat fork vfork clone ptrace process_vm_readv process_vm_writev kcmp "
    "pidfd_getfd pidfd_open kill tkill "
    # the network
    "socket socketpair connect bind listen "
    # identity and name spaces
    "setuid setgid setreuid setregid setresuid setresgid setgroups setfsuid setfsgid capset "
    "setns unshare chroot pivot_root personality "
    # mounts, devices, links
    "mount umount umount2 move_mount open_tree fsopen fsmount fsconfig mount_setattr "
    "mknod mknodat symlink symlinkat "
    # the kernel
    "bpf perf_event_open userfaultfd io_uring_setup io_uring_enter io_uring_register "
    "add_key request_key keyctl init_module finit_module delete_module kexec_load "
    "kexec_file_load reboot swapon swapoff iopl ioperm modify_ldt syslog acct quotactl "
    "settimeofday clock_settime clock_adjtime adjtimex sethostname setdomainname "
    "name_to_handle_at open_by_handle_at lookup_dcookie vhangup"
)

_NOBODYS: Final = (
    # other processes' memory and descriptors
    "ptrace process_vm_readv process_vm_writev kcmp pidfd_getfd "
    # name spaces, roots, mounts
    "setns unshare chroot pivot_root mount umount umount2 move_mount open_tree fsopen fsmount "
    "fsconfig fspick mount_setattr "
    # the kernel
    "bpf perf_event_open userfaultfd io_uring_setup io_uring_enter io_uring_register "
    "init_module finit_module delete_module kexec_load kexec_file_load reboot swapon swapoff "
    "iopl ioperm modify_ldt syslog acct quotactl quotactl_fd settimeofday clock_settime "
    "clock_adjtime adjtimex sethostname setdomainname name_to_handle_at open_by_handle_at "
    "lookup_dcookie vhangup nfsservctl"
)
"""What neither a manager needs nor any program that it starts."""

_IOCTLS: Final = (
    0x5401,  # TCGETS: isatty() by Python's open()
    0x5421,  # FIONBIO: setblocking()
    0x5450,  # FIONCLEX
    0x5451,  # FIOCLEX
    0x1268,  # BLKSSZGET: a block device that holds the state
    0x80081272,  # BLKGETSIZE64
)

# What is open may be looked at, locked and duplicated, but may send no signals.
_FCNTLS: Final = (
    *(fcntl.F_GETFD, fcntl.F_SETFD, fcntl.F_GETFL, fcntl.F_DUPFD_CLOEXEC),
    *(fcntl.F_GETLK, fcntl.F_SETLK, fcntl.F_SETLKW),
    *(fcntl.F_OFD_GETLK, fcntl.F_OFD_SETLK, fcntl.F_OFD_SETLKW),
)
_FUTEXES: Final = (0, 1, 4, 5, 9, 10)  # waiting and waking; none that lends priorities
_FUTEX_COMMAND: Final = 0x7F
_SPECIAL_BITS: Final = 0o7000  # set-user-id, set-group-id, sticky
_TMPFILE: Final = os.O_TMPFILE & ~os.O_DIRECTORY

# seccomp.h
_KILL_PROCESS: Final = 0x8000_0000
_LOG: Final = 0x7FFC_0000
_ALLOW: Final = 0x7FFF_0000
_ERRNO: Final = 0x0005_0000
_ACT_BADARCH: Final = 2
_CTL_OPTIMIZE: Final = 8
_BINARY_TREE: Final = 2
_CMP_LT: Final = 2
_CMP_MASKED_EQ: Final = 7
_NO_SUCH_CALL: Final = -1

# linux/seccomp.h, linux/filter.h
_SET_MODE_FILTER: Final = 1
_FLAG_TSYNC: Final = 1
_INSTRUCTION_SIZE: Final = 8

_INT: Final = 0xFFFF_FFFF
_WHOLE: Final = 0xFFFF_FFFF_FFFF_FFFF
_PROT_EXEC: Final = 4


def _is(number: int, value: int, mask: int = _INT) -> bytes:
    """Struct scmp_arg_cmp: the argument *number*, masked, is *value*."""
    return struct.pack("@IiQQ", number, _CMP_MASKED_EQ, mask, value)


def _none_of(number: int, bits: int) -> bytes:
    return _is(number, 0, bits)


def _below(number: int, limit: int) -> bytes:
    return struct.pack("@IiQQ", number, _CMP_LT, limit, 0)


_SYMLINK_FOLLOW: Final = 0x400  # AT_SYMLINK_FOLLOW, as Python's os.link() says

_WithArguments = tuple[tuple[str, tuple[bytes, ...]], ...]

_WITH_ARGUMENTS: Final[_WithArguments] = (
    # No file that makes its caller another user; and, for it may be anybody's, no other mode or
    # owner for what is open. Without O_CREAT the mode may be anything.
    ("openat", (_none_of(2, os.O_CREAT | _TMPFILE),)),
    ("openat", (_none_of(3, _SPECIAL_BITS),)),
    ("linkat", (_none_of(4, _INT & ~_SYMLINK_FOLLOW),)),
    ("unlinkat", (_is(2, 0),)),
    # No file beyond measure.
    ("ftruncate", (_below(1, FILE_SIZE_MAX),)),
    ("fallocate", (_is(1, 0), _below(2, FILE_SIZE_MAX), _below(3, FILE_SIZE_MAX))),
    # To those who are connected, and to nobody else.
    ("send", (_none_of(3, socket.MSG_FASTOPEN),)),
    ("sendto", (_none_of(3, socket.MSG_FASTOPEN), _is(4, 0, _WHOLE))),
    *(("fcntl", (_is(1, command),)) for command in _FCNTLS),
    ("fcntl", (_is(1, fcntl.F_SETFL), _none_of(2, fcntl.FASYNC))),
    *(("futex", (_is(1, command, _FUTEX_COMMAND),)) for command in _FUTEXES),
    # No memory to run code from.
    *((name, (_none_of(2, _PROT_EXEC),)) for name in ("mmap", "mmap2", "mprotect")),
)

_NAME_SPACES: Final = 0x7E02_0080  # CLONE_NEW*, linux/sched.h
_FORKS_WITH_ARGUMENTS: Final[_WithArguments] = (
    # clone3, whose arguments nobody can see, is not there, and is not asked for again.
    ("clone", (_none_of(0, _NAME_SPACES),)),
    *(
        ("setsockopt", (_is(1, socket.SOL_SOCKET), _is(2, buffer)))
        for buffer in (socket.SO_SNDBUF, socket.SO_RCVBUF)
    ),
)
_SOCKETS_WITH_ARGUMENTS: Final[_WithArguments] = (
    ("setsockopt", (_is(1, socket.IPPROTO_TCP), _is(2, socket.TCP_NODELAY))),
    ("getsockopt", (_is(1, socket.SOL_SOCKET),)),
)


class Filter(NamedTuple):
    """A program for the kernel, made once: who is forked from its maker needs no library for it.

    Attributes:
        program: As seccomp(2) takes it.
        call: The number of that call on this machine, for the C library has no function for it.
    """

    program: bytes
    call: int

    def load(self) -> None:
        """From now on, for good, for all threads. Raises FrontendError."""
        try:
            capabilities.gain_nothing()  # or the kernel takes none but from root
        except OSError as exc:
            raise _refused(str(exc)) from exc
        libc = ctypes.CDLL(None, use_errno=True)
        libc.syscall.restype = ctypes.c_long
        code = ctypes.create_string_buffer(self.program, len(self.program))
        # struct sock_fprog: how many instructions, and where
        length = len(self.program) // _INSTRUCTION_SIZE
        argument = struct.pack("@HP", length, ctypes.addressof(code))
        result = libc.syscall(ctypes.c_long(self.call), _SET_MODE_FILTER, _FLAG_TSYNC, argument)
        if result > 0:
            raise _refused(f"thread {result} has another one")
        if result:
            raise _refused(os.strerror(ctypes.get_errno()))


class _Rules:
    """The rules of a filter, by libseccomp."""

    def __init__(self, default: int, other_machines: int) -> None:
        try:
            self._lib = ctypes.CDLL("libseccomp.so.2")
        except OSError as exc:
            raise _unavailable(str(exc), "install libseccomp2") from exc
        self._lib.seccomp_init.restype = ctypes.c_void_p
        context = self._lib.seccomp_init(ctypes.c_uint32(default))
        if not context:
            raise _refused("seccomp_init")
        self._context = ctypes.c_void_p(context)
        # The calls of a 32-bit program, or by the numbers of x32: by default only the thread ends.
        self._check(
            self._lib.seccomp_attr_set(self._context, _ACT_BADARCH, ctypes.c_uint32(other_machines))
        )

    def add(self, action: int, name: str, *arguments: bytes) -> None:
        """What becomes of a system call with all of such arguments. Raises FrontendError."""
        number = self._number(name)
        if number == _NO_SUCH_CALL:  # none of this machine's
            return
        self._check(
            self._lib.seccomp_rule_add_array(
                self._context, ctypes.c_uint32(action), number, len(arguments), b"".join(arguments)
            )
        )

    def finish(self) -> Filter:
        """The filter of these rules, which are used up. Raises FrontendError."""
        # Of no matter for what is allowed: an old libseccomp has no tree.
        self._lib.seccomp_attr_set(self._context, _CTL_OPTIMIZE, _BINARY_TREE)
        try:
            # Only from 2.6 on could it write to memory.
            with open(os.memfd_create("seccomp"), "w+b") as file:
                self._check(self._lib.seccomp_export_bpf(self._context, file.fileno()))
                file.seek(0)
                return Filter(file.read(), self._number("seccomp"))
        except OSError as exc:
            raise _refused(str(exc)) from exc
        finally:
            self._lib.seccomp_release(self._context)

    def _number(self, name: str) -> int:
        return int(self._lib.seccomp_syscall_resolve_name(name.encode()))

    @staticmethod
    def _check(result: int) -> None:
        if result < 0:
            raise _refused(os.strerror(-result))


def make_filter(
    action: SeccompAction, *, sockets: bool, hands_over: bool = False, forks: bool = False
) -> Filter | None:
    """The filter, made while its library can still be opened; none for the action "none".

    With "log" nothing is refused: what "kill" would refuse is in the kernel's audit log.

    Args:
        action: What becomes of other calls.
        sockets: Whether there are sockets to accept clients on.
        hands_over: Whether descriptors go back to who has given them.
        forks: Whether processes are forked, who then load a filter of their own.

    Raises:
        FrontendError: There is no libseccomp.
    """
    if action == "none":
        return None
    kill = action == "kill"
    rules = _Rules(_ERRNO | errno.ENOSYS if kill else _LOG, _KILL_PROCESS if kill else _LOG)
    kinds = (
        (True, _ALLOWED, _WITH_ARGUMENTS),
        (sockets, _SOCKETS, _SOCKETS_WITH_ARGUMENTS),
        (hands_over, _HANDS_OVER, ()),
        (forks, _FORKS, _FORKS_WITH_ARGUMENTS),
    )
    allowed: set[str] = set()
    for wanted, names, with_arguments in kinds:
        if wanted:
            for name in names.split():
                rules.add(_ALLOW, name)
            for name, arguments in with_arguments:
                rules.add(_ALLOW, name, *arguments)
            allowed.update(names.split(), (name for name, _ in with_arguments))
    for request in _IOCTLS:
        rules.add(_ALLOW, "ioctl", _is(1, request))
    if kill:
        for name in set(_DEADLY.split()) - allowed:
            rules.add(_KILL_PROCESS, name)
    return rules.finish()


def make_common_filter() -> Filter:
    """For who starts other programs, which inherit it: without what none of them does.

    Raises:
        FrontendError: There is no libseccomp.
    """
    rules = _Rules(_ALLOW, _KILL_PROCESS)
    for name in _NOBODYS.split():
        rules.add(_ERRNO | errno.EPERM, name)
    return rules.finish()


def _unavailable(reason: str, remedy: str) -> FrontendError:
    return FrontendError(
        f"Could not create the seccomp profile: {reason}",
        f"{remedy}, or do without by --seccomp action=none",
    )


def _refused(reason: str) -> FrontendError:
    if (limit := file_limit(_PROGRAM_MAX, "the seccomp filter")) is not None:
        return FrontendError(*limit)
    return _unavailable(
        reason, "let the kernel, or the container that this runs in, have seccomp filters"
    )
