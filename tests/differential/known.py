"""Where our answer differs on purpose: session and exchange to the reason.

A difference that is not here fails the test, and so does a line here without a difference.
docs/differences.md has the same for users.
"""

from __future__ import annotations

from typing import Final

_FRAMING = "a command is as long as its header says, not as long as one read of the server"
_SURPLUS = "more data than announced: they hash it and wait for more, here it is refused"
_REFUSED_LONG = "they answer each 4100 bytes of a refused message as a message of its own"
_DESCRIPTOR = "after its first client a --server is forgotten there, and a descriptor taken instead"
_LOCALITY = "they take the locality of a prefix over unchecked, here it is checked as everywhere"

KNOWN: Final[dict[tuple[str, str], str]] = {
    **{
        (f"framing {tpm}", name): _FRAMING
        for tpm in ("TPM 2", "TPM 1.2")
        for name in ("off: two at once", "on: two at once", "on: surplus byte", "on: in two parts")
    },
    ("framing TPM 2", "off: in two parts"): _FRAMING,
    **{
        ("framing TPM 2", f"on: prefix of locality {locality}"): _LOCALITY
        for locality in (5, 31, 32, 77, 255)
    },
    ("framing TPM 2", "on: surplus, size field 19"): _FRAMING,
    **{
        (f"control {tpm}", f"last: {name}"): reason
        for tpm in ("TPM 2", "TPM 1.2")
        for name, reason in (
            ("data descriptor after a client", _DESCRIPTOR),
            ("hash more than announced", _SURPLUS),
            ("hash much while off", _REFUSED_LONG),
        )
    },
}
