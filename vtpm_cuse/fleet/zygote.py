"""The process that workers are forked from: everything imported, and nothing of any TPM.

It has one thread, no descriptor but its channel, no secret, and may open no path. It is started as
a program of its own, so nothing of the manager's memory is in it. Of root's manager it is not
root: it is a user who owns nothing.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import resource
import signal
import socket
import sys
from typing import TYPE_CHECKING, Final

from vtpm_cuse.config import Exits, LogConfig, User
from vtpm_cuse.errors import ChannelError, UsageError
from vtpm_cuse.fleet.messages import Message, Order, Report
from vtpm_cuse.service.confine import capabilities, landlock, privileges, seccomp, secrecy
from vtpm_cuse.service.confine.preload import import_all
from vtpm_cuse.service.process import logs

if TYPE_CHECKING:
    from vtpm_cuse.fleet.channel import BlockingChannel
    from vtpm_cuse.service.confine.seccomp import Filter

log = logging.getLogger(__name__)

_IGNORED: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""The manager ends who is to end: a terminal or a service manager tells all of them."""
_ACCOUNTS: Final = ("vtpmd", "nobody")
"""As whom root's TPMs are served: the first that this system has."""
_FILES_MAX: Final = 1024
_CHILD: Final = {signal.SIGCHLD}


def main() -> None:
    """Becomes the zygote; the words behind the program are its channel and the log's level."""
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    logs.configure(LogConfig(level=int(sys.argv[2]), prefix="vtpmd: worker: "))
    end = socket.socket(fileno=int(sys.argv[1]))
    end.set_inheritable(False)
    import_all()
    from vtpm_cuse.fleet import worker  # with all that it takes
    from vtpm_cuse.fleet.channel import BlockingChannel

    _ = worker
    rules = seccomp.make_filter("kill", sockets=True, hands_over=True)
    _confine(seccomp.make_filter("kill", sockets=True, hands_over=True, forks=True))
    signal.signal(signal.SIGCHLD, _reap)
    gc.collect()
    gc.freeze()
    channel = BlockingChannel(end)
    with contextlib.suppress(OSError, ChannelError):  # of a manager that is no more
        channel.send(Message(Report.READY))
        while (message := channel.receive()) is not None:
            _fork(message, channel, rules)


def _confine(rules: Filter | None) -> None:
    if os.geteuid() == 0:
        privileges.become(_account(), Exits())
    secrecy.hide_process()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # A worker looks at every number, for no folder shows it which are taken.
    most = min(_FILES_MAX, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    capabilities.drop_capabilities([])
    capabilities.gain_nothing()
    try:
        landlock.restrict({})
    except landlock.LandlockMissing as exc:
        log.warning("There is no Landlock, so files are not out of a TPM's reach: %s", exc)
    if rules is not None:
        rules.load()


def _account() -> User:
    for name in _ACCOUNTS:
        with contextlib.suppress(UsageError):
            return privileges.find_user(name)._replace(groups=())
    raise UsageError(f"There is none of these users: {', '.join(_ACCOUNTS)}")


def _reap(_number: int, _frame: object) -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            pass


def _fork(message: Message, channel: BlockingChannel, rules: Filter | None) -> None:
    """A worker with the two descriptors; its number, and a descriptor that means it, go back."""
    orders, calls = message.descriptors
    if message.kind is not Order.FORK:
        raise ChannelError("a zygote only forks")
    signal.pthread_sigmask(signal.SIG_BLOCK, _CHILD)  # until it is held, its number is its own
    child = os.fork()
    if child == 0:
        channel.close()
        _become_worker(orders, calls, rules)
    os.close(orders)
    os.close(calls)
    held = os.pidfd_open(child)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _CHILD)
    channel.send(Message(Report.DONE, number=child, descriptors=(held,)))
    os.close(held)


def _become_worker(orders: int, calls: int, rules: Filter | None) -> None:
    from vtpm_cuse.fleet import worker

    status = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _CHILD)
        worker.run(socket.socket(fileno=orders), socket.socket(fileno=calls), rules)
        status = 0
    except BaseException:  # the manager hears that it has ended
        log.exception("A worker has failed")
    finally:
        os._exit(status)
