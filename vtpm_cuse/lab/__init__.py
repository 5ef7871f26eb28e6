"""A private TPM for a program or a test; docs/lab.md has it task by task."""

from __future__ import annotations

from vtpm_cuse.errors import LabError
from vtpm_cuse.lab.snapshot import Snapshot
from vtpm_cuse.lab.tpm import Tpm

__all__ = ["LabError", "Snapshot", "Tpm"]
