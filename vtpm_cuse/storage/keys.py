"""State and migration keys: where they come from, and AES-CBC with HMAC as the C suite stores it.

The HMAC key is the AES key. A 256-bit key has a 32-byte IV, all of it under the
HMAC, of which CBC uses the first 16; padding goes to multiples of the key's length.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import hmac
import logging
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from vtpm_cuse.errors import BlobError, UsageError
from vtpm_cuse.files import open_to_read
from vtpm_cuse.wire.blob import BlobTag, find_tlv_untrusted, tlv
from vtpm_cuse.wire.ptm import PtmResult

if TYPE_CHECKING:
    from collections.abc import Callable

    from cryptography.hazmat.primitives.ciphers import Cipher, modes

    from vtpm_cuse.config import KeySource

log = logging.getLogger(__name__)

CIPHER_KEY_SIZES: Final = {"aes-cbc": 16, "aes-128-cbc": 16, "aes-256-cbc": 32}
KEY_FORMATS: Final = ("hex", "binary")
KDFS: Final = ("pbkdf2", "sha512")

_HMAC_SIZE: Final = 32
_BLOCK: Final = 16
_KEY_FILE_MAX: Final = 4096
_PASSPHRASE_MAX: Final = 1 << 20
_PASSPHRASE_SHORT: Final = 6  # bytes, and all below


@dataclass(frozen=True, slots=True)
class Key:
    """An AES key of 16 or 32 bytes; never shown."""

    secret: bytes = field(repr=False)

    @property
    def is_256bit(self) -> bool:
        """Whether blobs carry the 256-bit flag."""
        return len(self.secret) == 32

    def load_cipher(self) -> None:
        """Loads what the cipher takes now, because a sandbox may refuse it later."""
        self._cipher(bytes(_BLOCK)).encryptor()

    def seal(
        self, data_tag: BlobTag, iv_tag: BlobTag, plain: bytes, random: Callable[[int], bytes]
    ) -> bytes:
        """Ciphertext, HMAC and IV as TLV elements."""
        size = len(self.secret)
        iv = random(size)
        pad = size - len(plain) % size
        encryptor = self._cipher(iv).encryptor()
        ciphertext = encryptor.update(plain + bytes([pad]) * pad) + encryptor.finalize()
        digest = self._digest(ciphertext + iv)
        return tlv(data_tag, ciphertext) + tlv(BlobTag.HMAC, digest) + tlv(iv_tag, iv)

    def unseal_untrusted(self, data_tag: BlobTag, iv_tag: BlobTag, stream: bytes) -> bytes:
        """What `seal` was given. The HMAC is checked before anything is decrypted.

        Raises:
            BlobError: TPM_FAIL without its elements, TPM_DECRYPT_ERROR for a wrong key or damage.
        """
        ciphertext = find_tlv_untrusted(stream, data_tag)
        digest = find_tlv_untrusted(stream, BlobTag.HMAC)
        if ciphertext is None or digest is None or len(digest) < _HMAC_SIZE:
            reason = f"Could not find HMAC or encrypted data (tag {data_tag}) in byte stream."
            raise BlobError(PtmResult.TPM_FAIL, reason)
        iv = find_tlv_untrusted(stream, iv_tag)  # absent in old blobs: zeros, not authenticated
        if not hmac.compare_digest(digest[:_HMAC_SIZE], self._digest(ciphertext + (iv or b""))):
            reason = "Verification of HMAC failed. Data integrity is compromised"
            raise BlobError(PtmResult.TPM_DECRYPT_ERROR, reason)
        if iv is not None and len(iv) != len(self.secret):
            raise BlobError(PtmResult.TPM_DECRYPT_ERROR, f"IV has {len(iv)} bytes")
        if iv is None and stream != tlv(data_tag, ciphertext) + tlv(BlobTag.HMAC, digest):
            # Whoever wrote blobs without an IV wrote just this; an IV under another tag is no IV.
            raise BlobError(PtmResult.TPM_DECRYPT_ERROR, "The blob has no IV, but something else")
        return self._decrypt(ciphertext, iv or bytes(_BLOCK))

    def unseal_version_1_untrusted(self, body: bytes) -> bytes:
        """The oldest form: no IV, no HMAC, a SHA-256 of the data before them. Raises BlobError.

        PEER: says whether padding or checksum is wrong, by which who may try often can decrypt.
        """
        with contextlib.suppress(BlobError):
            plain = self._decrypt(body, bytes(_BLOCK))
            digest, data = plain[:_HMAC_SIZE], plain[_HMAC_SIZE:]
            if hmac.compare_digest(digest, hashlib.sha256(data).digest()):
                return data
        raise BlobError(PtmResult.TPM_DECRYPT_ERROR, "The decrypted data is no state of a TPM")

    def _decrypt(self, ciphertext: bytes, iv: bytes) -> bytes:
        size = len(self.secret)
        if len(ciphertext) < size or len(ciphertext) % _BLOCK:
            raise BlobError(PtmResult.TPM_DECRYPT_ERROR, "The ciphertext is too short")
        decryptor = self._cipher(iv).decryptor()
        plain = decryptor.update(ciphertext) + decryptor.finalize()
        pad = plain[-1]
        if not 1 <= pad <= size or plain[-pad:] != bytes([pad]) * pad:
            raise BlobError(PtmResult.TPM_DECRYPT_ERROR, "The padding of the decrypted data is bad")
        return plain[:-pad]

    def _digest(self, data: bytes) -> bytes:
        return hmac.digest(self.secret, data, "sha256")

    def _cipher(self, iv: bytes) -> Cipher[modes.CBC]:
        # Imported here: who has no keys does without the library.
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

        return Cipher(algorithms.AES(self.secret), modes.CBC(iv[:_BLOCK]))


def read_key(source: KeySource) -> Key:
    """Reads, derives and, if wanted, removes. Descriptors are closed.

    Raises:
        UsageError: There is no source, it cannot be read, or it holds no key.
    """
    size = CIPHER_KEY_SIZES[source.mode]
    data = _key_data(source)
    if data is not None:
        key = _hex_key(data, size) if source.format == "hex" else _binary_key(data, size)
    elif source.pwdfile is not None or source.pwdfd is not None:
        passphrase = _read(source.pwdfile, source.pwdfd, _PASSPHRASE_MAX, "passphrase")
        if len(passphrase) <= _PASSPHRASE_SHORT:
            log.warning("Warning: Passphrase is only %d bytes long", len(passphrase))
        key = _derive(source.kdf, passphrase, size)
    else:
        raise UsageError(
            "Either file=, fd=, pwdfile=, or pwdfd= is required for key option",
            hint="credential= and keyring= are as good",
        )
    if source.remove:
        for path in (source.file, source.pwdfile):
            if path is not None:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
    return Key(key)


def _key_data(source: KeySource) -> bytes | None:
    """The key as it is kept; None where the source is a passphrase, or nothing."""
    if source.file is not None or source.fd is not None:
        return _read(source.file, source.fd, _KEY_FILE_MAX, "key")
    if source.credential is not None:
        path = _credential_path(source.credential)
        if not os.path.lexists(path):
            raise UsageError(
                f"Unable to open file {path}: {os.strerror(errno.ENOENT)}",
                hint="with --chroot, CREDENTIALS_DIRECTORY is looked for below the new root",
            )
        return _read(path, None, _KEY_FILE_MAX, "key")
    if source.keyring is not None:
        from vtpm_cuse.storage.keyring import read_user_key

        return read_user_key(source.keyring, _KEY_FILE_MAX)
    return None


def _credential_path(name: str) -> str:
    if "/" in name or name in {"", ".", ".."}:
        raise UsageError(f"'{name}' cannot be the name of a credential")
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    if not folder:
        raise UsageError(
            f"There is no credential '{name}': CREDENTIALS_DIRECTORY is not set",
            hint=f"let systemd start the program, with LoadCredential={name}:/path/of/the/key "
            f"or LoadCredentialEncrypted={name}",
        )
    return os.path.join(folder, name)


def _read(path: str | None, fd: int | None, limit: int, what: str) -> bytes:
    """To the end of the file: a pipe may deliver in pieces."""
    try:
        source = fd or 0 if path is None else open_to_read(path, streams=True)
        with open(source, "rb") as file:
            data = file.read(limit + 1)
    except OSError as exc:
        name = f"open file {path}" if path is not None else f"read {what}"
        raise UsageError(f"Unable to {name}: {exc.strerror}") from exc
    if len(data) > limit:
        raise UsageError(f"The {what} is longer than {limit} bytes")
    return data


def _hex_key(data: bytes, size: int) -> bytes:
    digits = data.split(b"\0")[0]
    digits = (digits.split() or [b""])[0] if not digits[:1].isspace() else b""
    digits = digits.removeprefix(b"0x")
    try:
        key = bytes.fromhex(digits.decode("ascii"))
    except ValueError:
        key = b""
    if not key or len(key) > size:
        raise UsageError(f"Could not parse key hex string into {size} byte buffer.")
    if len(key) not in CIPHER_KEY_SIZES.values():
        raise UsageError(f"Unsupported key length with {len(digits)} digits.")
    return _long_enough(key, size)


def _binary_key(data: bytes, size: int) -> bytes:
    if len(data) > size:
        raise UsageError(f"Key is larger than buffer ({len(data)} > {size}).")
    # PEER: takes 16 bytes in 256-bit mode for a 128-bit key.
    return _long_enough(data, size)


def _long_enough(key: bytes, size: int) -> bytes:
    if len(key) < size:
        raise UsageError(f"The provided key is too short. Got {len(key)} bytes, need {size}.")
    return key


def _derive(kdf: str, passphrase: bytes, size: int) -> bytes:
    if kdf == "sha512":
        return hashlib.sha512(passphrase).digest()[:size]
    return hashlib.pbkdf2_hmac("sha512", passphrase, b"swtpm", 1000, size)
