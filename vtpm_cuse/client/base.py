"""Driving a running vTPM: the PTM requests as calls, whatever carries them.

A transport is a subclass of `Control`: it carries one request and its answer,
and knows how a state blob travels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Final, Self, TypeVar

from vtpm_cuse.errors import AnswerError
from vtpm_cuse.wire import ptm
from vtpm_cuse.wire.blob import BLOB_SIZE_MAX
from vtpm_cuse.wire.ptm import PtmCommand, PtmResult

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType

    from vtpm_cuse.wire.layout import WireStruct
    from vtpm_cuse.wire.ptm import PtmBlobType, PtmStateFlag

R = TypeVar("R", bound="WireStruct")

EMPTY: Final = ptm.PtmEmpty()
_INFO_MAX: Final = 1 << 16
"""Bytes; several times what any libtpms has to say."""
_CLIENTS_MAX: Final = 1 << 25
"""Bytes; more than what all clients of a resource manager can have, whatever its limits."""


class Control(ABC):
    """A running vTPM.

    Every call raises OSError when the vTPM cannot be reached or gives no answer,
    WireError when the answer is too short, and AnswerError when the vTPM says no.
    """

    @abstractmethod
    def _exchange(self, command: PtmCommand, body: WireStruct) -> WireStruct:
        """Carries one request, and returns the structure that `PTM_SPECS` has for its answer."""

    @abstractmethod
    def get_state(self, kind: PtmBlobType, flags: PtmStateFlag) -> bytes:
        """The whole state blob of a running vTPM, header included."""

    @abstractmethod
    def set_state(self, kind: PtmBlobType, blob: bytes) -> None:
        """Gives a stopped vTPM a state blob; an empty one means that there is no such state."""

    @abstractmethod
    def close(self) -> None:
        """Lets go of the vTPM, which runs on."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def request(self, command: PtmCommand, body: WireStruct = EMPTY) -> WireStruct:
        """Any request; the answer is what `PTM_SPECS` says, with a result of 0."""
        answer = self._exchange(command, body)
        if result := getattr(answer, "result", 0):  # GET_CAPABILITY's answer has none
            raise AnswerError(result, f"TPM result from {command.name}: 0x{result:x}")
        return answer

    def capability(self) -> int:
        """The mask of PtmCapability bits."""
        answer = self._request_for(ptm.PtmCapabilityIoctl, PtmCommand.PTM_GET_CAPABILITY)
        return answer.caps

    def init(self, flags: int = 0) -> None:
        """Powers the TPM on, or resets it; flags are PtmInitFlag."""
        self.request(PtmCommand.PTM_INIT, ptm.PtmInitRequest(flags))

    def stop(self) -> None:
        """Powers the TPM off; the vTPM goes on to serve."""
        self.request(PtmCommand.PTM_STOP)

    def shutdown(self) -> None:
        """Ends the vTPM."""
        self.request(PtmCommand.PTM_SHUTDOWN)

    def established(self) -> int:
        """The tpmEstablished bit."""
        answer = self._request_for(ptm.PtmEstablishedResponse, PtmCommand.PTM_GET_TPMESTABLISHED)
        return answer.bit

    def reset_established(self, locality: int) -> None:
        """Clears the tpmEstablished bit on behalf of *locality*."""
        self.request(PtmCommand.PTM_RESET_TPMESTABLISHED, ptm.PtmLocalityRequest(locality))

    def set_locality(self, locality: int) -> None:
        """The locality of later TPM commands."""
        self.request(PtmCommand.PTM_SET_LOCALITY, ptm.PtmLocalityRequest(locality))

    def hash(self, chunks: Iterable[bytes]) -> None:
        """The D-RTM sequence over *chunks* of at most PTM_HASH_DATA_SIZE bytes."""
        self.request(PtmCommand.PTM_HASH_START)
        for chunk in chunks:
            self.request(PtmCommand.PTM_HASH_DATA, ptm.PtmHashDataRequest(len(chunk), chunk))
        self.request(PtmCommand.PTM_HASH_END)

    def cancel(self) -> None:
        """Asks a running TPM command to end."""
        self.request(PtmCommand.PTM_CANCEL_TPM_CMD)

    def store_volatile(self) -> None:
        """Keeps the volatile state with the permanent one."""
        self.request(PtmCommand.PTM_STORE_VOLATILE)

    def config(self) -> int:
        """The PtmConfigFlag bits: which keys are in use."""
        return self._request_for(ptm.PtmConfigResponse, PtmCommand.PTM_GET_CONFIG).flags

    def set_buffer_size(self, size: int) -> ptm.PtmBufferSizeResponse:
        """Sets the size of the TPM's buffer in bytes, or only asks with 0."""
        body = ptm.PtmBufferSizeRequest(size)
        return self._request_for(ptm.PtmBufferSizeResponse, PtmCommand.PTM_SET_BUFFERSIZE, body)

    def info(self, flags: int) -> str:
        """JSON text about what *flags* select, put together from its pieces."""
        return self._text(
            PtmCommand.PTM_GET_INFO, lambda offset: ptm.PtmInfoRequest(flags, offset), _INFO_MAX
        )

    def clients(self) -> str:
        """JSON text about the clients of the resource manager; see `client.clients`."""
        return self._text(PtmCommand.PTM_GET_CLIENTS, ptm.PtmClientsRequest, _CLIENTS_MAX)

    def flush_client(self, number: int, handle: int) -> None:
        """Ends an object or session of a client's, or all that it has with a *handle* of 0.

        A *number* of 0 stands for those who are gone and have left saved sessions.
        """
        body = ptm.PtmFlushClientRequest(number, handle)
        self.request(PtmCommand.PTM_FLUSH_CLIENT, body)

    def _text(self, command: PtmCommand, asked: Callable[[int], WireStruct], most: int) -> str:
        """A text put together from its pieces; *asked* makes the request for one by its offset."""
        text = bytearray()
        pieces_max = 3 * most // ptm.PTM_INFO_SIZE
        for _ in range(pieces_max):
            piece = self._request_for(ptm.PtmInfoResponse, command, asked(len(text)))
            check_size("Text", piece.totlength, most)
            text += piece.text[: piece.length]
            # totlength counts the NUL, which may not be asked for alone; an empty piece has no end.
            if len(text) >= piece.totlength - 1 or not piece.length:
                return text.rstrip(b"\0").decode(errors="replace")
        raise AnswerError(PtmResult.TPM_FAIL, f"Text in more than {pieces_max} pieces")

    def lock_storage(self, retries: int) -> None:
        """Takes the lock on the state, trying again *retries* times, each after 10 ms."""
        self.request(PtmCommand.PTM_LOCK_STORAGE, ptm.PtmLockStorageRequest(retries))

    def _request_for(self, kind: type[R], command: PtmCommand, body: WireStruct = EMPTY) -> R:
        answer = self.request(command, body)
        if not isinstance(answer, kind):
            raise TypeError(f"{command.name} is not answered by {kind.__name__}")
        return answer


def check_size(what: str, size: int, most: int = BLOB_SIZE_MAX) -> None:
    """Raises AnswerError for an answer that no vTPM gives: all of it would be taken into memory."""
    if size > most:
        raise AnswerError(
            PtmResult.TPM_FAIL, f"{what} of {size} bytes: no vTPM has more than {most}"
        )
