"""A vTPM that rests, as plain values."""

from __future__ import annotations

from typing import NamedTuple


class SavedVtpm(NamedTuple):
    """A vTPM between two commands, as plain values; as secret as its state.

    It is resumed once, and the old one never goes on: two TPMs that resume from one volatile state
    give the same random numbers and make the same keys. It belongs to the permanent state that was
    stored when it was suspended, and to no other host or boot. What libtpms keeps of a TPM that is
    off, the tpmEstablished bit, is not in it.

    Attributes:
        whose: Whose the state is (`custody.Whose`).
        running: Whether the TPM is on.
        volatile: If so, all that it would lose without power.
        locality: Of the next command.
        buffer_size: Bytes, as a client set them.
        last_header: Of the last command, which decides on the shutdown in order.
        hashing: Whether the platform is in the middle of a measurement.
        failure_said: Whether the log has it that the TPM is in failure mode.
        profile: What a new TPM is yet to be made by.
        given: What another process has given for the next start: name and payload, in this order.
        audit: `audit.AuditWatch.session`.
    """

    whose: str
    running: bool
    volatile: bytes
    locality: int
    buffer_size: int
    last_header: bytes
    hashing: bool
    failure_said: bool
    profile: str | None
    given: tuple[tuple[str, bytes | None], ...]
    audit: int
