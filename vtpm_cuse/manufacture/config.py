"""What one run of ``swtpm_setup`` is asked to do: the typed outcome of its command line."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vtpm_cuse.config import KeySource, ProfileConfig
    from vtpm_cuse.manufacture.plan import SetupPlan


class Existing(Enum):
    """What becomes of a TPM that is there already."""

    REFUSE = "refuse"
    KEEP = "keep"
    REPLACE = "replace"
    RECONFIGURE = "reconfigure"


@dataclass(frozen=True, slots=True)
class CertificateConfig:
    """Who makes the certificates.

    Attributes:
        tool: A program to call; None for the local CA in this process.
        configfile: Its configuration.
        optsfile: Its options.
        vmid: Common name of the certificates' subject.
        logfile: Where it logs.
    """

    tool: str | None = None
    configfile: str | None = None
    optsfile: str | None = None
    vmid: str | None = None
    logfile: str | None = None


@dataclass(frozen=True, slots=True)
class SetupConfig:
    """One set-up.

    Attributes:
        plan: What to make.
        uri: Where its state goes: ``dir://PATH`` or ``file://PATH``.
        existing: What becomes of a TPM that is there.
        key: Where the key comes from that encrypts the state.
        profile: Profile of a new TPM 2.0.
        certificates: Who makes certificates.
        certificate_directory: Where copies of the endorsement keys' certificates go.
        command: A TPM emulator to start instead of the engine in this process.
        logfile: Where that emulator logs.
    """

    plan: SetupPlan
    uri: str
    existing: Existing = Existing.REFUSE
    key: KeySource | None = None
    profile: ProfileConfig | None = None
    certificates: CertificateConfig = CertificateConfig()
    certificate_directory: str | None = None
    command: tuple[str, ...] = ()
    logfile: str | None = None
