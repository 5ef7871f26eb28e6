"""Targets: what lies in files. State, configuration, keys, certificates, captures."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import ssl
import struct
import tempfile
from typing import TYPE_CHECKING, Final

from tests.fuzz.pieces import pieces
from vtpm_cuse.ca import configfile
from vtpm_cuse.ca.settings import CaProfile, CaSettings
from vtpm_cuse.config import KeySource
from vtpm_cuse.errors import BlobError, StateDamaged, StateMissing
from vtpm_cuse.manufacture.files import ConfigFile
from vtpm_cuse.storage.base import BLOB_NAMES
from vtpm_cuse.storage.keys import CIPHER_KEY_SIZES, KDFS, KEY_FORMATS, Key, read_key
from vtpm_cuse.storage.linear import LinearStore
from vtpm_cuse.storage.memory import MemoryStore
from vtpm_cuse.storage.sealed import SealedStore
from vtpm_cuse.wire.blob import BlobFlag, BlobTag, tlv, with_header
from vtpm_cuse.wire.pcapng import TPM_PORT, CaptureReader, Conversation, file_header

if TYPE_CHECKING:
    from collections.abc import Iterator

ENVIRONMENT: Final = {"HOME": "/people/alice", "XDG_CONFIG_HOME": "/people/alice/.config"}
KEYS: Final = (None, Key(bytes(range(16))), Key(bytes(range(32))))


@functools.cache
def _memory_file(_name: str) -> int:
    return os.memfd_create("fuzz")


def file_of(data: bytes, name: str = "") -> str:
    """The path of a file in memory with these contents; another for each *name*."""
    fd = _memory_file(name)
    os.ftruncate(fd, 0)
    os.pwrite(fd, data, 0)
    return f"/proc/{os.getpid()}/fd/{fd}"  # opened anew each time, with a position of its own


# -- state --------------------------------------------------------------------------------


def blob(data: bytes) -> None:
    """A state file and a migration blob; what opens can be kept again, and is the same then."""
    key = KEYS[(data[0] if data else 0) % 3]
    store = MemoryStore()
    sealed = SealedStore(store, key, KEYS[2])
    with contextlib.suppress(BlobError):
        incoming = sealed.from_migration_untrusted("permall", data[2:], sum(data[1:2]))
        _check_kept(sealed, incoming)
    store.blobs["permall"] = data[2:]
    _check_kept(sealed, sealed.load("permall"))


def sealed_blob(data: bytes) -> None:
    """A blob whose HMAC is right, though nothing else may be: what a stolen key could make."""
    which, version, ciphertext = sum(data[:1]), sum(data[1:2]), data[3:]
    key = KEYS[1 + which % 2]
    assert key is not None
    flags = BlobFlag.ENCRYPTED | (BlobFlag.KEY_256BIT if key.is_256bit else BlobFlag(0))
    iv = ciphertext[: sum(data[2:3])]
    body = tlv(BlobTag.ENCRYPTED_DATA, ciphertext)
    body += tlv(BlobTag.HMAC, key._digest(ciphertext + iv))
    body += tlv(BlobTag.IV_DATA, iv) if iv else b""
    store = MemoryStore()
    blob = with_header(flags, body if version % 4 else ciphertext)
    store.blobs["permall"] = bytes([2 if version % 4 else 1]) + blob[1:]
    sealed = SealedStore(store, key)
    _check_kept(sealed, sealed.load("permall"))


def _check_kept(sealed: SealedStore, payload: bytes) -> None:
    sealed.store("volatilestate", payload)
    assert sealed.load("volatilestate") == payload


def linear(data: bytes) -> None:
    """A linear file: nothing is written into one that is damaged, and blobs keep apart."""
    file = _named_file()
    fd = file.fileno()
    os.ftruncate(fd, 0)
    os.pwrite(fd, data, 0)
    store = LinearOpen(file.name, fd)
    found: dict[str, bytes] = {}
    try:
        sizes = store.sizes()
        for name in BLOB_NAMES:
            with contextlib.suppress(StateMissing):
                found[name] = store.load(name)
        assert {name: len(blob) for name, blob in found.items()} == sizes
        new = data[:77] or b"new"
        store.store("volatilestate", new)
        for name, blob in {**found, "volatilestate": new}.items():
            assert store.load(name) == blob
    except StateDamaged:
        assert os.pread(fd, len(data) + 1, 0) == data, "a damaged file was changed"
        raise


@functools.cache
def _named_file() -> tempfile._TemporaryFileWrapper[bytes]:
    """A store does not write to a file without a name, as those in memory are."""
    return tempfile.NamedTemporaryFile()


class LinearOpen(LinearStore):
    """On a descriptor; nothing is flushed, and nothing is closed."""

    def __init__(self, path: str, fd: int) -> None:
        super().__init__(path, lock=False, fsync=False)
        self._fd = fd


# -- configuration ------------------------------------------------------------------------


def setup_conf(data: bytes) -> None:
    """swtpm_setup.conf: what was read says the same when it is written down."""
    path = file_of(data)
    text = configfile.read_text(path)
    settings = configfile.parse(text.replace("$", ""), {})
    plain = {name: value for name, value in settings.items() if not name.startswith("env:")}
    lines = "".join(f"{name} = {value}\n" for name, value in plain.items())
    assert configfile.parse(lines, {}) == plain
    for value in plain.values():
        ending = rf"{re.escape(value)}[^\S\n]*(#|\n|\Z)"
        assert re.search(ending, text.replace("$", "")), "a line ends where there is no line feed"
    config = ConfigFile.load(path, "alice")
    for name in ("profile", "active_pcr_banks", "create_certs_tool"):
        assert config.value(name) != ""


def localca_conf(data: bytes) -> None:
    """swtpm-localca.conf: all that there must be is there, or it is refused."""
    settings = CaSettings.load(file_of(data), ENVIRONMENT)
    assert settings.state_dir
    assert settings.signing_key
    assert settings.issuer_certificate
    assert settings.serial_file
    assert settings.pin
    assert repr(settings.pin) not in repr(settings)


def localca_options(data: bytes) -> None:
    """swtpm-localca.options."""
    profile = CaProfile.load(file_of(data), ENVIRONMENT)
    text = data.decode()
    if profile.platform is not None:
        assert profile.platform.model in text
    assert (profile.subject or "") in text


# -- keys and certificates ----------------------------------------------------------------


def key_file(data: bytes) -> None:
    """Key and passphrase files: a key has the size of its cipher."""
    which = sum(data[:1])
    mode = sorted(CIPHER_KEY_SIZES)[which % 3]
    path = file_of(data[1:])
    if which & 0x80:
        source = KeySource(pwdfile=path, mode=mode, kdf=KDFS[which >> 2 & 1])
    else:
        source = KeySource(file=path, mode=mode, format=KEY_FORMATS[which >> 2 & 1])
    key = read_key(source)
    assert len(key.secret) == CIPHER_KEY_SIZES[mode]
    assert key.secret.hex() not in repr(key)


@functools.cache
def _own_key() -> bytes:
    from cryptography.hazmat.primitives.asymmetric import ec

    from vtpm_cuse.ca.keys import PrivateKey

    return PrivateKey(ec.derive_private_key(4711, ec.SECP256R1())).to_pem(None)


def certificate(data: bytes) -> None:
    """The issuer's certificate, DER within PEM, and one that is no PEM at all."""
    from vtpm_cuse.ca.issuers import open_issuer

    pem = ssl.DER_cert_to_PEM_cert(data[1:]).encode() if data[:1] < b"\xf0" else data[1:]
    issuer = open_issuer(file_of(pem, "certificate"), file_of(_own_key(), "key"))
    assert issuer.key_id


def key_pem(data: bytes) -> None:
    """Private and public keys in PEM: one that is taken can sign, and its public half is read."""
    import base64

    from vtpm_cuse.ca.keys import PrivateKey, PublicKey

    names = ("PRIVATE KEY", "RSA PRIVATE KEY", "EC PRIVATE KEY", "PUBLIC KEY")
    which = sum(data[:1])
    name = names[which % 4].encode()
    body = base64.encodebytes(data[1:])
    pem = b"-----BEGIN %b-----\n%b-----END %b-----\n" % (name, body, name)
    pem = data[1:] if which >= 0xF0 else pem
    if which % 4 == 3:
        assert PublicKey.from_pem(pem).key_id
    else:
        key = PrivateKey.from_pem(pem, None)
        assert key.sign(b"data", "sha256")
        assert key.public.spki


# -- captures -----------------------------------------------------------------------------


def capture(data: bytes) -> None:
    """A packet capture gives back what was said, by a reader of its own."""
    talk = Conversation(50000, checksums=data[:1] >= b"\x80")
    said = list(pieces(data[1:]))
    written = file_header() + talk.begin(1)
    for number, message in enumerate(said):
        written += (talk.response if number % 2 else talk.command)(message, number << 30)
    written += talk.end(1 << 60)
    heard = [
        (port, payload)
        for port, flags, payload in _packets(written)
        if flags == 0x18  # PSH, ACK
    ]
    wanted = [(TPM_PORT if number % 2 else 50000, one) for number, one in enumerate(said)]
    assert heard == wanted


def capture_read(data: bytes) -> None:
    """A capture of anybody's: the same whole and in pieces, and no more than there was."""
    whole, parts = CaptureReader(), CaptureReader()
    found = [*whole.feed(data), *whole.end()]
    again = [one for at in range(0, len(data), 99) for one in parts.feed(data[at : at + 99])]
    assert ([*again, *parts.end()], parts.trouble) == (found, whole.trouble)
    assert sum(len(one.command) + len(one.response or b"") for one in found) <= len(data)


def _packets(capture: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Source port, flags and payload of each packet."""
    while capture:
        kind, size = struct.unpack_from("<II", capture)
        assert size % 4 == 0
        assert struct.unpack_from("<I", capture, size - 4) == (size,)
        if kind == 6:
            (length,) = struct.unpack_from("<I", capture, 20)
            frame = capture[28 : 28 + length]
            (whole,) = struct.unpack_from("!H", frame, 16)
            assert whole == length - 14
            (port,) = struct.unpack_from("!H", frame, 34)
            yield port, frame[47], frame[54:]
        capture = capture[size:]
