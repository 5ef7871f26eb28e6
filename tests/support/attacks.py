"""What an intruder would do who runs code in the handler of a TPM command.

The program below is `swtpm` with a handler that obeys commands of a form of its own: the name of
an attack in place of parameters. It answers how the attack went, if it lives to answer.

`ATTACKS` is the list: each with what it comes to in the sandbox, and what without one. `CALLS` is
every system call that the filter lets pass whatever its arguments.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from tests.support.waiting import PATIENCE_SECONDS

if TYPE_CHECKING:
    from collections.abc import Iterable

_PROGRAM: Final = r"""
import ctypes, errno, fcntl, mmap, os, signal, socket, struct, sys, tempfile, termios, threading
from tests.support.attacks import ATTACKS, NEW_CALLS, STILL
from vtpm_cuse.cli.swtpm import main
from vtpm_cuse.vtpm import vtpm

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
names = ctypes.CDLL("libseccomp.so.2")
PARENT = os.getppid()
SECRET = sys.argv.pop(1)
HERE = os.path.dirname(SECRET)
STATE = HERE + "/state"
PAGE = 4096
MEMORY = mmap.mmap(-1, PAGE)
WORD = ctypes.byref(ctypes.c_uint64())
PIPE = os.pipe()
LISTENER = socket.create_server(("127.0.0.1", 0))
CONNECTED = socket.socketpair()
DATAGRAM = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
FOLDER = os.open(HERE, os.O_RDONLY | os.O_DIRECTORY)
NULL = os.open("/dev/null", os.O_RDONLY)
PASSED = socket.socketpair()
with open(SECRET) as file:
    socket.send_fds(PASSED[0], [b"x"], [file.fileno()])
# What its caller left open, with a lock on it; and a service manager.
LOCKED = os.open(HERE + "/spare", os.O_RDWR | os.O_CREAT)
os.set_inheritable(LOCKED, True)
fcntl.flock(LOCKED, fcntl.LOCK_EX)
MANAGER = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
MANAGER.bind(f"\0manager-of-{os.getpid()}")
os.environ["NOTIFY_SOCKET"] = f"@manager-of-{os.getpid()}"
with tempfile.TemporaryFile(dir=HERE) as file:
    # By the kernel's entry for programs of 32 bits: mov eax, getpid; int 0x80; ret
    file.write(bytes.fromhex("b814000000cd80c3"))
    file.flush()
    CODE = mmap.mmap(file.fileno(), 8, prot=mmap.PROT_READ | mmap.PROT_EXEC)
    with open("/proc/self/maps") as maps:
        (OLD_ENTRY,) = [int(line.partition("-")[0], 16) for line in maps if " r-xs " in line]


def call(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), "")
    return result


def sc(name, *arguments):
    # A system call by its name; whole numbers are 64 bits wide.
    number = NEW_CALLS.get(name) or names.seccomp_syscall_resolve_name(name.encode())
    wide = [ctypes.c_ulong(a & (1 << 64) - 1) if isinstance(a, int) else a for a in arguments]
    wide += [ctypes.c_ulong(0)] * (6 - len(wide))
    return call(libc.syscall(ctypes.c_long(number), *wide))


def thread():
    attack = threading.Thread(target=lambda: None)
    attack.start()
    attack.join()


def made(name="x", mode=0o600):
    # A file of the intruder's in the state's folder.
    return os.open(f"{STATE}/{name}", os.O_RDWR | os.O_CREAT, mode)


def mapped():
    return ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(MEMORY)))


def the_log():
    wanted = os.stat(HERE + "/log")
    for fd in range(3, 50):
        try:
            if os.path.samestat(os.fstat(fd), wanted):
                return fd
        except OSError:
            pass


def the_manager():
    for fd in range(3, 50):
        try:
            found = socket.socket(fileno=fd)
        except OSError:
            continue
        try:
            if found.getpeername() == MANAGER.getsockname():
                return fd
        except OSError:
            pass
        finally:
            found.detach()


execute = vtpm.Vtpm._execute


def hostile(self, command):
    if command[10:15] != b"evil:":
        return execute(self, command)
    name = command[15:].decode()
    try:
        exec(STILL[name] if name in STILL else ATTACKS[name].code, globals())
    except OSError as exc:
        return b"refused: " + errno.errorcode.get(exc.errno, "?").encode()
    except RuntimeError as exc:
        if "bug" in str(exc):
            raise
        return b"failed: " + repr(exc).encode()
    except BaseException as exc:
        return b"failed: " + repr(exc).encode()
    return b"done"


vtpm.Vtpm._execute = hostile
sys.exit(main())
"""

_WITNESS: Final = r"""
import ctypes, errno, fcntl, os, sys
from vtpm_cuse.cli.swtpm import main
from vtpm_cuse.engine.libtpms import LibtpmsEngine

libc = ctypes.CDLL(None, use_errno=True)
start = LibtpmsEngine.start


def look(what):
    sandboxed = libc.prctl(21, 0, 0, 0, 0) < 0 and ctypes.get_errno() == errno.ENOSYS
    try:
        os.close(os.open("/etc/passwd", os.O_RDONLY))
    except PermissionError:
        pass
    else:
        sandboxed = False
    os.write(2, f"{what}: {'in' if sandboxed else 'out of'} the sandbox\n".encode())


def on_event(event, arguments):
    path = arguments[0] if event == "open" else None
    if isinstance(path, str) and path.startswith((".lock", "tpm2-00", "tpm-00", "TMP")):
        look("state")


def writes_to(path):
    for fd in range(3, 64):
        try:
            mode = fcntl.fcntl(fd, fcntl.F_GETFL)
            if os.path.samestat(os.fstat(fd), os.stat(path)) and not mode & os.O_PATH:
                return True
        except OSError:
            pass
    return False


def looking(self):
    look("libtpms")
    if "DEVICE" in os.environ:
        made = "made" if os.path.exists(os.environ["DEVICE"]) else "to be made"
        os.write(2, f"device: {made}\n".encode())
    if "PID_FILE" in os.environ:
        can = "can" if writes_to(os.environ["PID_FILE"]) else "cannot"
        os.write(2, f"libtpms: {can} write to the pid file\n".encode())
    start(self)


LibtpmsEngine.start = looking
sys.addaudithook(on_event)
sys.exit(main())
"""

WITNESS: Final = (sys.executable, "-c", _WITNESS)
"""The program, which tells on descriptor 2 whether it is in the sandbox when state is touched.

With DEVICE, whether the kernel has made that before.

And, if PID_FILE names one in its environment, whether it could write another number there.
"""

_UNDER_FILTER: Final = r"""
import ctypes, os, sys
library = ctypes.CDLL("libseccomp.so.2")
library.seccomp_init.restype = ctypes.c_void_p
context = ctypes.c_void_p(library.seccomp_init(ctypes.c_uint32(0x7FFF0000)))
for number in sys.argv[2].split(","):
    action = ctypes.c_uint32(0x50000 | int(sys.argv[1]))
    assert library.seccomp_rule_add_array(context, action, int(number), 0, None) == 0
assert library.seccomp_load(context) == 0
os.execv(sys.argv[3], sys.argv[3:])
"""


def under_filter(error: int, *calls: int) -> tuple[str, ...]:
    """Starts a program, which follows, below a filter that answers *calls* with *error*."""
    return (sys.executable, "-c", _UNDER_FILTER, str(error), ",".join(map(str, calls)))


_SWEEP: Final = r"""
import ctypes, errno, json, os, resource, sys
from vtpm_cuse.service.confine.seccomp import make_filter

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
rules = make_filter(sys.argv[1], sockets=True)
left_out = set(json.loads(sys.argv[2]))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
names = ctypes.CDLL("libseccomp.so.2")
names.seccomp_syscall_resolve_num_arch.restype = ctypes.c_char_p
answers = {}
for number in range(int(sys.argv[3])):
    name = (names.seccomp_syscall_resolve_num_arch(0, number) or str(number).encode()).decode()
    if name in left_out:
        continue
    child = os.fork()
    if child == 0:
        if rules is not None:
            rules.load()
        all_ones = [ctypes.c_ulong((1 << 64) - 1)] * 6
        result = libc.syscall(ctypes.c_long(number), *all_ones)
        os._exit(2 if result >= 0 else 1 if ctypes.get_errno() != errno.ENOSYS else 0)
    answers[name] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(json.dumps(answers))
"""

NEW_CALLS: Final = {
    "fchmodat2": 452,
    "futex_requeue": 456,
    "io_uring_setup": 425,
    "landlock_create_ruleset": 444,
    "map_shadow_stack": 453,
    "process_mrelease": 448,
    "cachestat": 451,
    "mseal": 462,
    "setxattrat": 463,
}
"""Numbers, the same on every machine, of calls that an installed libseccomp may not know."""


_CALLS_END: Final = 480


class Attack(NamedTuple):
    """One attack.

    Attributes:
        code: Run in the handler.
        inside: How it ends in the sandbox: "done", an error, or "killed".
        outside: How it ends without; more than one where kernels differ; empty for not tried.
    """

    code: str
    inside: str
    outside: tuple[str, ...] = ("done",)


def _refused(code: str, *outside: str) -> Attack:
    """A system call, or its arguments, that are as unknown."""
    return Attack(code, "ENOSYS", outside or ("done",))


def _forbidden(code: str, *outside: str) -> Attack:
    """A path."""
    return Attack(code, "EACCES", outside or ("done",))


def _deadly(code: str, *outside: str) -> Attack:
    return Attack(code, "killed", outside or ("done",))


_OLD_OR_NEW: Final = ("done", "EACCES")
"""New code: from Linux 6.3 on, the process has told the kernel to refuse it, sandbox or none."""


ATTACKS: Final = {
    "nothing": Attack("pass", "done"),
    "bug": Attack("raise RuntimeError('a bug of ours')", "no answer", ()),
    # -- files that are none of its business ------------------------------------------------
    "read": _forbidden("open('/etc/passwd').close()"),
    "read-neighbour": _forbidden("open(SECRET).close()"),
    "read-memory": _forbidden("open('/proc/self/mem', 'rb+').close()"),
    "list": _forbidden("os.listdir(HERE)"),
    "list-root": _forbidden("os.listdir('/')"),
    "write": _forbidden("open(HERE + '/made', 'w').close()"),
    "append": _forbidden("open(SECRET, 'a').close()"),
    "read-log-again": _forbidden("open(HERE + '/log').close()"),
    "truncate": _refused("os.truncate(SECRET, 0)"),
    "remove-folder": _refused("os.rmdir(HERE + '/folder')"),
    "remove-folder-at": _refused("sc('unlinkat', -100, (HERE + '/folder2').encode(), 0x200)"),
    "remove-below": _forbidden("os.unlink(HERE + '/below/thesis')"),
    # A descriptor from before gives its own content, and none of what is in the folder.
    "read-by-folder": _forbidden("os.close(os.open('secret', os.O_RDONLY, dir_fd=FOLDER))"),
    "remove-by-folder": _forbidden("os.unlink('spare', dir_fd=FOLDER)"),
    "rename": _forbidden("os.rename(SECRET, SECRET + '2'); os.rename(SECRET + '2', SECRET)"),
    "rename-out": Attack(
        "os.close(made('out')); os.rename(STATE + '/out', HERE + '/out')", "EACCES", ("done",)
    ),
    "link-in": _refused("sc('link', SECRET.encode(), (STATE + '/in').encode())"),
    "link-in-at": Attack(
        "sc('linkat', -100, SECRET.encode(), -100, (STATE + '/in2').encode(), 0)", "EXDEV"
    ),
    "link-of-descriptor": _refused(
        "sc('linkat', made(), b'', -100, (STATE + '/in3').encode(), 0x1000)"
    ),
    "rename-exchange": _refused(
        "sc('renameat2', -100, SECRET.encode(), -100, (HERE + '/log').encode(), 2);"
        "sc('renameat2', -100, SECRET.encode(), -100, (HERE + '/log').encode(), 2)"
    ),
    "read-link": _refused("os.readlink('/proc/self/exe')"),
    "change-folder": _refused("os.chdir('/'); os.chdir(HERE)"),
    "watch": _refused("os.close(sc('inotify_init1', 0))"),
    "watch-all": _refused("sc('fanotify_init', 99, 0)", "EINVAL", "EPERM"),
    "copy": _refused("sc('copy_file_range', made(), None, made('y'), None, 1, 0)"),
    "send-file": _refused("sc('sendfile', PIPE[1], made(), None, 1)"),
    # -- modes, owners, attributes -----------------------------------------------------------
    "chmod": _refused("os.chmod(SECRET, 0o600)"),
    "chmod-set-id": _refused("os.chmod(SECRET, 0o4755)"),
    "chmod-at": _refused("sc('fchmodat', -100, SECRET.encode(), 0o600)"),
    "chmod-at-2": _refused("sc('fchmodat2', -100, SECRET.encode(), 0o600, 0)", "done", "ENOSYS"),
    "chmod-state": _refused("os.chmod(STATE, 0o755)"),
    "fchmod": _refused("os.fchmod(made(), 0o666)"),
    "fchmod-state": _refused("os.fchmod(os.open(STATE, os.O_RDONLY), 0o755)"),
    "fchmod-held": _refused("os.fchmod(FOLDER, 0o755)"),
    "fchmod-device": _refused("os.fchmod(NULL, os.fstat(NULL).st_mode & 0o7777)", "done", "EPERM"),
    "fchmod-passed": _refused("os.fchmod(socket.recv_fds(PASSED[1], 1, 1)[1][0], 0o600)"),
    "fchmod-set-id": _refused("os.fchmod(made(), 0o4755)"),
    "fchmod-set-group": _refused("os.fchmod(made(), 0o2755)"),
    "fchmod-sticky": _refused("os.fchmod(made(), 0o1755)"),
    "fchmod-high-bits": _refused("sc('fchmod', made(), 1 << 40 | 0o4755)"),
    "open-set-id": _refused("made('u', 0o4755)"),
    "open-set-group": _refused("made('g', 0o2755)"),
    "open-sticky": _refused("made('s', 0o1755)"),
    "open-high-bits": _refused(
        "sc('openat', -100, (STATE + '/h').encode(), 1 << 40 | 0o102, 1 << 40 | 0o4755)"
    ),
    "open-nameless-set-id": _refused("os.open(STATE, os.O_TMPFILE | os.O_RDWR, 0o4755)"),
    "open-old-set-id": _refused("sc('open', (STATE + '/o').encode(), 0o102, 0o4755)"),
    "creat-set-id": _refused("sc('creat', (STATE + '/c').encode(), 0o4755)"),
    "openat2-set-id": _refused(
        "sc('openat2', -100, (STATE + '/2').encode(), struct.pack('3Q', 0o102, 0o4755, 0), 24)"
    ),
    "mkdir": _refused("os.mkdir(STATE + '/folder')"),
    "mkdir-sticky": _refused("sc('mkdirat', -100, (STATE + '/sticky').encode(), 0o1777)"),
    "chown": _refused("os.chown(SECRET, -1, -1)"),
    "fchown": _refused("os.fchown(made(), -1, -1)"),
    "fchown-held": _refused("os.fchown(FOLDER, -1, -1)"),
    "lchown": _refused("os.lchown(SECRET, -1, -1)"),
    "fchownat": _refused("sc('fchownat', -100, SECRET.encode(), -1, -1, 0)"),
    "times": _refused("os.utime(SECRET)"),
    "attribute": _refused("os.setxattr(SECRET, 'user.x', b'x')", "done", "ENOTSUP"),
    "attribute-fd": _refused(
        "sc('fsetxattr', made(), b'user.x', b'x', 1, 0)", "done", "ENOTSUP", "ENOTSUP"
    ),
    "read-attribute": _refused("os.listxattr(SECRET)", "done", "ENOTSUP"),
    "umask": _refused("sc('umask', 0o22)"),
    # -- more than its share of the disk ---------------------------------------------------------
    "file-too-large": Attack("os.pwrite(made('large'), b'x', 1 << 31)", "EFBIG"),
    "truncate-too-large": _refused("os.ftruncate(made('large'), 1 << 31)"),
    "allocate-too-large": _refused(
        "sc('fallocate', made('large'), 0, 0, 1 << 30)", "done", "ENOSPC"
    ),
    "allocate-far-away": _refused("sc('fallocate', made('large'), 0, 1 << 31, 1)"),
    "allocate-unseen": _refused("sc('fallocate', made('large'), 1, 0, 4096)"),
    # -- signals -----------------------------------------------------------------------------
    "owner": _refused("fcntl.fcntl(PIPE[0], fcntl.F_SETOWN, os.getpid())"),
    "owner-ex": _refused("fcntl.fcntl(PIPE[0], 15, struct.pack('ii', 1, os.getpid()))"),
    "signal-of-descriptor": _refused("fcntl.fcntl(PIPE[0], fcntl.F_SETSIG, 0)"),
    "async": _refused("fcntl.fcntl(PIPE[0], fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)"),
    "async-high-bits": _refused("sc('fcntl', PIPE[0], 1 << 32 | 4, 1 << 32 | os.O_ASYNC)"),
    "async-ioctl": _refused("fcntl.ioctl(PIPE[0], 0x5452, struct.pack('i', 1))"),
    "owner-ioctl": _refused("fcntl.ioctl(LISTENER, 0x8901, struct.pack('i', os.getpid()))"),
    "lease": _refused("fcntl.fcntl(made(), fcntl.F_SETLEASE, fcntl.F_UNLCK)", "done", "EAGAIN"),
    "notify-of-folder": _refused("fcntl.fcntl(os.open(STATE, 0), fcntl.F_NOTIFY, 0)"),
    "pipe-size": _refused("fcntl.fcntl(PIPE[0], 1031, 1 << 16)"),
    "seal": _refused("fcntl.fcntl(made(), 1034)", "EINVAL"),
    "write-hint": _refused("fcntl.fcntl(made(), 1036, struct.pack('Q', 0))"),
    "duplicate": _refused("os.close(fcntl.fcntl(PIPE[0], fcntl.F_DUPFD, 50))"),
    "lock-whole-file": _refused("fcntl.flock(made(), fcntl.LOCK_EX)"),
    "signal-thread": _refused("sc('tgkill', PARENT, PARENT, 0)"),
    "signal-queue": _refused("sc('rt_sigqueueinfo', PARENT, 0, bytes(128))", "EPERM"),
    "signal-pidfd": _refused("sc('pidfd_send_signal', 0, 0, None, 0)", "EBADF", "EINVAL"),
    "timer": _refused("sc('timer_create', 1, None, WORD)", "EFAULT", "done"),
    "alarm": _refused("sc('alarm', 0)"),
    "interval-timer": _refused("signal.setitimer(signal.ITIMER_REAL, 0)"),
    "timer-descriptor": _refused("os.close(sc('timerfd_create', 1, 0))"),
    # -- others over sockets -----------------------------------------------------------------
    "fast-open": _refused(
        "LISTENER.shutdown(2); LISTENER.sendto(b'x', 0x20000000, ('127.0.0.1', 9))",
        *("ECONNREFUSED", "EINPROGRESS", "ENOTSUP", "done"),
    ),
    "fast-open-high-bits": _refused(
        "sc('sendto', LISTENER.fileno(), b'x', 1, 1 << 32 | 0x20000000, bytes(16), 16)",
        *("EINVAL", "EAFNOSUPPORT", "ENOTSUP", "ECONNREFUSED", "EPIPE", "EINPROGRESS"),
    ),
    "fast-open-nowhere": _refused(
        "sc('sendto', LISTENER.fileno(), b'x', 1, 0x20000000, None, 0)",
        *("EINVAL", "EAFNOSUPPORT", "ENOTSUP", "ECONNREFUSED", "EPIPE", "EDESTADDRREQ"),
    ),
    "datagram": _refused("DATAGRAM.sendto(b'x', HERE + '/nobody')", "ENOENT"),
    "datagram-abstract": _refused(r"DATAGRAM.sendto(b'x', '\0nobody')", "ECONNREFUSED"),
    "message": _refused("CONNECTED[0].sendmsg([b'x'])"),
    "pass-descriptor": _refused("socket.send_fds(CONNECTED[0], [b'x'], [PIPE[0]])"),
    "messages": _refused("sc('sendmmsg', CONNECTED[0].fileno(), None, 0, 0)"),
    "receive-messages": _refused("sc('recvmmsg', CONNECTED[1].fileno(), None, 0, 0, None)"),
    "option-reuse": _refused("LISTENER.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)"),
    "option-buffer": _refused("LISTENER.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)"),
    "option-fast-open": _refused("LISTENER.setsockopt(6, 23, 5)"),
    "option-congestion": _refused("LISTENER.setsockopt(6, 13, b'reno')"),
    "option-filter": _refused(
        "LISTENER.setsockopt(1, 26, struct.pack('HxxxxxxP', 1, 0))", "EFAULT", "EINVAL", "EPERM"
    ),
    "option-ip": _refused("LISTENER.setsockopt(0, 1, 0)"),
    "ask-ip": _refused("LISTENER.getsockopt(0, 1)"),
    "ask-tcp": _refused("LISTENER.getsockopt(6, 11, 100)"),
    # -- code --------------------------------------------------------------------------------
    "code": _refused("mmap.mmap(-1, PAGE, prot=mmap.PROT_READ | mmap.PROT_EXEC)"),
    "code-writable": _refused("mmap.mmap(-1, PAGE, prot=7)", *_OLD_OR_NEW),
    "code-high-bits": _refused("sc('mmap', 0, PAGE, 1 << 33 | 5, 0x22, -1, 0)", "done", "EINVAL"),
    "code-of-file": _refused("fd = made('elf'); os.write(fd, b'x'); mmap.mmap(fd, 1, prot=5)"),
    "code-protect": _refused("sc('mprotect', mapped(), PAGE, 5)", *_OLD_OR_NEW),
    "code-protect-key": _refused("sc('pkey_mprotect', mapped(), PAGE, 5, -1)", *_OLD_OR_NEW),
    "code-in-memory-file": _refused("os.close(sc('memfd_create', b'x', 0))"),
    "code-in-secret-file": _refused("sc('memfd_secret', 0)", "done", "ENOSYS"),
    "remap": _refused("sc('remap_file_pages', 0, 0, 0, 0, 0)", "EINVAL"),
    "shared-memory": _refused("sc('shmctl', sc('shmget', 0, PAGE, 0o1600), 0, None)"),
    "semaphores": _refused("sc('semctl', sc('semget', 0, 1, 0o1600), 0, 0)"),
    "messages-of-old": _refused("sc('msgctl', sc('msgget', 0, 0o1600), 0, None)"),
    "queues": _refused("sc('mq_unlink', b'nobody')", "ENOENT"),
    "segments": _refused("sc('arch_prctl', 0x1003, WORD)", "done", "EFAULT"),
    "shadow-stack": _refused("sc('map_shadow_stack', 0, 0, 99)", "EINVAL", "ENOTSUP", "ENOSYS"),
    "lock-memory": _refused("sc('mlock', mapped(), PAGE)"),
    "lock-all-memory": _refused("sc('munlockall')"),
    "priority-of-mutex": _refused("sc('futex', WORD, 6 | 128, 0, None)", "done", "ESRCH"),
    "priority-requeue": _refused("sc('futex', WORD, 12 | 128, 0, 0, WORD, 0)", "EINVAL"),
    "priority-wait": _refused(
        "sc('futex', WORD, 11 | 128 | 256, 1, None, WORD, 0)", "EINVAL", "EAGAIN"
    ),
    "splice": _refused("sc('splice', PIPE[0], None, PIPE[1], None, 0, 0)"),
    "tee": _refused("sc('tee', PIPE[0], PIPE[1], 0, 0)"),
    "vmsplice": _refused("sc('vmsplice', PIPE[1], None, 0, 0)"),
    # -- itself and the machine ------------------------------------------------------------------
    "dumpable": _refused("sc('prctl', 4, 1, 0, 0, 0)"),
    "privileges": _refused("sc('prctl', 38, 1, 0, 0, 0)"),
    "filter": _refused("sc('seccomp', 2, 0, b'\\0\\0\\0\\0')"),
    "landlock": _refused("sc('landlock_create_ruleset', None, 0, 1)"),
    "limits": _refused("__import__('resource').setrlimit(7, __import__('resource').getrlimit(7))"),
    "ask-limits": _refused("__import__('resource').getrlimit(7)"),
    "nice": _refused("os.setpriority(0, 0, os.getpriority(0, 0))"),
    "schedule": _refused("os.sched_setaffinity(0, os.sched_getaffinity(0))"),
    "real-time": _refused("os.sched_setscheduler(0, 0, os.sched_param(0))"),
    "input-output-class": _refused("sc('ioprio_set', 1, 0, 0)"),
    "session": _refused("sc('getsid', 0)"),
    "group-of-processes": _refused("os.setpgid(0, os.getpgid(0))", "done", "EPERM"),
    "pipe": _refused("[os.close(fd) for fd in os.pipe()]"),
    "poller": _refused("os.close(sc('epoll_create1', 0))"),
    "counter": _refused("os.close(sc('eventfd2', 0, 0))"),
    "signal-descriptor": _refused("os.close(sc('signalfd4', -1, bytes(8), 8, 0))"),
    "terminal": _refused("fcntl.ioctl(PIPE[0], termios.TIOCSTI, b'x')", "ENOTTY"),
    "terminal-high-bits": _refused("sc('ioctl', PIPE[0], 1 << 32 | 0x5412, b'x')", "ENOTTY"),
    "terminal-size": _refused("fcntl.ioctl(PIPE[0], termios.TIOCGWINSZ, bytes(8))", "ENOTTY"),
    "attributes-of-file": _refused("fcntl.ioctl(made(), 0x80086601, bytes(8))", "done", "ENOTTY"),
    "new-process": _refused("sc('clone3', None, 0)", "EINVAL"),
    "new-connection-ring": _deadly("sc('io_uring_setup', 0, None)", "EINVAL", "EFAULT", "EPERM"),
    # -- others, by what only an intruder does ---------------------------------------------------
    "connect-tcp": _deadly("socket.socket().connect(('127.0.0.1', 9))", "ECONNREFUSED"),
    "connect-unix": _deadly("CONNECTED[0].connect(HERE + '/nobody')", "ENOENT", "EISCONN"),
    "disconnect": _deadly("sc('connect', LISTENER.fileno(), bytes(16), 16)", "done", "EISCONN"),
    "bind": _deadly("DATAGRAM.bind(HERE + '/bound')"),
    "listen": _deadly("LISTENER.listen()", "done"),
    "pair": _deadly("[end.close() for end in socket.socketpair()]"),
    "exec": Attack("os.execv('/bin/true', ['true'])", "killed", ()),
    "program": _deadly("os.waitpid(os.posix_spawn('/bin/true', ['true'], {}), 0)"),
    "fork": _deadly("os.waitpid(os.fork() or os._exit(0), 0)"),
    "thread": _deadly("thread()"),
    "ptrace": _deadly("sc('ptrace', 3, PARENT, None, None)", "ESRCH", "EPERM", "EIO"),
    "peek": _deadly("sc('process_vm_readv', PARENT, None, 0, None, 0, 0)", "done", "EPERM"),
    "kill": _deadly("os.kill(PARENT, 0)"),
    "kill-itself": _deadly("os.kill(os.getpid(), 0)"),
    "root": _deadly("os.setuid(os.getuid())"),
    "capability": _deadly("sc('capset', None, None)", "EFAULT"),
    "device": _deadly("os.mknod(HERE + '/null', 0o020600, os.makedev(1, 3))", "EPERM", "done"),
    "fifo-set-id": _deadly("os.mkfifo(STATE + '/fifo', 0o4755)"),
    "link": _deadly("os.symlink('/etc', HERE + '/link')"),
    "mount": _deadly("sc('mount', b'none', b'/mnt', b'tmpfs', 0, None)", "EPERM"),
    "name-space": _deadly("sc('unshare', 0x20000)", "EPERM"),
    "keys": _deadly("sc('keyctl', 0, -3, 0)", "done", "ENOKEY", "ENOSYS"),
    "old-entry": _deadly("ctypes.CFUNCTYPE(ctypes.c_int)(OLD_ENTRY)()"),
    "old-numbers": _deadly("call(libc.syscall(ctypes.c_long(0x40000000 | 39)))", "ENOSYS", "done"),
}

STILL: Final = {
    "reads the state": "os.close(os.open(STATE + '/tpm2-00.permall', os.O_RDONLY))",
    "overwrites the state": "os.pwrite(os.open(STATE + '/tpm2-00.permall', os.O_RDWR), b'x', 0)",
    "removes the state": "os.close(made('gone')); os.unlink(STATE + '/gone')",
    "takes the lock away": "os.unlink(STATE + '/.lock')",
    "makes files there": "os.close(made('program', 0o777))",
    "renames them": "os.close(made('old')); os.rename(STATE + '/old', STATE + '/new')",
    "gives them second names": (
        "os.close(made('one'));"
        "sc('linkat', -100, (STATE + '/one').encode(), -100, (STATE + '/two').encode(), 0)"
    ),
    "lets other users read and write what it makes": "os.close(made('open', 0o666))",
    "makes each of them up to 1 GiB large": "os.pwrite(made('large'), b'x', (1 << 30) - 1)",
    "lists the folder": "os.listdir(STATE)",
    "writes into its log": "os.write(the_log(), b'x')",
    "empties its log": "os.ftruncate(the_log(), 0)",
    "writes to what its caller left open and holds a lock on": "os.write(LOCKED, b'x')",
    "tells the service manager what it likes": (
        "os.write(the_manager(), b'STATUS=x'); os.write(the_manager(), b'MAINPID=1')"
    ),
    "sees whether a file is there, its owner, size and times": "os.stat(SECRET)",
    "learns about the machine": "os.uname(), os.getloadavg()",
    "keeps a processor busy and takes memory": "bytearray(1 << 26)",
    "does not hear any signal but SIGKILL": "signal.signal(signal.SIGTERM, signal.SIG_IGN)",
    "answers its clients what it likes": "CONNECTED[0].send(b'x')",
}
"""What nothing refuses; SECURITY.md has the same list."""

_ANY_ARGUMENTS: Final = (
    "accept accept4 brk clock_getres clock_gettime clock_nanosleep close close_range dup2 "
    "dup3 epoll_ctl epoll_pwait epoll_pwait2 epoll_wait exit exit_group fadvise64 fdatasync "
    "fstat fsync futex_wait futex_waitv futex_wake getcwd getdents64 getegid geteuid getgid "
    "getgroups getpeername getpid getppid getrandom getresgid getresuid getrusage getsockname "
    "gettid gettimeofday getuid lseek lstat madvise membarrier mremap munmap nanosleep "
    "newfstatat pause poll ppoll pread64 preadv pselect6 pwrite64 pwritev read readv recvfrom "
    "recvmsg rename renameat restart_syscall rseq rt_sigaction rt_sigpending rt_sigprocmask "
    "rt_sigreturn sched_getaffinity sched_getparam sched_getscheduler sched_yield select "
    "set_robust_list set_tid_address shutdown sigaltstack stat statx sysinfo time times uname "
    "unlink write writev"
)

CALLS: Final = frozenset(_ANY_ARGUMENTS.split())
"""What an intruder may call with any arguments, on a machine of this kind."""

UNFILTERED: Final = frozenset({"335", "336", "uretprobe", "uprobe"})
"""Traps of the kernel's own, which pass every filter, and do nothing for who calls them."""


def subverted(secret: str) -> tuple[str, ...]:
    """The program, which knows of a file beside its state that is none of its business."""
    return (sys.executable, "-c", _PROGRAM, secret)


def sweep(action: str, *, left_out: Iterable[str]) -> dict[str, int]:
    """Every system call but those, with all bits of all arguments set, each in a process.

    What it came to: a signal, as a negative number; 0 for a call that the kernel does not know, 1
    for another error, 2 for success.
    """
    done = subprocess.run(
        [sys.executable, "-c", _SWEEP, action, json.dumps(list(left_out)), str(_CALLS_END)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        timeout=PATIENCE_SECONDS,
        check=True,
    )
    answers: dict[str, int] = json.loads(done.stdout)
    return answers


def attack(name: str, *, on_worker: bool = False) -> bytes:
    """The command that starts an attack, in the thread of short or that of long commands."""
    code = 0x131 if on_worker else 0x17B  # TPM2_CreatePrimary, TPM2_GetRandom
    body = b"evil:" + name.encode()
    return b"\x80\x01" + (10 + len(body)).to_bytes(4, "big") + code.to_bytes(4, "big") + body
