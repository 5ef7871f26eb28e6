"""A TPM's resource manager and the thread that it is used on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vtpm_cuse.vtpm.managed import ManagedVtpm

if TYPE_CHECKING:
    from vtpm_cuse.serve.worker import Worker
    from vtpm_cuse.vtpm.ptm import PtmService


def manage(ptm: PtmService, worker: Worker) -> ManagedVtpm:
    """The clients of a vTPM; a borrowed one is looked after, and used, on the worker alone."""
    managed = ptm.managed = ManagedVtpm(ptm.vtpm)
    if ptm.vtpm.borrowed:
        worker.run_later(managed.begin)
        worker.rest_by(managed.rests)
    else:
        managed.begin()
    return managed
