"""Flaws of libtpms that are known, and whether the installed one has them.

Distributions mend old versions, so a version alone proves nothing: what can be tried is tried, on
a TPM in memory and in a process that may die of it; else the package's changelog is asked.
"""

from __future__ import annotations

import contextlib
import gzip
import os
import struct
import zlib
from typing import TYPE_CHECKING, Final, NamedTuple

from vtpm_cuse.wire.tpm import TpmSu, response_code, startup_command

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vtpm_cuse.engine.base import Engine
    from vtpm_cuse.service.doctor import Machine

Version = tuple[int, int, int]

_CHANGELOG: Final = "/usr/share/doc/libtpms0/changelog.Debian.gz"
_HAS_IT: Final = 1
_MENDED: Final = 0
_NOT_TRIED: Final = 2
_TRIES: Final = 100


class Flaw(NamedTuple):
    """One flaw.

    Attributes:
        names: How it is known.
        harm: What a client, or who else may use it, can do.
        since: The first version that has it.
        mended: The first version without it, of each series that got one.
        tried: Whether a TPM has it.
    """

    names: tuple[str, ...]
    harm: str
    since: Version
    mended: tuple[Version, ...]
    tried: Callable[[Engine], bool] | None = None

    def concerns(self, version: Version) -> bool:
        """Whether that version has it, as its authors published it."""
        last = max(self.mended)
        mended = next((fix for fix in self.mended if fix[:2] == version[:2]), last)
        return self.since <= version < mended


class Verdict(NamedTuple):
    """A flaw that concerns the installed version.

    Attributes:
        there: None if it cannot be told.
        why: What says so.
    """

    flaw: Flaw
    there: bool | None
    why: str


def verdicts(machine: Machine, version: Version) -> Iterator[Verdict]:
    """All flaws of that version, and whether the installed library has them."""
    for flaw in FLAWS:
        if not flaw.concerns(version):
            continue
        outcome = _try(flaw)
        if outcome is not None:
            yield Verdict(flaw, outcome, "it was tried")
        elif all(name in _changelog(machine, version) for name in flaw.names):
            yield Verdict(flaw, False, "its package's changelog")
        else:
            yield Verdict(flaw, None, "its version; your distribution may have mended it")


def _changelog(machine: Machine, version: Version) -> str:
    """That of Debian's package and its like, if it is of this version."""
    try:
        text = gzip.decompress(machine.file(_CHANGELOG).read_bytes()).decode(errors="replace")
    except (OSError, EOFError, ValueError, zlib.error):
        return ""
    number = ".".join(map(str, version))
    return text if text.partition(")")[0].startswith(f"libtpms ({number}") else ""


# -- trying -------------------------------------------------------------------------------


def _try(flaw: Flaw) -> bool | None:
    """In a child without a word and without a core dump; None if it comes to nothing."""
    if flaw.tried is None:
        return None
    try:
        child = os.fork()
    except OSError:  # no process more for this user
        return None
    if child == 0:
        status = _NOT_TRIED
        with contextlib.suppress(BaseException):
            status = _HAS_IT if flaw.tried(_tpm()) else _MENDED
        os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status != _MENDED if status < 0 or status in {_MENDED, _HAS_IT} else None


def _tpm() -> Engine:
    from vtpm_cuse.service.compose import bare_engine
    from vtpm_cuse.service.confine import secrecy

    secrecy.hide_process()
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(nothing, descriptor)
    tpm = bare_engine(tpm2=True)
    tpm.start()
    tpm.process(startup_command(TpmSu.TPM_SU_CLEAR, tpm2=True))
    return tpm


_PASSWORD: Final = bytes.fromhex("00000009 40000009 0000 00 0000")
_RC_RETRY: Final = 0x922
_SIGN_AND_DECRYPT: Final = 0x60072  # and userWithAuth, sensitiveDataOrigin, fixedParent, fixedTPM


def _answer(tpm: Engine, code: int, body: bytes) -> bytes:
    """To a command with one password session; TPMs ask for it again while they test themselves."""
    command = struct.pack(">HII", 0x8002, 10 + len(body), code) + body
    for _ in range(_TRIES):
        answer = tpm.process(command)
        if response_code(answer) != _RC_RETRY:
            break
    return answer


def _key(tpm: Engine, kind: int, details: str) -> bytes:
    """The handle of a new primary key that signs and decrypts. Raises ValueError."""
    public = struct.pack(">HHIH", kind, 0x000B, _SIGN_AND_DECRYPT, 0) + bytes.fromhex(details)
    body = bytes.fromhex("40000001") + _PASSWORD + bytes.fromhex("0004 0000 0000")
    body += struct.pack(">H", len(public)) + public + bytes.fromhex("0000 00000000")
    answer = _answer(tpm, 0x131, body)
    if response_code(answer):
        raise ValueError
    return answer[10:14]


def _signs_with_any_scheme(tpm: Engine) -> bool:
    """A key for HMAC, asked for a signature as of an RSA key."""
    key = _key(tpm, 0x0008, "0010 0000")
    digest, scheme, ticket = "0020" + 32 * "11", "0014 000b", "8024 40000007 0000"
    body = key + _PASSWORD + bytes.fromhex(digest + scheme + ticket)
    return response_code(_answer(tpm, 0x15D, body)) == 0


def _gives_first_iv_back(tpm: Engine) -> bool:
    """AES in CFB mode, of one block: the vector to go on with is what came out."""
    key = _key(tpm, 0x0025, "0006 0080 0043 0000")
    before = 16 * b"\x11"
    text, mode = bytes.fromhex("0010" + 16 * "22" + "00"), bytes.fromhex("0043 0010")
    answer = _answer(tpm, 0x193, key + _PASSWORD + text + mode + before)
    if response_code(answer):
        raise ValueError
    return answer[34:50] == before


FLAWS: Final = (
    Flaw(
        ("CVE-2026-21444",),
        "AES with the vector that the TPM returned is weaker than it should be",
        (0, 10, 0),
        ((0, 10, 2),),
        _gives_first_iv_back,
    ),
    Flaw(
        ("CVE-2025-49133",),
        "a client can end the TPM's process",
        (0, 0, 0),
        ((0, 7, 12), (0, 8, 10), (0, 9, 7), (0, 10, 1)),
        _signs_with_any_scheme,
    ),
    Flaw(
        ("CVE-2023-1017", "CVE-2023-1018"),
        "a client can read and write two bytes of the TPM's memory that are not its own",
        (0, 0, 0),
        ((0, 7, 10), (0, 8, 9), (0, 9, 6)),
    ),
    Flaw(
        ("CVE-2021-3746",),
        "a client can end the TPM's process",
        (0, 0, 0),
        ((0, 9, 0),),
    ),
)
