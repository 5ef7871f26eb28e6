"""A TPM 2.0's shutdown in order: a reset without one raises its dictionary attack counter."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from vtpm_cuse.errors import VtpmError
from vtpm_cuse.wire.tpm import TPM_HEADER_SIZE, TpmRc, TpmSu, response_code, shutdown_command

if TYPE_CHECKING:
    from vtpm_cuse.engine.base import Engine

log = logging.getLogger(__name__)


def shut_down(engine: Engine) -> bytes:
    """TPM2_Shutdown; returns the header of the one that has succeeded, nothing for none."""
    for kind in (TpmSu.TPM_SU_STATE, TpmSu.TPM_SU_CLEAR):
        command = shutdown_command(kind)
        try:
            code = response_code(engine.process(command))
        except VtpmError as exc:
            log.warning("Could not shut the TPM down in order: %s", exc)
            break
        if code == TpmRc.TPM_SUCCESS:
            return command[:TPM_HEADER_SIZE]
        if code == TpmRc.TPM_RC_INITIALIZE:
            break
    return b""
