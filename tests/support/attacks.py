"""What an intruder would do who runs code in the handler of a TPM command.

The program below is `swtpm` with a handler that obeys commands of a form of its own: the name of
an attack in place of parameters. It answers how the attack went, if it lives to answer.
"""

from __future__ import annotations

import sys
from typing import Final

_PROGRAM: Final = r"""
import ctypes, errno, fcntl, mmap, os, signal, socket, subprocess, sys, termios, threading
from vtpm_cuse.cli.swtpm import main
from vtpm_cuse.device import vtpm

libc = ctypes.CDLL(None, use_errno=True)
PARENT = os.getppid()
SECRET = sys.argv.pop(1)
HERE = os.path.dirname(SECRET)


def call(function, *arguments):
    if function(*arguments) < 0:
        raise OSError(ctypes.get_errno(), "")


def thread():
    attack = threading.Thread(target=lambda: None)
    attack.start()
    attack.join()


ATTACKS = {
    "nothing": lambda: None,
    "read": lambda: open("/etc/passwd").close(),
    "read-neighbour": lambda: open(SECRET).close(),
    "list": lambda: os.listdir(HERE),
    "write": lambda: open(HERE + "/made", "w").close(),
    "truncate": lambda: os.truncate(SECRET, 0),
    "remove": lambda: os.unlink(SECRET),
    "rename": lambda: os.rename(SECRET, SECRET + "2"),
    "terminal": lambda: fcntl.ioctl(2, termios.TIOCSTI, b"x"),
    "code": lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC),
    "dumpable": lambda: call(libc.prctl, 4, 1, 0, 0, 0),
    "connect-tcp": lambda: socket.socket().connect(("127.0.0.1", 9)),
    "connect-unix": lambda: socket.socket(socket.AF_UNIX).connect(HERE + "/nobody"),
    "pair": lambda: socket.socketpair(),
    "exec": lambda: os.execv("/bin/true", ["true"]),
    "program": lambda: subprocess.run(["/bin/true"]),
    "fork": lambda: os.fork() or os._exit(0),
    "thread": thread,
    "ptrace": lambda: call(libc.ptrace, 16, PARENT, None, None),
    "peek": lambda: call(libc.process_vm_readv, PARENT, None, 0, None, 0, 0),
    "kill": lambda: os.kill(PARENT, 0),
    "root": lambda: os.setuid(0),
    "device": lambda: os.mknod(HERE + "/null", 0o020600, os.makedev(1, 3)),
    "link": lambda: os.symlink("/etc", HERE + "/link"),
    "mount": lambda: call(libc.mount, b"none", b"/mnt", b"tmpfs", 0, None),
    "name-space": lambda: call(libc.unshare, 0x20000),
}

execute = vtpm.Vtpm._execute


def hostile(self, command):
    if command[10:15] != b"evil:":
        return execute(self, command)
    name = command[15:].decode()
    if name == "bug":
        raise RuntimeError("a bug of ours")
    try:
        ATTACKS[name]()
    except OSError as exc:
        return b"refused: " + errno.errorcode.get(exc.errno, "?").encode()
    except BaseException as exc:
        return b"failed: " + type(exc).__name__.encode()
    return b"done"


vtpm.Vtpm._execute = hostile
sys.exit(main())
"""

REFUSED: Final = {
    **dict.fromkeys(["read", "read-neighbour", "list", "write", "remove"], "EACCES"),
    "rename": "EACCES",
    **dict.fromkeys(["truncate", "terminal", "code", "dumpable"], "ENOSYS"),
}
"""Attacks that fail, and how."""

DEADLY: Final = (
    *("connect-tcp", "connect-unix", "pair", "exec", "fork", "thread", "ptrace", "peek"),
    *("kill", "root", "device", "link", "mount", "name-space"),
)
"""Attacks that end the process."""


def subverted(secret: str) -> tuple[str, ...]:
    """The program, which knows of a file beside its state that is none of its business."""
    return (sys.executable, "-c", _PROGRAM, secret)


def attack(name: str, *, on_worker: bool = False) -> bytes:
    """The command that starts an attack, in the thread of short or that of long commands."""
    code = 0x131 if on_worker else 0x17B  # TPM2_CreatePrimary, TPM2_GetRandom
    body = b"evil:" + name.encode()
    return b"\x80\x01" + (10 + len(body)).to_bytes(4, "big") + code.to_bytes(4, "big") + body
