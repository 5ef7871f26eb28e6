"""What is to outlive this manager where a service manager keeps descriptors: it is in the depot.

systemd's store has one descriptor of ours, the end of the depot's line: thousands do not fit into
the environment of a next manager, and each change would go through process 1. (sd_notify(3))
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
from typing import TYPE_CHECKING, Final

from vtpm_cuse.client.child import program_environment, program_words
from vtpm_cuse.errors import ChannelError
from vtpm_cuse.fleet import heritage, lines
from vtpm_cuse.fleet.blocking import BlockingChannel, close_all
from vtpm_cuse.fleet.heritage import Heritage, SavedMachine, SavedManager
from vtpm_cuse.fleet.messages import Message, Order
from vtpm_cuse.programs import start_program

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterable

    from vtpm_cuse.service.process.notify import ServiceManager

log = logging.getLogger(__name__)

NAME: Final = "depot"
"""Of the one descriptor that a service manager keeps."""
_PROGRAM: Final = "vtpm_cuse.fleet.depot"
_PATIENCE_SECONDS: Final = 10.0
"""For the depot, which takes a message in microseconds."""
_MANAGER: Final = ""
"""Whose record is the manager's own; the others' are those of TPMs, by their ids."""


class Deposits:
    """A manager's access to the depot; it may block, for as long as that takes its turn.

    One that does not take it for seconds is ended: it would hold what nobody has any more.

    Args:
        service: It keeps the line.
        line: That of an earlier manager, if there was one.
        tell: What is kept is wanted.

    Raises:
        OSError: There is no process to be had.

    Attributes:
        left: What is kept of an earlier manager, if anything is.
    """

    def __init__(
        self, service: ServiceManager, line: socket.socket | None, *, tell: bool = True
    ) -> None:
        self.left: Heritage | None = None
        self._lost = False
        self._process: int | None = None
        if line is not None:
            try:
                self._come(line, tell=tell)
            except (OSError, ChannelError) as exc:
                log.warning("What was kept for this manager is lost: %s", exc)
                line.close()
            else:
                return
        self._line, process = _started()
        self._process = os.pidfd_open(process)
        self._channel = _channel_of(self._line, tell=False)  # which it hears when it has begun
        service.forget(NAME)
        service.store(NAME, self._line.fileno())

    def _come(self, line: socket.socket, *, tell: bool) -> None:
        """Hears what is kept; of what cannot be used, nothing is kept any more."""
        self._line, self._channel = line, _channel_of(line, tell=tell)
        machines: list[SavedMachine] = []
        managers: list[SavedManager] = []
        others: list[str] = []
        while (message := self._channel.receive()) is not None and message.kind is Order.KEEP:
            whose, _, record = message.body.partition(b"\n")
            try:
                one = heritage.attached(record, message.descriptors)
            except ChannelError as exc:
                log.error("A TPM that was on is off: %s", exc)
                close_all(message.descriptors)
                others.append(whose.decode(errors="replace"))
                continue
            if isinstance(one, SavedManager):
                managers.append(one)
            else:
                machines.append(one)
        if message is None:
            self._channel.close()
            raise ChannelError("the process that keeps it has ended")
        with contextlib.suppress(OSError):
            self._process = os.pidfd_open(message.number)
        if machines and not managers:
            self.forget(machines)
            machines = []
        for number in others:
            self.drop(number)
        if managers:
            self.left = Heritage(managers[-1], tuple(machines))
        elif others:  # one of them may have the catalogue
            self._settle()

    def forget(self, machines: Iterable[SavedMachine]) -> None:
        """Nobody goes on with these."""
        for machine in machines:
            close_all(tuple(heritage.descriptors_of(machine)))
            self.drop(machine.id)

    def clear(self) -> None:
        """Nothing is kept any more, and nobody else has it when this returns. ChannelError, OSError."""
        if (left := self.left) is None:
            return
        self.left = None
        self.forget(left.machines)
        close_all(tuple(left._replace(machines=()).descriptors()))
        self.drop(_MANAGER)
        self._settle()

    def settle(self) -> None:
        """Waits until nothing is held any more of what was dropped: a device, say, has gone."""
        try:
            self._settle()
        except (OSError, ChannelError) as exc:
            self._lose(exc)

    def _settle(self) -> None:
        """Waits until all that was told has been done: the depot has one manager after the other."""
        self._channel.close()
        self._channel = _channel_of(self._line, tell=False)
        self._channel.receive()

    def put(self, one: SavedManager | SavedMachine) -> None:
        """From now on, the next manager is told this of it."""
        text, descriptors = heritage.detached(one)
        self._tell(Message(Order.KEEP, _whose(one) + text, descriptors=descriptors))

    def drop(self, number: str) -> None:
        """Of the TPM with that id there is nothing any more."""
        self._tell(Message(Order.FORGET, number.encode() + b"\n"))

    def _tell(self, message: Message) -> None:
        try:
            self._channel.send(message)
        except OSError as exc:
            self._lose(exc)

    def _lose(self, exc: Exception) -> None:
        if not self._lost:
            log.error("The death of vtpmd would end its TPMs until it is reloaded: %s", exc)
        self._lost = True
        if self._process is not None:
            with contextlib.suppress(OSError):  # it has ended
                signal.pidfd_send_signal(self._process, signal.SIGKILL)
        self._channel.close()

    def leave(self) -> int:
        """Its line, for the next manager."""
        self._channel.close()
        if self._process is not None:
            os.close(self._process)
        return self._line.detach()


def _channel_of(line: socket.socket, *, tell: bool) -> BlockingChannel:
    (end,) = lines.bring(line, 1, lines.TELL if tell else lines.GO_ON)
    return BlockingChannel(end, _PATIENCE_SECONDS)


def _whose(one: SavedManager | SavedMachine) -> bytes:
    return (_MANAGER if isinstance(one, SavedManager) else one.id).encode() + b"\n"


def _started() -> tuple[socket.socket, int]:
    """Our end of its line, and the number of its process."""
    ours, theirs = lines.line()
    with theirs:
        process = start_program(
            [*program_words(_PROGRAM), str(theirs.fileno())],
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env=program_environment(),
            start_new_session=True,
        )
    process.returncode = 0  # it outlives this process, and nobody waits for it
    return ours, process.pid
