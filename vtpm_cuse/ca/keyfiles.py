"""Key files of keys that a TPM 2.0 alone can load, as OpenSSL's providers for TPMs have them. Pure.

Source: ASN.1 Specification for TPM 2.0 Key Files (draft-bottomley-tpm2-keys), 3.1.
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from vtpm_cuse.ca import der
from vtpm_cuse.errors import WireError
from vtpm_cuse.wire.tpm2 import TPM_RH_OWNER, Digest

if TYPE_CHECKING:
    from typing import Self

_BEGIN: Final = b"-----BEGIN TSS2 PRIVATE KEY-----"
_END: Final = b"-----END TSS2 PRIVATE KEY-----"
_LINE: Final = 64

_LOADABLE: Final = der.oid("2.23.133.10.1.3")
_SEQUENCE, _OBJECT, _BOOLEAN, _INTEGER, _OCTETS = 0x30, 0x06, 0x01, 0x02, 0x04
_EMPTY_AUTH, _POLICY, _AUTH_POLICY, _DESCRIPTION, _RSA_PARENT = 0xA0, 0xA1, 0xA3, 0xA4, 0xA5
_WORD: Final = 0xFFFFFFFF


def is_key_file(pem: bytes) -> bool:
    """Whether it is, or was meant as, such a file."""
    return _BEGIN in pem


@dataclass(frozen=True, slots=True)
class TpmKeyFile:
    """A key for TPM2_Load.

    Attributes:
        public: TPMT_PUBLIC.
        private: The contents of TPM2B_PRIVATE, which the TPM has encrypted.
        parent: Handle of the parent, if that is persistent; or a hierarchy, of which the parent is
            then a primary key, made anew each time.
        needs_password: Whether it has one.
        rsa_parent: Such a primary key is of RSA 2048 and not on P-256.
    """

    public: bytes
    private: bytes
    parent: int = TPM_RH_OWNER
    needs_password: bool = False
    rsa_parent: bool = False

    @classmethod
    def from_pem(cls, pem: bytes) -> Self:
        """Reads the first one in a file. Raises ValueError."""
        found = re.search(re.escape(_BEGIN) + rb"([\sA-Za-z0-9+/=]*)" + re.escape(_END), pem)
        if found is None:
            raise ValueError("it is no whole TSS2 PRIVATE KEY in PEM")
        try:
            data = base64.b64decode(b"".join(found[1].split()), validate=True)
        except binascii.Error as exc:
            raise ValueError(f"it is no PEM: {exc}") from exc
        whole = list(der.elements(data))
        if len(whole) != 1 or whole[0][0] != _SEQUENCE:
            raise ValueError("it is no TPMKey")
        return cls._of_fields(list(der.elements(whole[0][1])))

    @classmethod
    def _of_fields(cls, fields: list[tuple[int, bytes]]) -> Self:
        if [tag for tag, _ in fields[1:][-3:]] != [_INTEGER, _OCTETS, _OCTETS]:
            raise ValueError("it is no TPMKey")
        (first, kind), *optional = fields[:-3]
        if first != _OBJECT or der.tlv(_OBJECT, kind) != _LOADABLE:
            raise ValueError("it is no key that can be loaded, but one to be imported, or data")
        flags = dict(optional)
        if flags.keys() & {_POLICY, _AUTH_POLICY}:
            raise ValueError("it has a policy, and only one with a password or none can be used")
        if flags.keys() - {_EMPTY_AUTH, _DESCRIPTION, _RSA_PARENT}:
            raise ValueError("it has fields that no key of its kind has")
        parent, public, private = (contents for _, contents in fields[-3:])
        try:
            return cls(
                Digest.unpack_untrusted(public).buffer,
                Digest.unpack_untrusted(private).buffer,
                # Some programs write a handle above 2^31 as a negative number.
                int.from_bytes(parent, "big", signed=True) & _WORD,
                not _is_true(flags.get(_EMPTY_AUTH)),
                _is_true(flags.get(_RSA_PARENT)),
            )
        except WireError as exc:
            raise ValueError(f"its contents are cut off: {exc}") from exc

    def to_pem(self) -> bytes:
        """The file."""
        data = der.sequence(
            _LOADABLE,
            der.context(0, der.boolean(not self.needs_password)),
            *([der.context(5, der.boolean(True))] if self.rsa_parent else []),
            der.integer(self.parent),
            der.octet_string(Digest(self.public).pack()),
            der.octet_string(Digest(self.private).pack()),
        )
        text = base64.b64encode(data)
        lines = [text[at : at + _LINE] for at in range(0, len(text), _LINE)]
        return b"\n".join([_BEGIN, *lines, _END, b""])


def _is_true(flag: bytes | None) -> bool:
    """An explicit BOOLEAN that may be left out. Raises ValueError."""
    if flag is None:
        return False
    (tag, contents), *rest = list(der.elements(flag)) or [(0, b"")]
    if tag != _BOOLEAN or rest or len(contents) != 1:
        raise ValueError("it has a flag that is none")
    return contents != b"\0"
