"""TPMs that are yet to be: made by a worker, or by a set-up with keys and certificates."""

from __future__ import annotations

import contextlib
import os
import subprocess
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import trio

from vtpm_cuse.client.child import program_environment, program_words
from vtpm_cuse.errors import UsageError, shown
from vtpm_cuse.fleet.manager.threads import in_thread
from vtpm_cuse.fleet.manager.workers import keep, said_by
from vtpm_cuse.fleet.messages import Message, Order, Report
from vtpm_cuse.fleet.states.vault import Vault
from vtpm_cuse.fleet.tasks import MAKE, Task
from vtpm_cuse.storage.base import PERMANENT
from vtpm_cuse.storage.keys import Key

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vtpm_cuse.fleet.manager.workers import Workers

_SETUP: Final = "vtpm_cuse.cli.setup.swtpm_setup"
_CIPHER: Final = "aes-256-cbc"
_KEY_SIZE: Final = 32
_LOWEST: Final = 19
"""Of nice(2). One of SCHED_IDLE could keep the CA's lock for ever."""
_SAID_MAX: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class Made:
    """A TPM that is made; certificates name its id: it can become the TPM of that id alone.

    Attributes:
        id: A UUID.
        permanent: Its permanent state, as libtpms has it; never shown.
        saved: What it goes on from when it is first powered on, if it has been before: it is handed
            out once, for this permanent state.
    """

    id: str
    permanent: bytes = field(repr=False)
    saved: bytes = field(default=b"", repr=False)


async def make(workers: Workers, number: str, profile: str | None) -> Made:
    """Makes a TPM, which has been powered on; it is in memory alone.

    Raises:
        VtpmError: It cannot be made.
        OSError: The same.
    """
    message = None
    vault = Vault(None, may_begin=True)
    worker = await workers.take()
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(worker.watch)
            nursery.start_soon(keep, worker, vault, lambda: None)
            task = Task(0.0, profile)
            await worker.orders.send(Message(Order.SERVE, task.pack(), flags=MAKE))
            message = await worker.orders.receive()
            nursery.cancel_scope.cancel()
    finally:
        worker.foreign += message.descriptors if message else ()
        await worker.die()  # which closes that aside
        worker.end()
        workers.refill()
    if message is None or message.kind is not Report.STOPPED:
        raise UsageError(said_by(message) if message else "the process that makes it has ended")
    if PERMANENT not in vault.blobs.sizes():
        raise UsageError("it has not been stored")
    return Made(number, vault.permanent(), message.body)


async def manufacture(folder: str, number: str, profile: str | None, *, patient: bool) -> Made:
    """Makes one by ``swtpm_setup``, as its configuration says.

    Args:
        folder: An empty one. What comes into it is encrypted, and nobody has the key afterwards.
        number: The UUID that its certificates are to name.
        profile: libtpms' JSON, or a name for it.
        patient: All others on this host come first.

    Raises:
        VtpmError: It cannot be made.
        OSError: The same.
    """
    key = Key(os.urandom(_KEY_SIZE))
    with _memory() as secret, _memory() as said:
        os.write(secret, key.secret.hex().encode())
        os.lseek(secret, 0, os.SEEK_SET)
        words = [*program_words(_SETUP), "--tpm2", "--tpm-state", folder, "--not-overwrite"]
        words += ["--create-ek-cert", "--create-platform-cert", "--vmid", number]
        words += ["--keyfile-fd", str(secret), "--cipher", _CIPHER]
        if profile is not None:
            is_json = profile.lstrip().startswith("{")
            words += ["--profile" if is_json else "--profile-name", profile]
        process = await trio.lowlevel.open_process(
            words,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            env=program_environment(),
            pass_fds=(secret,),
            start_new_session=True,
        )
        if patient:
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, process.pid, _LOWEST)
        status = await _end_of(process)
        if status:
            text = os.pread(said, _SAID_MAX, 0).decode(errors="replace")
            lines = shown(text).strip().splitlines()
            raise UsageError(f"it cannot be set up: {lines[-1] if lines else 'no reason is given'}")
    vault = Vault(folder, key)
    try:
        return Made(number, await in_thread(vault.permanent))
    finally:
        vault.close()


async def _end_of(process: trio.Process) -> int:
    """Its exit status; one that nobody waits for any more is ended."""
    try:
        return await process.wait()
    finally:
        with trio.CancelScope(shield=True):
            process.kill()
            await process.wait()


@contextlib.contextmanager
def _memory() -> Iterator[int]:
    """A file that has no name."""
    fd = os.memfd_create("vtpmd")
    try:
        yield fd
    finally:
        os.close(fd)
