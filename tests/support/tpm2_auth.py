"""A TPM 2.0 as a guest's stack talks to it: salted sessions, HMACs, encrypted parameters.

Source: TCG TPM 2.0 Library Part 1, sections 11.4.10 (KDFa), 19 (sessions) and 21 (encryption of
parameters). All hashes are SHA-256, all ciphers AES-128 in CFB mode, and salts are for RSA keys.
Deliberately free of the package's own structures.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from tests.support.commands import tpm2

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

RETRY: Final = 0x922
RH_NULL: Final = 0x40000007
RS_PW: Final = 0x40000009
CONTINUE, DECRYPT, ENCRYPT = 0x01, 0x20, 0x40
HMAC_SESSION, POLICY_SESSION = 0, 1
_AES_128_CFB: Final = bytes.fromhex("0006 0080 0043")
_SHA256: Final = 0x000B


class Refused(Exception):
    """The TPM answered with an error *code*."""

    def __init__(self, code: int) -> None:
        super().__init__(f"{code:#x}")
        self.code = code


def sized(data: bytes) -> bytes:
    """TPM2B."""
    return struct.pack(">H", len(data)) + data


class Fields:
    """A response's parameters, from front to back."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def take(self, size: int) -> bytes:
        assert size <= len(self._data)
        taken, self._data = self._data[:size], self._data[size:]
        return taken

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def sized(self) -> bytes:
        return self.take(self.number(2))

    def rest(self) -> bytes:
        return self.take(len(self._data))


def kdfa(key: bytes, label: bytes, first: bytes, second: bytes, bits: int) -> bytes:
    """KDFa with SHA-256."""
    found = b""
    for count in range(1, (bits + 255) // 256 + 1):
        message = (
            struct.pack(">I", count) + label + b"\0" + first + second + struct.pack(">I", bits)
        )
        found += hmac.digest(key, message, "sha256")
    return found[: bits // 8]


@dataclass
class Session:
    """One that the TPM has; of no *key* if it was not salted."""

    handle: int
    nonce_tpm: bytes
    key: bytes = b""
    attributes: int = CONTINUE
    nonce_caller: bytes = b""

    def _cfb(self, data: bytes, newer: bytes, older: bytes, *, conceals: bool) -> bytes:
        """By hand, for `cryptography` is about to drop that mode."""
        made = kdfa(self.key, b"CFB", newer, older, 256)
        block = Cipher(algorithms.AES(made[:16]), modes.ECB()).encryptor()  # noqa: S305
        before, found = made[16:], b""
        for at in range(0, len(data), 16):
            part = data[at : at + 16]
            changed = bytes(a ^ b for a, b in zip(part, block.update(before), strict=False))
            found, before = found + changed, changed if conceals else part
        return found

    def conceal(self, parameters: bytes) -> bytes:
        """With the first parameter encrypted, a TPM2B."""
        fields = Fields(parameters)
        plain = fields.sized()
        secret = self._cfb(plain, self.nonce_caller, self.nonce_tpm, conceals=True)
        return sized(secret) + fields.rest()

    def reveal(self, parameters: bytes) -> bytes:
        """The same of a response, the other way."""
        fields = Fields(parameters)
        secret = fields.sized()
        plain = self._cfb(secret, self.nonce_tpm, self.nonce_caller, conceals=False)
        return sized(plain) + fields.rest()

    def code(self, digest: bytes, newer: bytes, older: bytes, attributes: int) -> bytes:
        """The HMAC; of no object that has a password of its own."""
        return hmac.digest(self.key, digest + newer + older + bytes([attributes]), "sha256")


Auth = bytes | Session
"""A password, or a session; one with a key is the only one of its command."""


class Stack:
    """What a guest keeps of its TPM beside the TPM: sessions, and the names of objects.

    Args:
        run: Gives the TPM's response to a command. Another one is another place of the same TPM.
    """

    def __init__(self, run: Callable[[bytes], bytes]) -> None:
        self.run = run
        self.names: dict[int, bytes] = {}

    def execute(
        self,
        code: int,
        handles: Sequence[int] = (),
        parameters: bytes = b"",
        auths: Sequence[Auth] = (),
        *,
        returned: int = 0,
    ) -> tuple[tuple[int, ...], Fields]:
        """A command's handles and parameters. Raises Refused; a response's HMAC is looked at."""
        keyed = next((a for a in auths if isinstance(a, Session) and a.key), None)
        assert keyed is None or len(auths) == 1
        if keyed is not None:
            keyed.nonce_caller = os.urandom(32)
            if keyed.attributes & DECRYPT:
                parameters = keyed.conceal(parameters)
        names = b"".join(self.names.get(handle, struct.pack(">I", handle)) for handle in handles)
        digest = hashlib.sha256(struct.pack(">I", code) + names + parameters).digest()
        area = b"".join(_authorisation(auth, digest) for auth in auths)
        body = struct.pack(f">{len(handles)}I", *handles)
        body += (struct.pack(">I", len(area)) + area if auths else b"") + parameters
        response = self._asked(tpm2(code, body, sessions=bool(auths)))
        fields = Fields(response[10:])
        found = tuple(fields.number(4) for _ in range(returned))
        if not auths:
            return found, fields
        answer = fields.take(fields.number(4))
        if keyed is not None:
            answer = _checked(keyed, code, answer, fields)
        return found, Fields(answer)

    def _asked(self, command: bytes) -> bytes:
        """A TPM may want to be asked again, before the first use of what it protects."""
        for _ in range(3):
            response = self.run(command)
            result = int.from_bytes(response[6:10], "big")
            if result != RETRY:
                break
        if result:
            raise Refused(result)
        return response

    def start_session(
        self, kind: int, key: int = RH_NULL, modulus: bytes = b"", attributes: int = CONTINUE
    ) -> Session:
        """TPM2_StartAuthSession, salted for the RSA key *key* of *modulus*, if there is one."""
        nonce, salt, secret = os.urandom(32), b"", b""
        if modulus:
            salt = os.urandom(32)
            public = rsa.RSAPublicNumbers(65537, int.from_bytes(modulus, "big")).public_key()
            sha256 = hashes.SHA256()
            oaep = padding.OAEP(padding.MGF1(sha256), sha256, b"SECRET\0")
            secret = public.encrypt(salt, oaep)
        body = sized(nonce) + sized(secret) + bytes([kind]) + _AES_128_CFB
        body += struct.pack(">H", _SHA256)
        (handle,), fields = self.execute(0x176, (key, RH_NULL), body, returned=1)
        nonce_tpm = fields.sized()
        made = kdfa(salt, b"ATH", nonce_tpm, nonce, 256) if salt else b""
        return Session(handle, nonce_tpm, made, attributes)


def _authorisation(auth: Auth, digest: bytes) -> bytes:
    if isinstance(auth, bytes):
        return struct.pack(">IHB", RS_PW, 0, 0) + sized(auth)
    code = b""
    if auth.key:
        code = auth.code(digest, auth.nonce_caller, auth.nonce_tpm, auth.attributes)
    area = struct.pack(">I", auth.handle) + sized(auth.nonce_caller)
    return area + bytes([auth.attributes]) + sized(code)


def _checked(session: Session, code: int, answer: bytes, rest: Fields) -> bytes:
    """A response's parameters, whose session area is the *rest*."""
    session.nonce_tpm, attributes, found = rest.sized(), rest.number(1), rest.sized()
    digest = hashlib.sha256(struct.pack(">II", 0, code) + answer).digest()
    assert found == session.code(digest, session.nonce_tpm, session.nonce_caller, attributes)
    return session.reveal(answer) if session.attributes & ENCRYPT and answer else answer
