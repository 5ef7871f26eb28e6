"""The table of all parsers: what the tests try and ``./setup fuzz`` explores."""

from __future__ import annotations

from typing import Final

from tests.fuzz import files, peers, protocols, words
from tests.fuzz.harness import Target
from vtpm_cuse.cli.words.suboptions import SubOptionError
from vtpm_cuse.errors import VtpmError, WireError
from vtpm_cuse.wire.ptm import PTM_IOCTLS, PtmCommand
from vtpm_cuse.wire.tpm import TpmCc, TpmOrdinal

_REQUESTS: Final = tuple((command + 1).to_bytes(4, "big") for command in PtmCommand)
_IOCTLS: Final = tuple(number.to_bytes(4, "little") for number in PTM_IOCTLS)
_CODES: Final = tuple(code.to_bytes(4, "big") for kind in (TpmCc, TpmOrdinal) for code in kind)
_TAGS: Final = (b"\x80\x01", b"\x80\x02", b"\x00\xc1", b"\x00\xc4")
_BLOCKS: Final = (b"\x0a\x0d\x0d\x0a", b"\x4d\x3c\x2b\x1a", b"\6\0\0\0", b"\x09\x11")
_OPTIONS: Final = tuple(
    sorted({f"--{option.name}".encode() for one in words.PROGRAMS for option in one.options})
)
_SUBS: Final = tuple(
    sorted({f"{sub.name}=".encode() for table in words.SUB_TABLES.values() for sub in table})
)
_SETTINGS: Final = (b" = ", b"${HOME}", b"#", b"statedir", b"signingkey", b"issuercert", b"env:A=")
_NOT_ANSWERED: Final = (VtpmError, OSError)

TARGETS: Final[dict[str, Target]] = {
    "control": Target(protocols.control, words=_REQUESTS),
    "data": Target(protocols.stream, words=(*_TAGS, b"\0\0\0\x08")),
    "cuse": Target(protocols.cuse, words=_IOCTLS),
    "fuse": Target(protocols.fuse_mount, words=(b"vtpm0\0", b"pcr-sha256\0", *_IOCTLS)),
    "attributes": Target(protocols.attributes, words=_TAGS),
    "structures": Target(protocols.structures, (WireError,), rounds=1000),
    "responses": Target(protocols.responses, words=_TAGS),
    "blob": Target(files.blob, words=(b"\x02\x01\0\x0a", b"\x01\x01\0\x0a")),
    "sealed-blob": Target(files.sealed_blob),
    "linear": Target(files.linear),
    "setup-conf": Target(files.setup_conf, words=_SETTINGS),
    "localca-conf": Target(files.localca_conf, words=_SETTINGS),
    "localca-options": Target(files.localca_options, words=_OPTIONS),
    "key-file": Target(files.key_file, words=(b"0x", b"\0", b"\n"), rounds=500),
    "certificate": Target(files.certificate, rounds=500),
    "key-pem": Target(files.key_pem, (VtpmError, ValueError), rounds=500),
    "capture": Target(files.capture),
    "capture-read": Target(files.capture_read, words=_BLOCKS),
    "trace": Target(protocols.trace, words=(*_TAGS, *_CODES)),
    "options": Target(words.options, words=(b"\0", *_OPTIONS, *_SUBS), rounds=1000),
    "sub-options": Target(words.sub_options, (SubOptionError,), words=(b",", b"{", b"}", *_SUBS)),
    "names": Target(words.names, (ValueError,), words=(b"CN=", b",", b"\\", b"+", b"DC=")),
    "key-words": Target(words.key_words, words=(b"env:SECRET", b"pass:", b"secp384r1,")),
    "profile": Target(words.profile, words=(b'"Name":', b'"Algorithms":', b"custom:", b"[" * 99)),
    "facts": Target(words.facts, words=(b'"level":', b'"TPMSpecification":', b"9" * 99)),
    "channel": Target(peers.channel, _NOT_ANSWERED),
    "ioctl": Target(peers.ioctl, _NOT_ANSWERED),
    "bios": Target(peers.bios, words=_TAGS),
    "setup-tpm2": Target(peers.setup_tpm2, words=_TAGS),
    "setup-tpm12": Target(peers.setup_tpm12, words=_TAGS),
}
