"""SIGTERM, SIGINT and SIGHUP end a service in order."""

from __future__ import annotations

import signal

import trio


async def cancel_on_signal(scope: trio.CancelScope, *, task_status: trio.TaskStatus[None]) -> None:
    """Cancels *scope* at the first of these signals; has reported when they are caught."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        task_status.started()
        async for _ in signals:
            scope.cancel()
