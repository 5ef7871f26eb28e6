"""What went wrong, in the words of a fleet."""

from __future__ import annotations

from vtpm_cuse import faults
from vtpm_cuse.errors import (
    FleetError,
    StateKeyRejected,
    StateLocked,
    StorageError,
    UsageError,
)


def translated(name: str, exc: Exception) -> FleetError:
    """The error of TPM *name* that tells of *exc*."""
    if isinstance(exc, FleetError):
        return exc
    said = faults.sentence(exc)
    match exc:
        case StateLocked():
            return FleetError("Busy", name, said)
        case StateKeyRejected():
            return FleetError("KeyRejected", name, said)
        case StorageError():
            return FleetError("StateDamaged", name, said)
        case UsageError():
            return FleetError("Busy", name, said)
    return FleetError("OverLimit", name, said)
