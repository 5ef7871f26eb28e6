"""TPMs that are yet to be: made by a worker, or by a set-up with keys and certificates."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING, Final

import trio

from vtpm_cuse.client.child import program_environment, program_words
from vtpm_cuse.errors import UsageError, shown
from vtpm_cuse.fleet.machine import keep, said_by
from vtpm_cuse.fleet.messages import Message, Order, Report
from vtpm_cuse.fleet.tasks import MAKE, Task
from vtpm_cuse.fleet.vault import Vault
from vtpm_cuse.storage.base import PERMANENT

if TYPE_CHECKING:
    from vtpm_cuse.fleet.workers import Workers

_SETUP: Final = "vtpm_cuse.cli.setup.swtpm_setup"


async def make(workers: Workers, folder: str, profile: str | None) -> None:
    """Makes a TPM whose state is in *folder*. Raises VtpmError, OSError."""
    vault = Vault(folder, may_begin=True)
    vault.lock()
    message = None
    try:
        worker = await workers.take()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(keep, worker, vault, lambda: None)
                task = Task(0.0, profile)
                await worker.orders.send(Message(Order.SERVE, task.pack(), flags=MAKE))
                message = await worker.orders.receive()
                nursery.cancel_scope.cancel()
        finally:
            worker.end()
    finally:
        vault.close()
    if message is None or message.kind is not Report.STOPPED:
        raise UsageError(said_by(message) if message else "the process that makes it has ended")
    _need_made(vault)


async def manufacture(folder: str, profile: str | None) -> None:
    """The same by `swtpm_setup`, as its configuration says. Raises VtpmError, OSError."""
    words = [*program_words(_SETUP), "--tpm2", "--tpm-state", folder, "--not-overwrite"]
    words += ["--create-ek-cert", "--create-platform-cert"]
    if profile is not None:
        words += ["--profile" if profile.lstrip().startswith("{") else "--profile-name", profile]
    done = await trio.run_process(
        words,
        capture_stdout=True,
        stderr=subprocess.STDOUT,
        check=False,
        env=program_environment(),
        start_new_session=True,
    )
    if done.returncode:
        lines = shown(done.stdout.decode(errors="replace")).strip().splitlines()
        raise UsageError(f"it cannot be set up: {lines[-1] if lines else 'no reason is given'}")
    vault = Vault(folder)
    vault.close()
    _need_made(vault)


def _need_made(vault: Vault) -> None:
    if PERMANENT not in vault.blobs.sizes():
        raise UsageError("it has not been stored")
    vault.close()
