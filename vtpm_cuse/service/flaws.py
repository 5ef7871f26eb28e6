"""Flaws of libtpms that are known, and whether the installed one has them.

Distributions mend old versions, so a version alone proves nothing: what can be tried is tried, on
a TPM in memory and in a process that may die of it; else the package's changelog is asked.
"""

from __future__ import annotations

import contextlib
import gzip
import os
import zlib
from typing import TYPE_CHECKING, Final, NamedTuple

from vtpm_cuse.wire import tpm2
from vtpm_cuse.wire.tpm import TpmCc, TpmRc, TpmSu, TpmTag, response_code, startup_command
from vtpm_cuse.wire.tpm2 import TpmAlg

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vtpm_cuse.engine.base import Engine
    from vtpm_cuse.service.doctor import Machine
    from vtpm_cuse.wire.marshal import TpmStruct

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


_SIGN_AND_DECRYPT: Final = (
    tpm2.TpmaObject.FIXED_TPM
    | tpm2.TpmaObject.FIXED_PARENT
    | tpm2.TpmaObject.SENSITIVE_DATA_ORIGIN
    | tpm2.TpmaObject.USER_WITH_AUTH
    | tpm2.TpmaObject.DECRYPT
    | tpm2.TpmaObject.SIGN
)
_BLOCK: Final = 16


def _answer(tpm: Engine, code: TpmCc, handle: int, parameters: TpmStruct) -> bytes:
    """To a command with one password session; TPMs ask for it again while they test themselves."""
    command = tpm2.command(code, (handle,), parameters, tpm2.PasswordSession())
    for _ in range(_TRIES):
        answer = tpm.process(command)
        if response_code(answer) != TpmRc.TPM_RC_RETRY:
            break
    return answer


def _key(tpm: Engine, public: tpm2.KeyedHashPublic | tpm2.SymCipherPublic) -> int:
    """The handle of a new primary key. Raises TpmError."""
    parameters = tpm2.CreatePrimaryParameters(tpm2.SensitiveCreate().pack(), public.pack())
    answer = _answer(tpm, TpmCc.TPM_CC_CreatePrimary, tpm2.TPM_RH_OWNER, parameters)
    return tpm2.read_response_untrusted("TPM2_CreatePrimary", answer, handles=1).handles[0]


def _signs_with_any_scheme(tpm: Engine) -> bool:
    """A key for HMAC, asked for a signature as of an RSA key."""
    public = tpm2.KeyedHashPublic(
        TpmAlg.TPM_ALG_KEYEDHASH,
        TpmAlg.TPM_ALG_SHA256,
        _SIGN_AND_DECRYPT,
        authPolicy=b"",
        scheme=TpmAlg.TPM_ALG_NULL,
        unique=b"",
    )
    ticket = tpm2.Ticket(TpmTag.TPM_ST_HASHCHECK, tpm2.TPM_RH_NULL, b"")
    parameters = tpm2.SignParameters(
        32 * b"\x11", TpmAlg.TPM_ALG_RSASSA, TpmAlg.TPM_ALG_SHA256, ticket
    )
    answer = _answer(tpm, TpmCc.TPM_CC_Sign, _key(tpm, public), parameters)
    return response_code(answer) == TpmRc.TPM_SUCCESS


def _gives_first_iv_back(tpm: Engine) -> bool:
    """AES in CFB mode, of one block: the vector to go on with is what came out."""
    public = tpm2.SymCipherPublic(
        TpmAlg.TPM_ALG_SYMCIPHER,
        TpmAlg.TPM_ALG_SHA256,
        _SIGN_AND_DECRYPT,
        authPolicy=b"",
        symmetric=tpm2.Symmetric(128),
        unique=b"",
    )
    before = _BLOCK * b"\x11"
    parameters = tpm2.EncryptDecryptParameters(
        _BLOCK * b"\x22", decrypt=0, mode=TpmAlg.TPM_ALG_CFB, ivIn=before
    )
    answer = _answer(tpm, TpmCc.TPM_CC_EncryptDecrypt2, _key(tpm, public), parameters)
    found = tpm2.read_response_untrusted("TPM2_EncryptDecrypt2", answer)
    return tpm2.EncryptDecryptResult.unpack_untrusted(found.parameters).ivOut == before


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
