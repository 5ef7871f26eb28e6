"""What FAPI of tpm2-tss is told: a file of its own, with a place for its keys beside a private TPM.

Its configuration names the TPM, where keys and logs are, and which kinds of keys are made (tpm2-tss,
fapi-config(5)). Without one of its own it would take the machine's TPM, and the user's keys.
"""

from __future__ import annotations

import json
import os
from typing import Final

from vtpm_cuse.errors import LabError

FAPI_VARIABLE: Final = "TSS2_FAPICONF"
FAPI_NAMES: Final = ("fapi.json", "fapi")
"""A file and a folder, in that of the TPM."""

_PROFILES: Final = "/etc/tpm2-tss/fapi-profiles/"  # where distributions have them


def configure(folder: str, tcti: str) -> None:
    """Writes the file. Raises LabError."""
    file, keys = (f"{folder}/{name}" for name in FAPI_NAMES)
    settings = {
        "profile_name": "P_ECCP256SHA256",
        "profile_dir": _PROFILES,
        "user_dir": f"{keys}/user",
        "system_dir": f"{keys}/system",
        "log_dir": f"{keys}/log",
        "tcti": tcti,
        "system_pcrs": [],
        "ek_cert_less": "yes",  # nobody could look its issuer up
    }
    try:
        for place in (keys, f"{keys}/user", f"{keys}/system", f"{keys}/log"):
            os.mkdir(place, 0o700)
        with open(file, "x", encoding="utf-8", errors="surrogateescape") as out:
            json.dump(settings, out)
    except OSError as exc:
        raise LabError(f"Could not write {file}: {exc.strerror}") from exc
