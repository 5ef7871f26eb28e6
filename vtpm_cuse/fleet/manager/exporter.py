"""Tells monitoring what the fleet does: on a socket, by HTTP, and in a file that is written anew."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Final

import trio

from vtpm_cuse.faults import sentence
from vtpm_cuse.files import write_output
from vtpm_cuse.fleet.manager.threads import in_thread
from vtpm_cuse.wire import metrics

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Text = Callable[[], Awaitable[str]]

log = logging.getLogger(__name__)

_FILE_MODE: Final = 0o644
"""Its reader is another user; it says no more than names and numbers."""
_FILE_SECONDS: Final = 15.0
_PATIENCE_SECONDS: Final = 10.0
_AT_ONCE: Final = 4
_HEAD_MAX: Final = 1 << 13
_END: Final = b"\r\n\r\n"


async def serve(text: Text, listener: trio.SocketListener) -> None:
    """Answers who connects, with what *text* gives then, until it is cancelled."""
    limit = trio.CapacityLimiter(_AT_ONCE)

    async def answer(stream: trio.SocketStream) -> None:
        async with limit, stream:
            try:
                with trio.fail_after(_PATIENCE_SECONDS):
                    if head := await _head(stream):
                        await stream.send_all(await answer_untrusted(head, text))
            except (trio.TooSlowError, trio.BrokenResourceError) as exc:
                log.debug("Who asked for metrics was cut off: %s", exc)

    await trio.serve_listeners(answer, [listener])


async def _head(stream: trio.SocketStream) -> bytes:
    """What comes up to an empty line, as far as anybody reads; nothing where there is no end."""
    head = b""
    while _END not in head and len(head) < _HEAD_MAX:
        if not (part := await stream.receive_some(_HEAD_MAX)):
            return b""
        head += part
    return head


async def answer_untrusted(head: bytes, text: Text) -> bytes:
    """The answer of HTTP/1.1 to a request's *head*."""
    method, _, rest = head.partition(b" ")
    path = rest.partition(b" ")[0].partition(b"?")[0]
    status, kind, body = "200 OK", metrics.OPENMETRICS, ""
    if _END not in head or method not in {b"GET", b"HEAD"}:
        status, kind = "400 Bad Request", "text/plain"
    elif path not in {b"/", b"/metrics"}:
        status, kind = "404 Not Found", "text/plain"
    else:
        body = await text()
    length = len(body)  # of ASCII alone
    lines = (
        f"HTTP/1.1 {status}",
        f"Content-Type: {kind}",
        f"Content-Length: {length}",
        "Connection: close",
    )
    said = "\r\n".join(lines).encode() + _END
    return said if method == b"HEAD" else said + body.encode()


async def keep_file(text: Text, path: str) -> None:
    """Has *path* tell what *text* gives, until it is cancelled. An error is no end of it."""
    while True:
        try:
            await in_thread(partial(write_output, path, (await text()).encode(), _FILE_MODE))
        except OSError as exc:
            log.error("%s: %s", path, sentence(exc))
        await trio.sleep(_FILE_SECONDS)
