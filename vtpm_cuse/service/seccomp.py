"""``--seccomp``: which system calls a serving process may still make, by libseccomp.

Three kinds. Those that serving takes are allowed. Those that only an intruder makes end the
process. All others fail as on a kernel that does not know them, which libraries expect: a new
version of one must not cost a TPM its life.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from typing import TYPE_CHECKING, Final

from vtpm_cuse.errors import FrontendError

if TYPE_CHECKING:
    from vtpm_cuse.service.config import SeccompAction

_ALLOWED: Final = (
    # descriptors that are open
    "read readv pread64 preadv write writev pwrite64 pwritev lseek close close_range "
    "fcntl fstat fstatfs fsync fdatasync ftruncate fallocate fadvise64 flock fchmod fchown "
    "getdents64 dup dup2 dup3 sync_file_range poll ppoll select pselect6 "
    "epoll_wait epoll_pwait epoll_pwait2 epoll_ctl "
    # sockets that are open
    "accept accept4 recv recvfrom recvmsg send sendto sendmsg shutdown "
    "getsockname getpeername getsockopt setsockopt "
    # paths: the state, see landlock.py
    "open openat stat lstat newfstatat statx access faccessat faccessat2 readlink readlinkat "
    "rename renameat renameat2 link linkat unlink unlinkat chmod fchmodat getcwd umask "
    # memory and threads that are there
    "brk munmap mremap madvise futex futex_wait futex_wake futex_waitv membarrier rseq "
    "set_robust_list sched_yield sched_getaffinity sched_getparam sched_getscheduler "
    "mlock munlock set_tid_address "
    # signals to itself are no need: only to receive them
    "rt_sigaction rt_sigprocmask rt_sigreturn sigreturn rt_sigpending sigaltstack "
    "restart_syscall pause "
    # time, chance, itself
    "clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday time times getrandom "
    "getpid gettid getppid getuid geteuid getgid getegid getgroups getresuid getresgid "
    "getrusage uname sysinfo exit exit_group"
)

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

_IOCTLS: Final = (
    0x5401,  # TCGETS: isatty() by Python's open()
    0x5421,  # FIONBIO: setblocking()
    0x5450,  # FIONCLEX
    0x5451,  # FIOCLEX
    0x1268,  # BLKSSZGET: a block device that holds the state
    0x80081272,  # BLKGETSIZE64
)

# seccomp.h
_KILL_PROCESS: Final = 0x8000_0000
_LOG: Final = 0x7FFC_0000
_ALLOW: Final = 0x7FFF_0000
_ERRNO: Final = 0x0005_0000
_CTL_TSYNC: Final = 4
_CTL_OPTIMIZE: Final = 8
_BINARY_TREE: Final = 2
_CMP_MASKED_EQ: Final = 7
_NO_SUCH_CALL: Final = -1

_PROT_EXEC: Final = 4
_EXEC_ARGUMENT: Final = {"mmap": 2, "mmap2": 2, "mprotect": 2}


def _masked(number: int, mask: int, value: int) -> bytes:
    """Struct scmp_arg_cmp: the argument *number*, masked, is *value*."""
    return struct.pack("@IiQQ", number, _CMP_MASKED_EQ, mask, value)


class Filter:
    """The rules; `load` puts them in force."""

    def __init__(self, default: int) -> None:
        try:
            self._lib = ctypes.CDLL("libseccomp.so.2")
        except OSError as exc:
            raise _unavailable(str(exc)) from exc
        self._lib.seccomp_init.restype = ctypes.c_void_p
        context = self._lib.seccomp_init(ctypes.c_uint32(default))
        if not context:
            raise _unavailable("seccomp_init")
        self._context = ctypes.c_void_p(context)

    def add(self, action: int, name: str, *arguments: bytes) -> None:
        """What becomes of a system call with such arguments. Raises FrontendError."""
        number = self._lib.seccomp_syscall_resolve_name(name.encode())
        if number == _NO_SUCH_CALL:  # none of this machine's
            return
        self._check(
            self._lib.seccomp_rule_add_array(
                self._context, ctypes.c_uint32(action), number, len(arguments), b"".join(arguments)
            )
        )

    def load(self) -> None:
        """From now on, for good, for all threads. Raises FrontendError."""
        # Of no matter for what is allowed: an old libseccomp has no tree.
        self._lib.seccomp_attr_set(self._context, _CTL_OPTIMIZE, _BINARY_TREE)
        self._check(self._lib.seccomp_attr_set(self._context, _CTL_TSYNC, 1))  # all threads
        self._check(self._lib.seccomp_load(self._context))
        self._lib.seccomp_release(self._context)

    @staticmethod
    def _check(result: int) -> None:
        if result < 0:
            raise _unavailable(os.strerror(-result))


def make_filter(action: SeccompAction) -> Filter | None:
    """The filter, made while its library can still be opened; none for the action "none".

    With "log" nothing is refused: what "kill" would refuse is in the kernel's audit log.

    Raises:
        FrontendError: There is no libseccomp.
    """
    if action == "none":
        return None
    rules = Filter(_LOG if action == "log" else _ERRNO | errno.ENOSYS)
    for name in _ALLOWED.split():
        rules.add(_ALLOW, name)
    for name, number in _EXEC_ARGUMENT.items():  # no memory to run code from
        rules.add(_ALLOW, name, _masked(number, _PROT_EXEC, 0))
    for request in _IOCTLS:
        rules.add(_ALLOW, "ioctl", _masked(1, 0xFFFF_FFFF, request))
    if action == "kill":
        for name in _DEADLY.split():
            rules.add(_KILL_PROCESS, name)
    return rules


def _unavailable(reason: str) -> FrontendError:
    return FrontendError(
        f"Could not create the seccomp profile: {reason}",
        "install libseccomp2, or do without by --seccomp action=none",
    )
