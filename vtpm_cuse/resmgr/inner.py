"""The commands that the manager itself gives the TPM. They take no session and no authorization."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vtpm_cuse.errors import TpmError, WireError
from vtpm_cuse.resmgr.commands import packed
from vtpm_cuse.wire import tpm2_handles as wire
from vtpm_cuse.wire.tpm import TPM_HEADER_SIZE, TpmRc, response_code, succeeded
from vtpm_cuse.wire.tpm2_handles import CapabilityList, CommandAttributes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_AGAIN: Final = frozenset({0x922, 0x908, 0x90A})  # RETRY, YIELDED, TESTING
_TRIES: Final = 100
_LIST_MAX: Final = 254
"""Elements that fit into one answer of any TPM; it may give fewer."""


class Inner:
    """Speaks to the TPM by *process*, which must not take these for a client's commands.

    Every method raises TpmError when the TPM refuses, with its code.

    Attributes:
        count: Commands given so far.
    """

    def __init__(self, process: Callable[[bytes], bytes]) -> None:
        self._process = process
        self.count = 0

    def _run(self, name: str, command: bytes) -> bytes:
        for _ in range(_TRIES):
            self.count += 1
            response = self._process(command)
            if succeeded(response):
                return response
            try:
                code = response_code(response)
            except WireError:
                code = TpmRc.TPM_RC_FAILURE
            if code not in _AGAIN:
                break
        raise TpmError(name, code)

    def save(self, handle: int) -> bytes:
        """The context of an object, which stays loaded, or of a session, which does not."""
        return self._run("TPM2_ContextSave", wire.context_save(handle))[TPM_HEADER_SIZE:]

    def load(self, context: bytes) -> int:
        """Loads a context; returns the handle."""
        handle = wire.response_handle(self._run("TPM2_ContextLoad", wire.context_load(context)))
        if handle is None:
            raise TpmError("TPM2_ContextLoad", TpmRc.TPM_RC_FAILURE)
        return handle

    def flush(self, handle: int) -> None:
        """Ends a loaded object, or an active session."""
        self._run("TPM2_FlushContext", wire.flush_context(handle))

    def handles(self, first: int) -> list[int]:
        """All handles of the kind of *first*, from that on."""
        return [word for part in self._parts(wire.TPM_CAP_HANDLES, first) for word in part]

    def commands(self) -> bytes:
        """What the TPM says of each of its commands; see `commands.Commands.words`."""
        return b"".join(map(packed, self._parts(wire.TPM_CAP_COMMANDS, 0)))

    def tpm_property(self, number: int) -> int | None:
        """A TPM property; None where the TPM has none of this number."""
        question = wire.get_capability(wire.TPM_CAP_TPM_PROPERTIES, number, 1)
        found = CapabilityList.of(self._run("TPM2_GetCapability", question), 2)
        return found.words[1] if found and found.words[:1] == (number,) else None

    def _parts(self, capability: int, first: int) -> Iterator[tuple[int, ...]]:
        while True:
            question = wire.get_capability(capability, first, _LIST_MAX)
            found = CapabilityList.of(self._run("TPM2_GetCapability", question))
            if found is None or not found.words:
                return
            yield found.words
            if not found.more:
                return
            last = found.words[-1]
            first = (CommandAttributes.of(last)[0] if capability == 2 else last) + 1
