"""CA keys in a TPM 2.0, in a file that this TPM alone can load or persistent in it.

What is loaded to sign is flushed before the connection to the TPM ends. Sources: TCG TPM 2.0
Library Part 3 (TPM2_CreatePrimary, Create, Load, ReadPublic, Sign, FlushContext) and Part 2
(TPMA_OBJECT); ASN.1 Specification for TPM 2.0 Key Files, 3.1 (what a parent is).
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Final, NamedTuple

from vtpm_cuse.ca.keyfiles import TpmKeyFile
from vtpm_cuse.ca.keys import (
    CURVES,
    HASHES,
    PublicKey,
    ecdsa_signature,
    own_digest,
    signature_algorithm,
)
from vtpm_cuse.client.commands import address_of, connected
from vtpm_cuse.errors import CertificateError, FrontendError, TpmError, VtpmError, WireError
from vtpm_cuse.wire import tpm2
from vtpm_cuse.wire.rc import explain
from vtpm_cuse.wire.tpm import TpmCc, TpmRc, TpmTag
from vtpm_cuse.wire.tpm2 import EccPublic, RsaPublic, Scheme, Symmetric, TpmAlg, TpmEccCurve

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vtpm_cuse.client.commands import TpmConnection
    from vtpm_cuse.wire.marshal import TpmStruct
    from vtpm_cuse.wire.tpm2 import Public, Response

USUAL_TPM: Final = "/dev/tpmrm0"
"""The kernel's resource manager, where it has a TPM."""

_HANDLE: Final = re.compile(r"handle:(0[xX][0-9a-fA-F]{1,8}|[0-9]{1,10})")
_PERSISTENT: Final = range(0x81000000, 0x82000000)
_HIERARCHIES: Final = frozenset(
    {tpm2.TPM_RH_OWNER, tpm2.TPM_RH_NULL, tpm2.TPM_RH_ENDORSEMENT, tpm2.TPM_RH_PLATFORM}
)
_PASSWORD_MAX: Final = 32
"""Bytes: a password has no more than the name's digest."""
_SECONDS: Final = 120.0
"""For one command: chips take long over a key."""
_TRIES: Final = 5
"""A TPM may answer TPM_RC_RETRY before the first use of what it protects against guesses."""

_Attributes = tpm2.TpmaObject
_FIXED: Final = _Attributes.FIXED_TPM | _Attributes.FIXED_PARENT | _Attributes.SENSITIVE_DATA_ORIGIN
_USED: Final = _FIXED | _Attributes.USER_WITH_AUTH
_STORAGE: Final = _USED | _Attributes.NO_DA | _Attributes.RESTRICTED | _Attributes.DECRYPT
_SHA256: Final = TpmAlg.TPM_ALG_SHA256
_ECC_PARENT: Final = EccPublic(
    type=TpmAlg.TPM_ALG_ECC,
    nameAlg=_SHA256,
    objectAttributes=_STORAGE,
    authPolicy=b"",
    symmetric=Symmetric(128),
    scheme=None,
    curveID=TpmEccCurve.TPM_ECC_NIST_P256,
    kdf=TpmAlg.TPM_ALG_NULL,
    x=b"",
    y=b"",
)
_RSA_PARENT: Final = RsaPublic(
    type=TpmAlg.TPM_ALG_RSA,
    nameAlg=_SHA256,
    objectAttributes=_STORAGE,
    authPolicy=b"",
    symmetric=Symmetric(128),
    scheme=None,
    keyBits=2048,
    exponent=0,
    unique=b"",
)
_CURVES: Final[dict[int, str]] = {
    TpmEccCurve.TPM_ECC_NIST_P256: "secp256r1",
    TpmEccCurve.TPM_ECC_NIST_P384: "secp384r1",
    TpmEccCurve.TPM_ECC_NIST_P521: "secp521r1",
}
_ALGORITHM_OF: Final = {name: TpmAlg[f"TPM_ALG_{name.upper()}"] for name in HASHES}
_HASH_OF: Final = {algorithm: name for name, algorithm in _ALGORITHM_OF.items()}

_AUTH_CODES: Final = frozenset({0x8E, 0xA2})  # TPM_RC_AUTH_FAIL, TPM_RC_BAD_AUTH
_FORMAT_ONE: Final = 0xBF  # what of a code of format one says what it is, and no number
_ABOUT_PARAMETERS: Final = 0xC0


class _Kind(NamedTuple):
    """What a new key is: RSA of so many bits or, with 0, on a curve; and the hash of its scheme."""

    bits: int
    curve: int
    hash: TpmAlg


_P256: Final = _Kind(0, TpmEccCurve.TPM_ECC_NIST_P256, _SHA256)
_P384: Final = _Kind(0, TpmEccCurve.TPM_ECC_NIST_P384, TpmAlg.TPM_ALG_SHA384)
_KINDS: Final = {
    "rsa2048": _Kind(2048, 0, _SHA256),
    "rsa3072": _Kind(3072, 0, TpmAlg.TPM_ALG_SHA384),
    **dict.fromkeys(("ecc256", "secp256r1"), _P256),
    **dict.fromkeys(("ecc384", "secp384r1"), _P384),
}
ALGORITHMS: Final = tuple(_KINDS)
"""What a new key may be."""


@dataclass(frozen=True, slots=True)
class KeyTpm:
    """A TPM that has a CA's key.

    Attributes:
        named: Path of a device or Unix socket, or HOST:PORT; empty where nobody has named it.
        parent_password: Of the key's parent, or of the hierarchy of which that is made.
    """

    named: str = ""
    parent_password: bytes = field(default=b"", repr=False)

    @property
    def where(self) -> str:
        """As `named`, or the usual one."""
        return self.named or USUAL_TPM


def is_handle(key: str) -> bool:
    """Whether *key* names one that is persistent, as ``handle:0x81000010``."""
    return key.startswith("handle:")


def read_handle(text: str) -> int:
    """The number of a persistent object, hex behind 0x or decimal. Raises ValueError."""
    found = _HANDLE.fullmatch(f"handle:{text}")
    if found is None or (handle := int(found[1], 0)) not in _PERSISTENT:
        raise ValueError(f"'{text}' is no persistent handle, as 0x81000010")
    return handle


class TpmKey:
    """A key that signs in its TPM: a `Signer` of `ca.certificates`. See `from_pem` and `at`."""

    def __init__(
        self, name: str, tpm: KeyTpm, password: bytes, public: Public, where: TpmKeyFile | int
    ) -> None:
        self._name, self._tpm, self._password = name, tpm, password
        self._public, self._where = public, where
        self.public = _checked(name, public)

    @classmethod
    def from_pem(cls, path: str, pem: bytes, password: bytes | None, tpm: KeyTpm) -> TpmKey:
        """That of a key file; asks no TPM yet.

        Args:
            path: Of the file, for messages.
            pem: What is in it.
            password: Of the key. Whether it has one the file says, too, but not always truly.
            tpm: Where it can be loaded.

        Raises:
            CertificateError: It is damaged, or none that signs certificates.
        """
        try:
            file = TpmKeyFile.from_pem(pem)
        except ValueError as exc:
            raise _error(path, str(exc)) from exc
        if file.parent not in _PERSISTENT and file.parent not in _HIERARCHIES:
            raise _error(
                path, f"its parent 0x{file.parent:x} is neither persistent nor a hierarchy"
            )
        return cls(path, tpm, password or b"", _read_public(path, file.public), file)

    @classmethod
    def at(cls, key: str, password: bytes | None, tpm: KeyTpm) -> TpmKey:
        """The one that *key* names, see `is_handle`; its TPM says what it is.

        Raises:
            CertificateError: There is no such TPM, or no such key in it that signs certificates.
        """
        try:
            handle = read_handle(key.removeprefix("handle:"))
        except ValueError as exc:
            raise _error(key, str(exc)) from exc
        with _asking(key, tpm) as commands:
            answer = commands.execute(TpmCc.TPM_CC_ReadPublic, (handle,)).parameters
            read = tpm2.ReadPublicResult.unpack_untrusted(answer)
        return cls(key, tpm, password or b"", _read_public(key, read.outPublic), handle)

    def is_a(self, algorithm: str) -> bool:
        """Whether it is what `new_key` makes for one of `ALGORITHMS`."""
        attributes, unique = self._public.objectAttributes, {"unique", "x", "y"}
        made = replace(_template(_KINDS[algorithm], guarded=True), objectAttributes=attributes)
        return all(
            getattr(made, part.name) == getattr(self._public, part.name, None)
            for part in fields(made)
            if part.name not in unique
        )

    def digest(self, usual: str) -> str:
        """That of the key's scheme, if it has one."""
        if (scheme := self._public.scheme) is not None:
            return _HASH_OF[TpmAlg(scheme.hash)]
        if usual != "sha256":
            return usual
        if isinstance(self._public, RsaPublic):
            return own_digest(self._public.keyBits, rsa_key=True)
        return own_digest(CURVES[_CURVES[self._public.curveID]]().key_size, rsa_key=False)

    def algorithm(self, digest: str) -> bytes:
        """AlgorithmIdentifier of its signatures."""
        return signature_algorithm(digest, rsa_key=isinstance(self._public, RsaPublic))

    def sign(self, data: bytes, digest: str) -> bytes:
        """PKCS #1 v1.5, or ECDSA as DER. Raises CertificateError."""
        hashed = hashlib.new(digest, data, usedforsecurity=False).digest()
        with _asking(self._name, self._tpm) as commands, self._loaded(commands) as handle:
            parameters = tpm2.SignParameters(
                hashed,
                _scheme_of(self._public),
                _ALGORITHM_OF[digest],
                tpm2.Ticket(TpmTag.TPM_ST_HASHCHECK, tpm2.TPM_RH_NULL, b""),
            )
            code = TpmCc.TPM_CC_Sign
            answer = commands.execute(code, (handle,), parameters, self._password).parameters
            if isinstance(self._public, RsaPublic):
                return tpm2.RsaSignature.unpack_untrusted(answer).sig
            made = tpm2.EccSignature.unpack_untrusted(answer)
            numbers = made.signatureR, made.signatureS
            return ecdsa_signature(*(int.from_bytes(number, "big") for number in numbers))

    @contextlib.contextmanager
    def _loaded(self, commands: _Commands) -> Iterator[int]:
        if isinstance(self._where, int):
            yield self._where
            return
        file = self._where
        load = tpm2.LoadParameters(file.private, file.public)
        with (
            commands.parent(file, self._tpm.parent_password) as (parent, password),
            commands.loaded(TpmCc.TPM_CC_Load, parent, load, password) as handle,
        ):
            yield handle


def new_key(
    tpm: KeyTpm, algorithm: str, password: bytes | None, parent: int = tpm2.TPM_RH_OWNER
) -> TpmKeyFile:
    """Has a TPM make a key that signs certificates.

    Args:
        tpm: Which.
        algorithm: One of `ALGORITHMS`.
        password: Of the key. With one, the TPM protects it against guesses.
        parent: See `TpmKeyFile`.

    Raises:
        CertificateError: The TPM cannot be reached, or refuses.
    """
    name = f"{algorithm} that is to be made"
    if password is not None and len(password) > _PASSWORD_MAX:
        raise _error(name, f"its password has more than {_PASSWORD_MAX} bytes")
    template = _template(_KINDS[algorithm], guarded=bool(password))
    sensitive = tpm2.SensitiveCreate(password or b"").pack()
    parameters = tpm2.CreatePrimaryParameters(sensitive, template.pack())
    with (
        _asking(name, tpm) as commands,
        commands.parent(TpmKeyFile(b"", b"", parent), tpm.parent_password) as (handle, above),
    ):
        answer = commands.execute(TpmCc.TPM_CC_Create, (handle,), parameters, above).parameters
        made = tpm2.CreateResult.unpack_untrusted(answer)
    return TpmKeyFile(made.outPublic, made.outPrivate, parent, bool(password))


def check_tpm(tpm: KeyTpm) -> None:
    """Sees whether a TPM 2.0 is there that works. Raises CertificateError."""
    parameters = tpm2.GetCapabilityParameters(
        tpm2.TPM_CAP_TPM_PROPERTIES, tpm2.TPM_PT_MANUFACTURER, 1
    )
    with _asking("CA key", tpm) as commands:
        commands.execute(TpmCc.TPM_CC_GetCapability, (), parameters)


def _template(kind: _Kind, *, guarded: bool) -> Public:
    attributes = _USED | _Attributes.SIGN | (0 if guarded else _Attributes.NO_DA)
    if kind.bits:
        scheme = Scheme(TpmAlg.TPM_ALG_RSASSA, kind.hash)
        alg = TpmAlg.TPM_ALG_RSA
        return RsaPublic(alg, _SHA256, attributes, b"", None, scheme, kind.bits, 0, b"")
    scheme = Scheme(TpmAlg.TPM_ALG_ECDSA, kind.hash)
    null, alg = TpmAlg.TPM_ALG_NULL, TpmAlg.TPM_ALG_ECC
    return EccPublic(alg, _SHA256, attributes, b"", None, scheme, kind.curve, null, b"", b"")


def _scheme_of(public: Public) -> TpmAlg:
    """What certificates are signed with."""
    rsa_key = isinstance(public, RsaPublic)
    return TpmAlg.TPM_ALG_RSASSA if rsa_key else TpmAlg.TPM_ALG_ECDSA


def _read_public(name: str, data: bytes) -> Public:
    try:
        return tpm2.read_public_untrusted(data)
    except WireError as exc:
        raise _error(name, f"it is neither an RSA nor an elliptic curve key: {exc}") from exc


def _checked(name: str, public: Public) -> PublicKey:
    """The public half of a key that may sign certificates. Raises CertificateError."""
    attributes = public.objectAttributes
    if not attributes & _Attributes.SIGN:
        raise _error(name, "it may not sign")
    if attributes & _Attributes.RESTRICTED:
        raise _error(name, "it signs nothing but what its TPM says (restricted)")
    if not attributes & _Attributes.USER_WITH_AUTH:
        raise _error(name, "it has a policy, and only one with a password or none can be used")
    scheme = public.scheme
    if scheme is not None and (
        scheme.algorithm != _scheme_of(public) or scheme.hash not in _HASH_OF
    ):
        raise _error(name, "its scheme is none for certificates: RSASSA or ECDSA, with SHA-1 or -2")
    try:
        if isinstance(public, RsaPublic):
            return PublicKey.from_rsa(
                int.from_bytes(public.unique, "big"), public.exponent or 65537
            )
        x, y = int.from_bytes(public.x, "big"), int.from_bytes(public.y, "big")
        return PublicKey.from_point(_CURVES.get(public.curveID, f"0x{public.curveID:x}"), x, y)
    except ValueError as exc:
        raise _error(name, f"its public half is none: {exc}") from exc


class _Commands:
    """The commands for such keys, over one connection."""

    def __init__(self, connection: TpmConnection) -> None:
        self._connection = connection

    def execute(
        self,
        code: TpmCc,
        handles: tuple[int, ...],
        parameters: TpmStruct | None = None,
        password: bytes | None = None,
        *,
        returned: int = 0,
    ) -> Response:
        """One command, with a *password* for its authorisation if there is one.

        Raises TpmError, WireError, FrontendError.
        """
        session = None if password is None else tpm2.PasswordSession(hmac=password)
        command = tpm2.command(code, handles, parameters, session)
        name = f"TPM2_{code.name.removeprefix('TPM_CC_')}"
        for left in reversed(range(_TRIES)):
            try:
                return tpm2.read_response_untrusted(
                    name, self._connection.ask(command), handles=returned
                )
            except TpmError as exc:
                if exc.code != TpmRc.TPM_RC_RETRY or not left:
                    raise
        raise AssertionError("a last try ends")

    @contextlib.contextmanager
    def loaded(
        self, code: TpmCc, above: int, parameters: TpmStruct, password: bytes
    ) -> Iterator[int]:
        """What a command loads; flushed in the end."""
        try:
            (handle,) = self.execute(code, (above,), parameters, password, returned=1).handles
        except VtpmError:
            raise
        except BaseException:  # an interruption, during which it is loaded all the same
            with contextlib.suppress(VtpmError):
                late = self._connection.finish()
                self._flush(tpm2.read_response_untrusted("", late, handles=1).handles[0])
            raise
        try:
            yield handle
        except FrontendError:  # nothing more can be sent
            raise
        except BaseException:
            with contextlib.suppress(VtpmError):
                self._connection.finish()
                self._flush(handle)
            raise
        self._flush(handle)

    def _flush(self, handle: int) -> None:
        self.execute(TpmCc.TPM_CC_FlushContext, (handle,))

    @contextlib.contextmanager
    def parent(self, key: TpmKeyFile, password: bytes) -> Iterator[tuple[int, bytes]]:
        """A key's parent and its password; *password* is that, or of the hierarchy."""
        if key.parent not in _HIERARCHIES:
            yield key.parent, password
            return
        template = _RSA_PARENT if key.rsa_parent else _ECC_PARENT
        parameters = tpm2.CreatePrimaryParameters(tpm2.SensitiveCreate().pack(), template.pack())
        with self.loaded(TpmCc.TPM_CC_CreatePrimary, key.parent, parameters, password) as handle:
            yield handle, b""


@contextlib.contextmanager
def _asking(name: str, tpm: KeyTpm) -> Iterator[_Commands]:
    """A connection to the TPM; all that goes wrong is a CertificateError about *name*."""
    try:
        with connected(address_of(tpm.where), _SECONDS) as connection:
            yield _Commands(connection)
    except FrontendError as exc:
        raise _error(name, f"its TPM at {tpm.where}: {exc}") from exc
    except WireError as exc:
        raise _error(name, f"its TPM at {tpm.where} answers nonsense: {exc}") from exc
    except TpmError as exc:
        raise _error(name, _refusal(exc)) from exc


def _refusal(exc: TpmError) -> str:
    """What a response code means for who has the key and a password."""
    found = explain(exc.code)
    said = f"{exc.command}: {found.name or hex(exc.code)}"
    whose = "its password" if exc.command == "TPM2_Sign" else "the password of its parent"
    if exc.code & _FORMAT_ONE in _AUTH_CODES:
        return f"{whose} is missing or wrong ({said})"
    if exc.command == "TPM2_Load" and exc.code & _ABOUT_PARAMETERS == _ABOUT_PARAMETERS:
        return f"it is damaged, or of another TPM or another parent there ({said})"
    return f"{said}: {found.words}"


def _error(name: str, reason: str) -> CertificateError:
    return CertificateError(f"Could not use the TPM key {name}", reason)
