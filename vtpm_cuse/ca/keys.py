"""The keys in certificates, and the private keys that sign them, with `cryptography`."""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol, TypeGuard, cast

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa

from vtpm_cuse.ca import der
from vtpm_cuse.errors import CertificateError, VtpmError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Self

CURVES: Final[dict[str, type[ec.EllipticCurve]]] = {
    "secp256r1": ec.SECP256R1,
    "secp384r1": ec.SECP384R1,
    "secp521r1": ec.SECP521R1,
}

_SAID_MAX: Final = 160  # of an error; OpenSSL's can be lists
_RSA_WITH_SHA256: Final = 2048  # bits
_RSA_ENCRYPTION: Final = "1.2.840.113549.1.1.1"
HASHES: Final[dict[str, type[hashes.HashAlgorithm]]] = {
    "sha1": hashes.SHA1,
    "sha256": hashes.SHA256,
    "sha384": hashes.SHA384,
    "sha512": hashes.SHA512,
}
_WITH_RSA: Final = {
    "sha1": "1.2.840.113549.1.1.5",
    "sha256": "1.2.840.113549.1.1.11",
    "sha384": "1.2.840.113549.1.1.12",
    "sha512": "1.2.840.113549.1.1.13",
}
_WITH_ECDSA: Final = {
    "sha1": "1.2.840.10045.4.1",
    "sha256": "1.2.840.10045.4.3.2",
    "sha384": "1.2.840.10045.4.3.3",
    "sha512": "1.2.840.10045.4.3.4",
}
_RAW: Final = {
    "ml-kem-512": ("2.16.840.1.101.3.4.4.1", 800),
    "ml-kem-768": ("2.16.840.1.101.3.4.4.2", 1184),
    "ml-kem-1024": ("2.16.840.1.101.3.4.4.3", 1568),
    "ml-dsa-44": ("2.16.840.1.101.3.4.3.17", 1312),
    "ml-dsa-65": ("2.16.840.1.101.3.4.3.18", 1952),
    "ml-dsa-87": ("2.16.840.1.101.3.4.3.19", 2592),
}
RAW_KINDS: Final = tuple(_RAW)
"""Kinds of keys that are no more than so many bytes (FIPS 203, FIPS 204)."""

# Of keys that sign as they are, Ed25519, Ed448 (RFC 8410) and ML-DSA (RFC 9881), the identifier is
# that of their signatures, too; neither has parameters.
_HASHLESS: Final = frozenset(
    der.sequence(der.oid(identifier))
    for identifier in (
        *("1.3.101.112", "1.3.101.113"),
        *(identifier for kind, (identifier, _) in _RAW.items() if kind.startswith("ml-dsa")),
    )
)


class HashlessKey(Protocol):
    """A private key of `cryptography` that signs as it is; older versions know but some."""

    def sign(self, data: bytes, /) -> bytes:
        """The signature."""

    def public_key(self) -> HashlessPublicKey:
        """Its public half."""

    def private_bytes(
        self,
        encoding: serialization.Encoding,
        format: serialization.PrivateFormat,  # noqa: A002 - the library's name for it
        encryption_algorithm: serialization.KeySerializationEncryption,
        /,
    ) -> bytes:
        """The key in that form."""


class HashlessPublicKey(Protocol):
    """The public half of such a key."""

    def verify(self, signature: bytes, data: bytes, /) -> None:
        """Raises InvalidSignature."""

    def public_bytes(
        self,
        encoding: serialization.Encoding,
        format: serialization.PublicFormat,  # noqa: A002 - the library's name for it
        /,
    ) -> bytes:
        """The key in that form."""


def is_hashless(key: object) -> TypeGuard[HashlessPublicKey]:
    """Whether it is the public half of a key that signs as it is. Raises for what is no key."""
    return _algorithm_of(_spki(cast("HashlessPublicKey", key))) in _HASHLESS


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Whatever `cryptography` raises for keys and certificates it does not like: ValueError.

    It has no list of that: kinds it does not know and damage have classes of their own here and
    there, some of them no ValueError, and some come late, with the first use.
    """
    try:
        yield
    except VtpmError:
        raise
    except Exception as exc:
        said = " ".join(str(exc).split())
        raise ValueError(said[:_SAID_MAX] or type(exc).__name__) from exc


@dataclass(frozen=True, slots=True)
class PublicKey:
    """The key that a certificate is for.

    Attributes:
        spki: SubjectPublicKeyInfo in DER.
        agrees: It is for key agreement, where another one is for key encipherment.
    """

    spki: bytes
    agrees: bool = False

    @classmethod
    def from_rsa(cls, modulus: int, exponent: int = 65537) -> Self:
        """RSA. Raises ValueError if that can be no key."""
        if modulus < 3 or not 1 <= exponent < 1 << 64:
            raise ValueError("an RSA key needs a modulus and an exponent above zero")
        key = der.sequence(der.integer(modulus), der.integer(exponent))
        algorithm = der.sequence(der.oid(_RSA_ENCRYPTION), der.NULL)
        return cls(der.sequence(algorithm, der.bit_string(key)))

    @classmethod
    def from_point(cls, curve: str, x: int, y: int) -> Self:
        """The point of a curve of `CURVES`. Raises ValueError if it is not on it."""
        if curve not in CURVES:
            raise ValueError(f"unknown curve '{curve}'")
        numbers = ec.EllipticCurvePublicNumbers(x, y, CURVES[curve]())
        try:
            return cls(_spki(numbers.public_key()), agrees=True)
        except (ValueError, OverflowError):
            raise ValueError(f"x and y are no point of {curve}") from None

    @classmethod
    def from_pem(cls, pem: bytes) -> Self:
        """Of any kind. Raises ValueError.

        Such a key counts as one for encipherment even if it is on a curve, as in the C suite.
        """
        with refusals():
            key = serialization.load_pem_public_key(pem)
            return cls(
                key.public_bytes(
                    serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
                )
            )

    @classmethod
    def from_raw(cls, kind: str, key: bytes) -> Self:
        """A key of one of `RAW_KINDS`. Raises ValueError if it has not the size of one."""
        identifier, size = _RAW[kind]
        if len(key) != size:
            raise ValueError(f"a key for {kind} has {size} bytes, and not {len(key)}")
        return cls(der.sequence(der.sequence(der.oid(identifier)), der.bit_string(key)))

    def to_pem(self) -> bytes:
        """Of any kind that `cryptography` knows. Raises ValueError."""
        with refusals():
            return serialization.load_der_public_key(self.spki).public_bytes(
                serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
            )

    @property
    def key_id(self) -> bytes:
        """As GnuTLS makes it: SHA-1 over all of `spki`, 20 bytes."""
        return hashlib.sha1(self.spki, usedforsecurity=False).digest()


def _spki(key: ec.EllipticCurvePublicKey | rsa.RSAPublicKey | HashlessPublicKey) -> bytes:
    return key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def own_digest(bits: int, *, rsa_key: bool) -> str:
    """The hash that goes with the size of a CA's key, else on an elliptic curve."""
    if rsa_key:
        return "sha256" if bits <= _RSA_WITH_SHA256 else "sha384"
    return next((f"sha{size}" for size in (512, 384) if bits >= size), "sha256")


class PrivateKey:
    """An RSA, ECDSA, EdDSA or ML-DSA key in memory: a `Signer` of `ca.certificates`."""

    def __init__(self, key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | HashlessKey) -> None:
        self._key = key

    @classmethod
    def generate(cls, bits: int) -> Self:
        """A new RSA key."""
        return cls(rsa.generate_private_key(65537, bits))

    @classmethod
    def from_pem(cls, pem: bytes, passphrase: bytes | None) -> Self:
        """Reads a key, encrypted or not; a passphrase that is not needed is ignored.

        Raises:
            ValueError: It is no key that signs certificates, or the passphrase does not fit.
        """
        with refusals():
            key = _load_pem(pem, passphrase or None)
            if isinstance(key, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey):
                return cls(key)
            if is_hashless(cast("HashlessKey", key).public_key()):
                return cls(cast("HashlessKey", key))
        raise ValueError("it is no RSA, elliptic curve, EdDSA or ML-DSA key")

    def to_pem(self, passphrase: bytes | None) -> bytes:
        """PKCS #8, encrypted if there is a passphrase. Raises ValueError if that is too long."""
        encryption = (
            serialization.BestAvailableEncryption(passphrase)
            if passphrase
            else serialization.NoEncryption()
        )
        with refusals():
            return self._key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption
            )

    @property
    def public(self) -> PublicKey:
        """Its public half."""
        return PublicKey(_spki(self._key.public_key()))

    def digest(self, usual: str) -> str:
        """See `Signer`."""
        public = self._key.public_key()
        if isinstance(public, rsa.RSAPublicKey | ec.EllipticCurvePublicKey):
            own = own_digest(public.key_size, rsa_key=isinstance(public, rsa.RSAPublicKey))
            return own if usual == "sha256" else usual
        if usual != "sha256":
            reason = "Cannot use hashless signing scheme for TPM 1.2 certs."
            raise CertificateError("signing key", reason)
        return ""

    def algorithm(self, digest: str) -> bytes:
        """AlgorithmIdentifier of its signatures."""
        if not digest:
            return _algorithm_of(self.public.spki)
        return signature_algorithm(digest, rsa_key=isinstance(self._key, rsa.RSAPrivateKey))

    def sign(self, data: bytes, digest: str) -> bytes:
        """PKCS #1 v1.5, ECDSA as DER, or as EdDSA and ML-DSA are. Raises CertificateError."""
        try:
            with refusals():
                if isinstance(self._key, rsa.RSAPrivateKey):
                    return self._key.sign(data, padding.PKCS1v15(), HASHES[digest]())
                if isinstance(self._key, ec.EllipticCurvePrivateKey):
                    return self._key.sign(data, ec.ECDSA(HASHES[digest]()))
                return self._key.sign(data)
        except ValueError as exc:
            # Systems may forbid SHA-1, which the certificates of a TPM 1.2 are signed with.
            raise CertificateError("signing key", f"cannot sign with {digest}: {exc}") from exc


def verify(
    key: rsa.RSAPublicKey | ec.EllipticCurvePublicKey | HashlessPublicKey,
    signature: bytes,
    data: bytes,
    digest: str,
) -> None:
    """Raises ValueError for what is no signature as a `Signer` of that key makes it."""
    with refusals():
        if isinstance(key, rsa.RSAPublicKey):
            key.verify(signature, data, padding.PKCS1v15(), HASHES[digest]())
        elif isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(signature, data, ec.ECDSA(HASHES[digest]()))
        else:
            key.verify(signature, data)


def signature_algorithm(digest: str, *, rsa_key: bool) -> bytes:
    """AlgorithmIdentifier of a signature over a hash of `HASHES`."""
    if rsa_key:
        return der.sequence(der.oid(_WITH_RSA[digest]), der.NULL)
    return der.sequence(der.oid(_WITH_ECDSA[digest]))


def ecdsa_signature(r: int, s: int) -> bytes:
    """ECDSA-Sig-Value of RFC 3279, from what tokens and TPMs give."""
    return der.sequence(der.integer(r), der.integer(s))


def _algorithm_of(spki: bytes) -> bytes:
    """The AlgorithmIdentifier of a SubjectPublicKeyInfo that `cryptography` has made."""
    size = spki[1] & 0x7F if spki[1] & 0x80 else 0
    start = 2 + size
    return spki[start : start + 2 + spki[start + 1]]


def _load_pem(pem: bytes, secret: bytes | None) -> object:
    try:
        return serialization.load_pem_private_key(pem, secret)
    except TypeError as exc:
        if secret is None:
            raise ValueError("it is encrypted, and there is no password for it") from exc
        return serialization.load_pem_private_key(pem, None)
