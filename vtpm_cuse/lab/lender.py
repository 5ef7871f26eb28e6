"""TPMs that one test after the other has to itself, each as new."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Literal, NamedTuple

from vtpm_cuse.errors import LabError
from vtpm_cuse.lab.tpm import Tpm

if TYPE_CHECKING:
    from vtpm_cuse.lab.snapshot import Snapshot


class Kind(NamedTuple):
    """What a TPM is to be like; see `Tpm`."""

    version: Literal["2.0", "1.2"] = "2.0"
    manufactured: bool = False


class Lender:
    """Has one TPM of a kind, and puts it back before it is lent again.

    Args:
        profile: Of TPMs 2.0.
        trace: How many of the last commands they keep.
    """

    def __init__(self, *, profile: str | None = None, trace: int = 0) -> None:
        self._profile, self._trace = profile, trace
        self._kept: dict[Kind, tuple[Tpm, Snapshot]] = {}

    def lend(self, kind: Kind) -> Tpm:
        """As it was when it was made, until the next call for one of that kind. Raises LabError.

        One that a test has broken, or on which something of an earlier test still has a connection,
        is replaced.
        """
        if kind in self._kept:
            tpm, pristine = self._kept[kind]
            with suppress(LabError):
                tpm.rewind(pristine)
                if not tpm.clients:
                    return tpm
            # If its descriptors were closed so were the others', and what is opened next takes their
            # numbers, which their ends would close.
            with suppress(LabError):
                self.close()
        profile = self._profile if kind.version == "2.0" else None
        tpm = Tpm(**kind._asdict(), profile=profile, faults=True, trace=self._trace).start()
        try:
            pristine = tpm.snapshot()
            tpm.rewind(pristine)  # so that the first test finds what all others do
        except BaseException:
            tpm.close()
            raise
        self._kept[kind] = tpm, pristine
        return tpm

    def close(self) -> None:
        """Ends all. Raises LabError: one did not end in order; it has ended all the same."""
        with ExitStack() as all_of_them:
            while self._kept:
                _, (tpm, _) = self._kept.popitem()
                all_of_them.callback(tpm.close)
