"""A private TPM for a program or a test; docs/lab.md has it task by task.

with Tpm() as tpm:
    subprocess.run(["tpm2_getrandom", "8"], env={**os.environ, **tpm.env})
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vtpm_cuse.errors import LabError as LabError
    from vtpm_cuse.errors import TpmError as TpmError
    from vtpm_cuse.lab.record import Exchange as Exchange
    from vtpm_cuse.lab.snapshot import Snapshot as Snapshot
    from vtpm_cuse.lab.tpm import Tpm as Tpm

__all__ = ["Exchange", "LabError", "Snapshot", "Tpm", "TpmError"]

_PLACES = {
    "Exchange": "vtpm_cuse.lab.record",
    "LabError": "vtpm_cuse.errors",
    "Snapshot": "vtpm_cuse.lab.snapshot",
    "Tpm": "vtpm_cuse.lab.tpm",
    "TpmError": "vtpm_cuse.errors",
}


def __getattr__(name: str) -> object:
    """The public names; imported at the first use, for every run of pytest imports this package."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    found: object = getattr(import_module(_PLACES[name]), name)
    globals()[name] = found
    return found
