"""Answers that the manager gives in the TPM's place. Neither leaves this room."""

from __future__ import annotations

from typing import Final

LAYER: Final = 0x000B_0000
"""The response code layer of a resource manager; tpm2-tss reads codes of the TPM in it."""


class Refusal(Exception):
    """A connection's command is answered with ``code`` and not given to the TPM."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class Dead(Exception):
    """What a handle stood for has ended without its owner's doing."""
