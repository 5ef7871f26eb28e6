"""The primary keys of a TPM 2.0: public areas, and where the keys and their certificates are put.

Sources: TCG EK Credential Profile for TPM Family 2.0 (templates L-1, L-2 and H-1 to H-7), TPM v2.0
Provisioning Guidance, and TPM 2.0 Keys for Device Identity and Attestation (IAK, IDevID).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from vtpm_cuse.ca.certificates import CertificateKind
from vtpm_cuse.manufacture.plan import KeyAlgorithm
from vtpm_cuse.wire.tpm2 import (
    EccPublic,
    RsaPublic,
    Scheme,
    Symmetric,
    TpmAlg,
    TpmaObject,
    TpmEccCurve,
)

if TYPE_CHECKING:
    from vtpm_cuse.wire.tpm2 import Public

SPK_HANDLE: Final = 0x81000001


class EkPlace(NamedTuple):
    """Where an endorsement key and what belongs to it are put."""

    handle: int
    certificate_index: int
    template_index: int


EK_PLACES: Final = {
    KeyAlgorithm.RSA2048: EkPlace(0x81010001, 0x01C00002, 0x01C00004),
    KeyAlgorithm.RSA3072: EkPlace(0x8101001C, 0x01C0001C, 0x01C0001D),
    KeyAlgorithm.RSA4096: EkPlace(0x8101001E, 0x01C0001E, 0x01C0001F),
    KeyAlgorithm.P256: EkPlace(0x8101000A, 0x01C0000A, 0x01C0000B),
    KeyAlgorithm.P384: EkPlace(0x81010016, 0x01C00016, 0x01C00017),
    KeyAlgorithm.P521: EkPlace(0x81010018, 0x01C00018, 0x01C00019),
}

_FIXED: Final = TpmaObject.FIXED_TPM | TpmaObject.FIXED_PARENT | TpmaObject.SENSITIVE_DATA_ORIGIN
_STORAGE: Final = (
    _FIXED
    | TpmaObject.USER_WITH_AUTH
    | TpmaObject.NO_DA
    | TpmaObject.RESTRICTED
    | TpmaObject.DECRYPT
)
_IDENTITY: Final = (
    _FIXED | TpmaObject.USER_WITH_AUTH | TpmaObject.ADMIN_WITH_POLICY | TpmaObject.SIGN
)


class _Strength(NamedTuple):
    """What goes with the size of a key: the name's hash, bits of AES, an endorsement key's policy.

    The policy is PolicySecret(TPM_RH_ENDORSEMENT), and but for the weakest that or a policy of the
    authorized index.
    """

    name_alg: TpmAlg
    aes_bits: int
    ek_policy: bytes


_LOW: Final = _Strength(
    TpmAlg.TPM_ALG_SHA256,
    128,
    bytes.fromhex("837197674484b3f81a90cc8d46a5d724fd52d76e06520b64f2a1da1b331469aa"),
)
_HIGH: Final = _Strength(
    TpmAlg.TPM_ALG_SHA384,
    256,
    bytes.fromhex(
        "b26e7d28d11a50bc53d882bcf5fd3a1a074148bb35d3b4e4cb1c0ad9bde419ca"
        "cb47ba09699646150f9fc000f3f80e12"
    ),
)
_HIGHEST: Final = _Strength(
    TpmAlg.TPM_ALG_SHA512,
    256,
    bytes.fromhex(
        "b8221ca69e8550a4914de3faa6a18c072cc01208073a928d5d66d59ef79e49a4"
        "29c41a6b269571d57edb25fbdb1838425608b413cd616a5f6db5b6071af99bea"
    ),
)
_STRENGTHS: Final = {
    KeyAlgorithm.RSA2048: _LOW,
    KeyAlgorithm.RSA3072: _HIGH,
    KeyAlgorithm.RSA4096: _HIGH,
    KeyAlgorithm.P256: _LOW,
    KeyAlgorithm.P384: _HIGH,
    KeyAlgorithm.P521: _HIGHEST,
}
_CURVES: Final = {
    KeyAlgorithm.P256: TpmEccCurve.TPM_ECC_NIST_P256,
    KeyAlgorithm.P384: TpmEccCurve.TPM_ECC_NIST_P384,
    KeyAlgorithm.P521: TpmEccCurve.TPM_ECC_NIST_P521,
}


class Identity(NamedTuple):
    """A key by which others know the TPM: what its certificate says, its place and its policies."""

    kind: CertificateKind
    name: str
    handle: int
    certificate_index: int
    attributes: int
    unique: bytes
    policies: dict[TpmAlg, bytes]


IAK: Final = Identity(
    CertificateKind.IAK,
    "IAK",
    0x81020001,
    0x01C90100,
    _IDENTITY | TpmaObject.RESTRICTED,
    b"IAK",
    {
        TpmAlg.TPM_ALG_SHA256: bytes.fromhex(
            "5437182326e414fca797d5f174615a1641f61255797c3a2b22c21d120b2d1e07"
        ),
        TpmAlg.TPM_ALG_SHA384: bytes.fromhex(
            "129d94ebf84556652c6eef43bbb757512ac87e52be7b349ca6ce4d826f749fcf"
            "672f51716c5cbb605f313bf345aab312"
        ),
        TpmAlg.TPM_ALG_SHA512: bytes.fromhex(
            "8060d1fb31716a29e48a6e5fece088bcfc1b278fc162255e81c3eca3544cd44a"
            "f94410c3715d561cccd9e39a6cb2646d43535bb54ea88710deb5f7836bd9b586"
        ),
    },
)
IDEVID: Final = Identity(
    CertificateKind.IDEVID,
    "IDevID",
    0x81020000,
    0x01C90200,
    _IDENTITY,
    b"IDEVID",
    {
        TpmAlg.TPM_ALG_SHA256: bytes.fromhex(
            "ad6b3a2284fd698a0710bf5cc1b9bdf15e2532e3f601fa4b93a6a8fa8de579ea"
        ),
        TpmAlg.TPM_ALG_SHA384: bytes.fromhex(
            "4db1aa836d0b5615df6ee53a40ef70c61c217f4303d44695925972bc927006cf"
            "a5cbdf6dc18c4dbe329b2f1542c3dd33"
        ),
        TpmAlg.TPM_ALG_SHA512: bytes.fromhex(
            "7dd7500fd6c1b94f97a6af910da147301ef28f662fee06f225a4ccadda3b4e6b"
            "38e66b2f3ad5dee1a0503cd2daedb1e68cfe4f84b03a8cd22bb6a976f071a72f"
        ),
    },
)


def ek_template(
    algorithm: KeyAlgorithm, *, allow_signing: bool = False, decryption: bool = False
) -> Public:
    """The public area from which an endorsement key is made; see `manufacture.plan.SetupPlan`."""
    strength = _STRENGTHS[algorithm]
    attributes = _FIXED | TpmaObject.ADMIN_WITH_POLICY
    if strength is not _LOW:
        attributes |= TpmaObject.USER_WITH_AUTH
    if allow_signing:
        attributes |= TpmaObject.SIGN | (TpmaObject.DECRYPT if decryption else 0)
    else:
        attributes |= TpmaObject.RESTRICTED | TpmaObject.DECRYPT
    blank = bytes(_size(algorithm)) if strength is _LOW else b""
    symmetric = None if allow_signing else Symmetric(strength.aes_bits)
    return _public(algorithm, attributes, strength.ek_policy, symmetric, None, (blank, blank))


def spk_template(algorithm: KeyAlgorithm) -> Public:
    """The public area from which the storage primary key is made."""
    blank = bytes(_size(algorithm))
    symmetric = Symmetric(_STRENGTHS[algorithm].aes_bits)
    return _public(algorithm, _STORAGE, b"", symmetric, None, (blank, blank))


def identity_template(identity: Identity, algorithm: KeyAlgorithm) -> Public:
    """The public area from which an IAK or IDevID is made."""
    name_alg = _STRENGTHS[algorithm].name_alg
    scheme: Scheme | None = Scheme(TpmAlg.TPM_ALG_ECDSA, name_alg)
    if algorithm.rsa_bits:  # one that signs anything may do so by any scheme
        is_restricted = identity.attributes & TpmaObject.RESTRICTED
        scheme = Scheme(TpmAlg.TPM_ALG_RSAPSS, name_alg) if is_restricted else None
    unique = identity.unique, b""
    policy = identity.policies[name_alg]
    return _public(algorithm, identity.attributes, policy, None, scheme, unique)


def _size(algorithm: KeyAlgorithm) -> int:
    """Bytes of a modulus, or of a coordinate."""
    return algorithm.rsa_bits // 8 or (int(algorithm.value[4:7]) + 7) // 8


def _public(
    algorithm: KeyAlgorithm,
    attributes: int,
    policy: bytes,
    symmetric: Symmetric | None,
    scheme: Scheme | None,
    unique: tuple[bytes, bytes],
) -> Public:
    """*unique* is the modulus alone, or the point."""
    x, y = unique
    name_alg = _STRENGTHS[algorithm].name_alg
    if algorithm.rsa_bits:
        return RsaPublic(
            type=TpmAlg.TPM_ALG_RSA,
            nameAlg=name_alg,
            objectAttributes=attributes,
            authPolicy=policy,
            symmetric=symmetric,
            scheme=scheme,
            keyBits=algorithm.rsa_bits,
            exponent=0,
            unique=x,
        )
    return EccPublic(
        type=TpmAlg.TPM_ALG_ECC,
        nameAlg=name_alg,
        objectAttributes=attributes,
        authPolicy=policy,
        symmetric=symmetric,
        scheme=scheme,
        curveID=_CURVES[algorithm],
        kdf=TpmAlg.TPM_ALG_NULL,
        x=x,
        y=y,
    )
