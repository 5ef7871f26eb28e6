"""A process that keeps what is to outlive a manager that is killed: records, with their descriptors.

A manager puts what it has of each TPM there, again at each change, and takes it away with the TPM.
The next one that comes on its line is told all of it; so is none that goes on by itself. With the
last who has the line's other end, which a service manager keeps, it ends, and all is closed.

It looks into nothing, opens no path, and has no right.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import sys
from typing import Final

from vtpm_cuse.errors import ChannelError
from vtpm_cuse.fleet import lines
from vtpm_cuse.fleet.blocking import BlockingChannel, close_all
from vtpm_cuse.fleet.messages import Message, Order, Report
from vtpm_cuse.service.confine import capabilities, landlock, secrecy

_IGNORED: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)
"""Who ends it closes its line: a terminal or a service manager tells all processes."""


def main() -> None:
    """Becomes it; the word behind the program is the number of its end of the line."""
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    end = socket.socket(fileno=int(sys.argv[1]))
    end.set_inheritable(False)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # those of all TPMs
    secrecy.hide_process()  # it has the volatile states of all that sleep, and keys
    capabilities.drop_capabilities(())
    capabilities.gain_nothing()
    with contextlib.suppress(landlock.LandlockMissing):
        landlock.restrict({})
    keep(end)


def keep(end: socket.socket) -> None:
    """Until the end of the line."""
    kept: dict[bytes, Message] = {}
    while (found := lines.brought(end, 1)) is not None:
        word, (one,) = found
        channel = BlockingChannel(one)
        with contextlib.suppress(OSError):  # one who is killed has put something all the same
            for message in kept.values() if word == lines.TELL else ():
                channel.send(message)
            channel.send(Message(Report.READY, number=os.getpid()))
        with contextlib.suppress(OSError, ChannelError):
            while (message_ := channel.receive()) is not None:
                _take(message_, kept)
        channel.close()
    for message in kept.values():
        close_all(message.descriptors)


def _take(message: Message, kept: dict[bytes, Message]) -> None:
    """A record begins with a line that says whose it is; KEEP replaces it, FORGET is its end."""
    whose, _, _ = message.body.partition(b"\n")
    if (old := kept.pop(whose, None)) is not None:
        close_all(old.descriptors)
    if message.kind is Order.KEEP:
        kept[whose] = message
    else:
        close_all(message.descriptors)


if __name__ == "__main__":
    main()
