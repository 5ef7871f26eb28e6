"""What ``--key`` is made of: where the key is that encrypts a TPM's state."""

from __future__ import annotations

from typing import Final

from vtpm_cuse.cli.words.table import Kind, SubOption

KEY: Final = (
    SubOption("file", "file that holds the key", metavar="PATH"),
    SubOption("fd", "descriptor to read the key from", Kind.INT, "FD"),
    SubOption("credential", "systemd credential that holds the key", metavar="NAME"),
    SubOption("keyring", "user key in a kernel keyring that holds the key", metavar="DESC"),
    SubOption("pwdfile", "file that holds a passphrase", metavar="PATH"),
    SubOption("pwdfd", "descriptor to read a passphrase from", Kind.INT, "FD"),
    SubOption("mode", "aes-128-cbc (the default), aes-cbc or aes-256-cbc", metavar="CIPHER"),
    SubOption("format", "hex (the default) or binary", metavar="FORMAT"),
    SubOption("kdf", "pbkdf2 (the default) or sha512", metavar="KDF"),
    SubOption("remove", "remove the key or passphrase file after it was read", Kind.BOOL),
)
