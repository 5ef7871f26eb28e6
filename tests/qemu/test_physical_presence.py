"""What a guest asks of its firmware, which does it at the next boot when somebody presses a key.

"TCG PC Client Platform Physical Presence Interface Specification", version 1.30: the kernel passes
a request on by ACPI.
"""

from __future__ import annotations

from typing import Final

from tests.qemu.facts import forget, prepare
from tests.qemu.fleet import BOOT_SECONDS, UEFI2, Fleet
from tests.support.waiting import wait_until

PPI: Final = "/sys/class/tpm/tpm0/ppi"
CLEAR: Final = 5


def test_clear(fleet: Fleet) -> None:
    """The owner's primary seed is another afterwards, so the same template gives another key."""
    machine = fleet.booted(UEFI2).machine
    shell = machine.shell
    before = prepare(shell, tpm2=True)
    forget(shell, before, tpm2=True)
    again = prepare(shell, tpm2=True)
    assert again.public == before.public
    shell.run(f"echo {CLEAR} >{PPI}/request")
    seen = machine.console.stat().st_size
    machine.execute("system_reset")
    wait_until(
        lambda: b"Press F12 to clear the TPM" in machine.console.read_bytes()[seen:],
        "the firmware's question",
        process=machine.process,
        seconds=BOOT_SECONDS,
    )
    machine.execute("send-key", keys=[{"type": "qcode", "data": "f12"}])
    shell.wait_ready(BOOT_SECONDS)
    assert shell.run(f"cat {PPI}/response") == f"{CLEAR} 0: Success\n"
    assert shell.run(f"cat {PPI}/request") == "0\n"
    after = prepare(shell, tpm2=True)
    assert after.public != before.public
    forget(shell, after, tpm2=True)
