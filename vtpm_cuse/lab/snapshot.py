"""All of a TPM at one moment, as a value."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Self

from vtpm_cuse.errors import LabError, WireError

if TYPE_CHECKING:
    from pathlib import Path

_MAGIC: Final = b"vtpm-lab snapshot 1\n"
_BLOBS: Final = 3
_SIZE: Final = 4  # bytes of a length, big-endian


class Snapshot:
    """A TPM at one moment: what it keeps without power and, if it was on, all that it loses.

    Two TPMs that begin from the snapshot of one that was on give the same random numbers, and so
    make the same keys: nothing that they make is a secret. It holds the seeds of the TPM's keys, and
    is as secret as they are.

    Attributes:
        tpm2: Whether it is of a TPM 2.0, else of a TPM 1.2.
        permanent: What it keeps without power.
        volatile: All else, of one that was on; else empty.
        saved: What a TPM 1.2 kept by TPM_SaveState; else empty.

    Raises:
        LabError: There is no permanent state.
    """

    __slots__ = ("permanent", "saved", "tpm2", "volatile")

    def __init__(
        self, permanent: bytes, volatile: bytes = b"", saved: bytes = b"", *, tpm2: bool = True
    ) -> None:
        if not permanent:
            raise LabError("There is no TPM without a permanent state")
        self.permanent, self.volatile, self.saved, self.tpm2 = permanent, volatile, saved, tpm2

    def __repr__(self) -> str:
        """Nothing of what is in it."""
        version, size = "2.0" if self.tpm2 else "1.2", sum(map(len, self._blobs))
        return f"<Snapshot of a TPM {version}, {size} bytes>"

    @property
    def _blobs(self) -> tuple[bytes, bytes, bytes]:
        return self.permanent, self.volatile, self.saved

    def to_bytes(self) -> bytes:
        """It as bytes, for `from_bytes`."""
        parts = [_MAGIC, bytes([self.tpm2])]
        for blob in self._blobs:
            parts += [len(blob).to_bytes(_SIZE, "big"), blob]
        return b"".join(parts)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """What `to_bytes` gave. Raises WireError; whether a TPM takes it that TPM says."""
        at = len(_MAGIC) + 1
        if len(data) < at or not data.startswith(_MAGIC) or data[at - 1] > 1:
            raise WireError("Snapshot", at, len(data))
        blobs = []
        for _ in range(_BLOBS):
            begin = at + _SIZE
            at = begin + int.from_bytes(data[at:begin], "big")
            if begin > len(data) or at > len(data):
                raise WireError("Snapshot", max(begin, at), len(data))
            blobs.append(data[begin:at])
        if at != len(data):
            raise WireError("Snapshot", at, len(data))
        permanent, volatile, saved = blobs
        if not permanent:
            raise WireError("Snapshot", len(data) + 1, len(data))
        return cls(permanent, volatile, saved, tpm2=bool(data[len(_MAGIC)]))

    def save(self, path: str | Path) -> None:
        """Writes it to a file that nobody but its owner can read, whole or not at all.

        Raises:
            OSError: It cannot be written; a file that was there is as it was.
        """
        import tempfile

        folder = os.path.dirname(os.path.abspath(path))
        fd, aside = tempfile.mkstemp(prefix=".snapshot-", dir=folder)
        try:
            with open(fd, "wb") as file:
                file.write(self.to_bytes())
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(aside)
            raise

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Of a file that `save` wrote. Raises OSError; WireError where it is another one."""
        with open(path, "rb") as file:
            return cls.from_bytes(file.read())
