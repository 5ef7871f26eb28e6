"""The manager, as the tree asks it: in a thread, by one at a time, and again behind its restart."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final, TypeVar

import trio

from vtpm_cuse.client.manager import Manager
from vtpm_cuse.errors import FleetError, FrontendError, VtpmError

if TYPE_CHECKING:
    from collections.abc import Callable

    Answer = TypeVar("Answer")

_PATIENCE_SECONDS: Final = 10.0
_ERRORS: Final = {
    "NoSuchTpm": errno.ENOENT,
    "BadName": errno.ENOENT,
    "NotOwner": errno.EACCES,
    "Busy": errno.EAGAIN,
}


class Source:
    """A connection to the manager at *path*, by default where the user's is."""

    def __init__(self, path: str | None) -> None:
        self._path = path
        self._turn = trio.Lock()
        self._manager: Manager | None = None

    async def ask(self, request: Callable[[Manager], Answer]) -> Answer:
        """What *request* gives.

        Raises:
            OSError: With what the manager's refusal is to a system call.
        """
        async with self._turn:
            try:
                return await trio.to_thread.run_sync(self._ask, request)
            except FleetError as exc:
                raise OSError(_ERRORS.get(exc.fault, errno.EIO), str(exc)) from exc
            except VtpmError as exc:
                raise OSError(errno.EIO, str(exc)) from exc

    def connect(self) -> Manager:
        """The manager. Raises FrontendError where none answers."""
        if self._manager is None:
            self._manager = Manager(self._path, patience=_PATIENCE_SECONDS)
        return self._manager

    def close(self) -> None:
        """Ends the connection."""
        if self._manager is not None:
            self._manager.close()
            self._manager = None

    def _ask(self, request: Callable[[Manager], Answer]) -> Answer:
        if self._manager is not None:
            try:
                return request(self._manager)
            except FrontendError:  # it may have begun anew
                self.close()
        return request(self.connect())
