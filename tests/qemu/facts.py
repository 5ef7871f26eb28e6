"""What a guest can tell about its TPM that a move to another machine must not change."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from tests.support import commands
from tests.support.commands import code_of

if TYPE_CHECKING:
    from tests.qemu.guest import Shell

DEBUG_PCR: Final = 16
"""The PCR that firmware and kernel leave alone."""

_PASSWORD_SESSION: Final = bytes.fromhex("00000009400000090000000000")
# An ECC key on P-256 that signs, below the owner.
_CREATE_PRIMARY: Final = commands.tpm2(
    0x131,
    struct.pack(">I", 0x40000001)
    + _PASSWORD_SESSION
    + bytes.fromhex("000400000000")
    + bytes.fromhex("0016 0023 000b 00040072 0000 0010 0010 0003 0010 0000 0000")
    + bytes.fromhex("0000 00000000"),
    sessions=True,
)
_OIAP: Final = commands.tpm12(0x0A)


@dataclass(frozen=True)
class Facts:
    """What the TPM holds.

    Attributes:
        pcrs: Every PCR of every bank, as the kernel shows them.
        handle: Of a loaded key, or of an authorisation session in a TPM 1.2.
        public: The key's public part.
    """

    pcrs: str
    handle: bytes
    public: bytes = b""


def read_pcrs(shell: Shell) -> dict[str, str]:
    """PCRs by names like "sha256/0", from sysfs."""
    lines = shell.run("cd /sys/class/tpm/tpm0 && grep . pcr-*/*").splitlines()
    return dict(line.removeprefix("pcr-").split(":") for line in lines)


def extend(shell: Shell, byte: int, *, tpm2: bool) -> None:
    """Extends the debug PCR with a digest of one byte's value all over."""
    if tpm2:
        command = commands.pcr_extend(DEBUG_PCR, bytes([byte]) * 32)
    else:
        command = commands.tpm12_pcr_extend(DEBUG_PCR, bytes([byte]) * 20)
    (answer,) = shell.tpm(command)
    assert code_of(answer) == 0, answer.hex()


def prepare(shell: Shell, *, tpm2: bool) -> Facts:
    """Puts something into the TPM, volatile all of it, and tells what it holds now."""
    extend(shell, 0xA5, tpm2=tpm2)
    (answer,) = shell.tpm(_CREATE_PRIMARY if tpm2 else _OIAP)
    assert code_of(answer) == 0, answer.hex()
    return look(shell, answer[10:14], tpm2=tpm2)


def look(shell: Shell, handle: bytes, *, tpm2: bool) -> Facts:
    """What the TPM holds."""
    pcrs = shell.run("cd /sys/class/tpm/tpm0 && grep . pcr-*/*")
    if not tpm2:
        return Facts(pcrs, handle)
    (public,) = shell.tpm(commands.tpm2(0x173, handle))
    assert code_of(public) == 0, public.hex()
    return Facts(pcrs, handle, public)


def check(shell: Shell, facts: Facts, *, tpm2: bool) -> None:
    """The TPM holds what it held, and key or session can be used; then it is gone."""
    assert look(shell, facts.handle, tpm2=tpm2) == facts
    if tpm2:
        digest = struct.pack(">H", 32) + bytes(range(32))
        scheme_and_ticket = bytes.fromhex("0018 000b 8024 40000007 0000")
        body = facts.handle + _PASSWORD_SESSION + digest + scheme_and_ticket
        (answer,) = shell.tpm(commands.tpm2(0x15D, body, sessions=True))
        assert code_of(answer) == 0, answer.hex()
    forget(shell, facts, tpm2=tpm2)


def forget(shell: Shell, facts: Facts, *, tpm2: bool) -> None:
    """Removes the key, or the session, from the TPM."""
    flush = commands.tpm2(0x165, facts.handle) if tpm2 else commands.tpm12(0x96, facts.handle)
    answers = shell.tpm(flush, flush)
    assert [code_of(answer) == 0 for answer in answers] == [True, False]
