"""TPM2_GetCapability as the TPM of one connection answers it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vtpm_cuse.resmgr.quota import sessions_left
from vtpm_cuse.resmgr.sessions import Place
from vtpm_cuse.wire import tpm2_handles as wire
from vtpm_cuse.wire.tpm import TpmRc, response_code
from vtpm_cuse.wire.tpm2_handles import SESSIONS, CapabilityList, TpmHt, index_of, kind_of

if TYPE_CHECKING:
    from vtpm_cuse.resmgr.manager import Connection, Manager

_LIST_MAX: Final = 254


def capability(
    manager: Manager, connection: Connection, command: bytes, question: tuple[int, int, int]
) -> bytes:
    """The response to *command*, which asks *question*: capability, first property, count."""
    asked, first, count = question
    kind = kind_of(first)
    if asked == wire.TPM_CAP_HANDLES and (kind == TpmHt.TRANSIENT or kind in SESSIONS):
        listed = _listed(manager, connection, kind, first)
        return CapabilityList(
            len(listed) > min(count, _LIST_MAX),
            wire.TPM_CAP_HANDLES,
            tuple(listed[: min(count, _LIST_MAX)]),
        ).pack()
    response = manager.tpm.process(command)
    if asked != wire.TPM_CAP_TPM_PROPERTIES or response_code(response) != TpmRc.TPM_SUCCESS:
        return response
    found = CapabilityList.of(response, 2)
    if found is None:
        return response
    own = _properties(manager, connection)
    words = list(found.words)
    for at in range(0, len(words), 2):
        words[at + 1] = own.get(words[at], words[at + 1])
    return found._replace(words=tuple(words)).pack(2)


def _listed(manager: Manager, connection: Connection, kind: int, first: int) -> list[int]:
    if kind == TpmHt.TRANSIENT:
        return sorted(handle for handle in connection.objects if handle >= first)
    sessions = manager.sessions.of(connection.number)
    if kind == TpmHt.HMAC_SESSION:  # the loaded ones, whoever has swapped them out
        listed = [found.handle for found in sessions if found.place is not Place.SAVED]
    else:  # the saved ones, as libtpms lists them whatever their kind
        saved = [found for found in sessions if found.place is Place.SAVED]
        indices = sorted(found.index for found in [*saved, *manager.sessions.of(None)])
        listed = [TpmHt.HMAC_SESSION << 24 | index for index in indices]
    return [handle for handle in listed if index_of(handle) >= index_of(first)]


def _properties(manager: Manager, connection: Connection) -> dict[int, int]:
    sessions = manager.sessions.of(connection.number)
    loaded = sum(found.place is not Place.SAVED for found in sessions)
    most = min(manager.sessions_max, manager.limits.sessions)
    left = sessions_left(manager, connection)
    return {
        wire.TPM_PT_ACTIVE_SESSIONS_MAX: most,
        wire.TPM_PT_CONTEXT_GAP_MAX: 0xFFFF_FFFF,
        wire.TPM_PT_HR_LOADED: loaded,
        wire.TPM_PT_HR_LOADED_AVAIL: left,
        wire.TPM_PT_HR_ACTIVE: len(sessions),
        wire.TPM_PT_HR_ACTIVE_AVAIL: left,
        wire.TPM_PT_HR_TRANSIENT_AVAIL: manager.limits.objects - len(connection.objects),
    }
