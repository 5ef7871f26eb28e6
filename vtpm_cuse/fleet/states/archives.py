"""A TPM outside of a manager, as `wire.manager.Archive`: bytes of a state in, text out, and back."""

from __future__ import annotations

import base64
import binascii
import uuid
from typing import Final

from vtpm_cuse.errors import FleetError
from vtpm_cuse.fleet.base import Bundle, Spec
from vtpm_cuse.wire.manager import Archive

FORMAT: Final = "vtpm-cuse TPM"
VERSION: Final = 1
STATE_MAX: Final = 320 << 10
"""Bytes, twice what a full TPM has: so a reply and a call have room for an archive."""


def packed(bundle: Bundle) -> Archive:
    """As it goes to who has asked for it. Raises FleetError where no manager would take it."""
    spec = bundle.spec
    if len(bundle.state) > STATE_MAX:
        raise FleetError("OverLimit", spec.name, f"its state has more than {STATE_MAX} bytes")
    return Archive(
        *(FORMAT, VERSION, bundle.id, spec.name, spec.manufactured, dict(spec.labels)),
        base64.b64encode(bundle.state).decode(),
        spec.profile,
    )


def unpacked_untrusted(name: str, owner: int, archive: Archive) -> Bundle:
    """What is in it, to be called *name*; the state is whatever it is. Raises FleetError."""
    if (archive.format, archive.version) != (FORMAT, VERSION):
        raise FleetError("StateDamaged", name, f"this is no archive of version {VERSION}")
    try:
        number = str(uuid.UUID(archive.id))
        state = base64.b64decode(archive.permall, validate=True)
    except (ValueError, binascii.Error) as exc:
        raise FleetError("StateDamaged", name, "id or state in the archive is none") from exc
    if number != archive.id:
        raise FleetError("StateDamaged", name, "the id in the archive is not written as ids are")
    if len(state) > STATE_MAX:
        raise FleetError("OverLimit", name, f"its state has more than {STATE_MAX} bytes")
    labels = tuple(archive.labels.items())
    return Bundle(number, Spec(name, owner, archive.profile, archive.manufactured, labels), state)
