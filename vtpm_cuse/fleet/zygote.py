"""The process that workers are forked from: everything imported, and nothing of any TPM.

It has one thread, no descriptor but its channel, no secret, and may open no path. It is started as
a program of its own, so nothing of the manager's memory is in it. Of root's manager it is not
root: it is a user who owns nothing.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import os
import signal
import socket
import sys
from typing import TYPE_CHECKING, Final

from vtpm_cuse.config import Exits, LogConfig, ProcessConfig, User
from vtpm_cuse.errors import ChannelError, UsageError, VtpmError
from vtpm_cuse.fleet.messages import Message, Order, Report
from vtpm_cuse.service.confine import privileges, sandbox, seccomp
from vtpm_cuse.service.confine.preload import import_all
from vtpm_cuse.service.process import logs

if TYPE_CHECKING:
    from collections.abc import Callable

    from vtpm_cuse.fleet.blocking import BlockingChannel
    from vtpm_cuse.service.confine.seccomp import Filter

    Begin = Callable[[socket.socket], None]

log = logging.getLogger(__name__)

_IGNORED: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""The manager ends who is to end: a terminal or a service manager tells all of them."""
_ACCOUNTS: Final = ("vtpmd", "nobody")
"""As whom root's TPMs are served: the first that this system has."""
_SMALL_MAX: Final = 480
"""Bytes in the largest object that CPython has pools for."""
_ALIGNMENT: Final = 16
_HOLES: Final = 200
"""Of each size; 1.5 MiB, all in all, that all workers share."""
_CHILD: Final = {signal.SIGCHLD}


def main() -> None:
    """Becomes the zygote; the words behind the program are its channel and the log's level."""
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    logs.configure(LogConfig(level=int(sys.argv[2]), prefix="vtpmd: worker: "))
    end = socket.socket(fileno=int(sys.argv[1]))
    end.set_inheritable(False)
    import_all()
    from vtpm_cuse.fleet.blocking import BlockingChannel
    from vtpm_cuse.fleet.worker import worker  # with all that it takes
    from vtpm_cuse.fleet.worker.saved import FORM

    try:
        rules = seccomp.make_filter("kill", sockets=True, hands_over=True)
        own_rules = seccomp.make_filter("kill", sockets=True, hands_over=True, forks=True)
        practice = worker.prepare()
        _confine(own_rules)
    except VtpmError as exc:
        log.error("%s", exc)
        sys.exit(1)
    begin = functools.partial(worker.run, rules=rules, practice=practice)
    signal.signal(signal.SIGCHLD, _reap)
    gc.collect()
    _filling = _fill_holes()
    gc.freeze()
    channel = BlockingChannel(end)
    with contextlib.suppress(OSError, ChannelError):  # of a manager that is no more
        channel.send(Message(Report.READY, FORM.encode()))
        while (message := channel.receive()) is not None:
            _fork(message, channel, begin)


def _fill_holes() -> list[bytes]:
    """For as long as they are kept, a worker's objects are together, in pages that it shares with none.

    Else they would be in what is free of shared pages, each of which is copied for it.
    """
    return [bytes(size) for size in range(0, _SMALL_MAX, _ALIGNMENT) for _ in range(_HOLES)]


def _confine(rules: Filter | None) -> None:
    if os.geteuid() == 0:
        privileges.become(_account(), Exits())
    sandbox.restrict(ProcessConfig(), None)
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


def _fork(message: Message, channel: BlockingChannel, begin: Begin) -> None:
    """A worker with the end of its line; its number, and a descriptor that means it, go back."""
    (line,) = message.descriptors
    if message.kind is not Order.FORK:
        raise ChannelError("a zygote only forks")
    signal.pthread_sigmask(signal.SIG_BLOCK, _CHILD)  # until it is held, its number is its own
    child = os.fork()
    if child == 0:
        channel.close()
        _become_worker(line, begin)
    os.close(line)
    held = os.pidfd_open(child)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _CHILD)
    channel.send(Message(Report.DONE, number=child, descriptors=(held,)))
    os.close(held)


def _become_worker(line: int, begin: Begin) -> None:
    status = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _CHILD)
        begin(socket.socket(fileno=line))
        status = 0
    except BaseException:  # the manager hears that it has ended
        log.exception("A worker has failed")
    finally:
        os._exit(status)
