"""Key files of TPM keys: what another program wrote is read, what is damaged is said."""

from __future__ import annotations

import base64
import contextlib
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtpm_cuse.ca import der
from vtpm_cuse.ca.keyfiles import TpmKeyFile, is_key_file
from vtpm_cuse.ca.tpmkeys import KeyTpm, TpmKey
from vtpm_cuse.errors import CertificateError
from vtpm_cuse.wire.tpm2 import EccPublic, TpmEccCurve, read_public_untrusted

OF_TPM2_OPENSSL: Final = b"""\
A comment, as programs write some.
-----BEGIN TSS2 PRIVATE KEY-----
MIIBIAYGZ4EFCgEDoAMBAQECBEAAAAEEeAB2ACMACwAGAHIAAAAQABAABAAQADAm
vkvF6xSrYJWGsrMAsWSg1H42FUoahtaN56p+98b6/F9J9aKTskFmbFIMoYIysbQA
MLWdOqp3u4UTLJKLIJqztDGNa6J4PsaMVgscEr6vHGa6BQqmhlufz4FCiLkQTGx7
KQSBkACOACD852LNlHCbbKOPsiqPUzxkIghkEMLtsdR041VvweL1LwAQe4F72+aP
SqpoVyMUp8Y54G334ScETip6sw+jyTPdu9vD42W/gR3pumk6nhhZ1AckhSyA5hJu
58YRMJspqO5vYpsG+Fy+FtL7mZhGTDtxmBXkXsZuhZ5fqp+XgeT0XHvZfbND6ebi
LyX7Qw==
-----END TSS2 PRIVATE KEY-----
"""
PARENT: Final = der.integer(0x40000001)
BUFFERS: Final = (der.octet_string(b"\0\3pub"), der.octet_string(b"\0\4priv"))
LOADABLE: Final = der.oid("2.23.133.10.1.3")


def pem_of(*fields: bytes) -> bytes:
    text = base64.b64encode(der.sequence(*fields))
    return b"-----BEGIN TSS2 PRIVATE KEY-----\n" + text + b"\n-----END TSS2 PRIVATE KEY-----\n"


def test_a_file_of_another_program() -> None:
    assert is_key_file(OF_TPM2_OPENSSL)
    found = TpmKeyFile.from_pem(OF_TPM2_OPENSSL)
    assert (found.parent, found.needs_password, found.rsa_parent) == (0x40000001, False, False)
    public = read_public_untrusted(found.public)
    assert isinstance(public, EccPublic)
    assert (public.curveID, public.scheme) == (TpmEccCurve.TPM_ECC_NIST_P384, None)
    # This program writes TRUE as 1 and not, as DER has it, as 255.
    again = base64.b64decode(b"".join(found.to_pem().splitlines()[1:-1]))
    theirs = base64.b64decode(b"".join(OF_TPM2_OPENSSL.splitlines()[2:-1]))
    assert again == theirs.replace(b"\xa0\3\1\1\1", b"\xa0\3\1\1\xff")


@given(
    st.binary(max_size=300), st.binary(max_size=300), st.integers(0, 0xFFFFFFFF), st.booleans(),
    st.booleans(),
)  # fmt: skip
def test_a_file_of_ours(
    public: bytes, private: bytes, parent: int, needs_password: bool, rsa: bool
) -> None:
    file = TpmKeyFile(public, private, parent, needs_password, rsa)
    assert TpmKeyFile.from_pem(file.to_pem()) == file


def test_a_handle_as_a_negative_number() -> None:
    file = TpmKeyFile.from_pem(pem_of(LOADABLE, der.tlv(2, b"\x81\0\0\1"), *BUFFERS))
    assert (file.parent, file.needs_password) == (0x81000001, True)


@pytest.mark.parametrize(
    ("pem", "said"),
    [
        (OF_TPM2_OPENSSL[:-30], "no whole TSS2 PRIVATE KEY"),
        (OF_TPM2_OPENSSL.replace(b"MIIB", b"MII!"), "no whole TSS2 PRIVATE KEY"),
        (OF_TPM2_OPENSSL.replace(b"MIIBIAYG", b"MIIBIAY"), "no PEM"),
        (OF_TPM2_OPENSSL.replace(b"MIIBIAYG", b"MIIBIAYGAAAA"), "no TPMKey|no DER|cut off"),
        (OF_TPM2_OPENSSL.replace(b"LyX7Qw==\n", b""), "cut off"),
        (pem_of(), "no TPMKey"),
        (pem_of(PARENT, *BUFFERS), "no TPMKey"),
        (pem_of(der.oid("2.23.133.10.1.4"), PARENT, *BUFFERS), "imported, or data"),
        (pem_of(LOADABLE, der.context(1, b""), PARENT, *BUFFERS), "it has a policy"),
        (pem_of(LOADABLE, der.context(3, b""), PARENT, *BUFFERS), "it has a policy"),
        (pem_of(LOADABLE, der.context(2, b""), PARENT, *BUFFERS), "fields that no key"),
        (pem_of(LOADABLE, der.context(0, PARENT), PARENT, *BUFFERS), "flag that is none"),
        (pem_of(LOADABLE, PARENT, BUFFERS[0], der.octet_string(b"\0\5priv")), "cut off"),
    ],
)
def test_damaged_files(pem: bytes, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TpmKeyFile.from_pem(pem)


@given(st.binary(max_size=200), st.binary(max_size=200))
def test_any_key_in_a_file_is_one_or_an_error(public: bytes, optional: bytes) -> None:
    """What a TPM would be asked for is checked before."""
    fields = (der.octet_string(len(public).to_bytes(2, "big") + public), BUFFERS[1])
    with pytest.raises(CertificateError, match="key x: it"):
        TpmKey.from_pem("x", pem_of(LOADABLE, PARENT, *fields), None, KeyTpm())
    with contextlib.suppress(ValueError):
        TpmKeyFile.from_pem(pem_of(LOADABLE, optional, PARENT, *BUFFERS))


@given(st.binary(max_size=80))
def test_elements_of_anything(data: bytes) -> None:
    """They are found again, or the bytes are no DER."""
    try:
        found = list(der.elements(data))
    except ValueError:
        return
    for tag, contents in found:
        assert list(der.elements(der.tlv(tag, contents))) == [(tag, contents)]
