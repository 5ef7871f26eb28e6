"""A TPM's resource manager and the thread that it is used on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vtpm_cuse.vtpm.managed import ManagedVtpm

if TYPE_CHECKING:
    from vtpm_cuse.serve.worker import Worker
    from vtpm_cuse.vtpm.ptm import PtmService


def manage(ptm: PtmService) -> ManagedVtpm:
    """The clients of a vTPM; `begin`, or their `resume`, is to come first."""
    managed = ptm.managed = ManagedVtpm(ptm.vtpm)
    return managed


def begin(managed: ManagedVtpm, worker: Worker, *, borrowed: bool) -> None:
    """Looks after them; those of a *borrowed* TPM, which is used on the worker alone, are there."""
    if borrowed:
        worker.run_later(managed.begin)
        worker.rest_by(managed.rests)
    else:
        managed.begin()
