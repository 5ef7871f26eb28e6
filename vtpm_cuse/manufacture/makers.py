"""What the TPMs that ``swtpm_setup`` can make are like: libtpms here, or the user's emulator."""

from __future__ import annotations

import json
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from vtpm_cuse import PEER_VERSION
from vtpm_cuse.engine.base import InfoFlag, rsa_key_sizes
from vtpm_cuse.errors import UsageError
from vtpm_cuse.manufacture.plan import RSA_BITS

if TYPE_CHECKING:
    from vtpm_cuse.engine.base import Engine

_VERBS: Final = (
    "cmdarg-keyfile-fd",
    "cmdarg-pwdfile-fd",
    "tpm12-not-need-root",
    "cmdarg-write-ek-cert-files",
    "cmdarg-create-config-files",
    "cmdarg-reconfigure-pcr-banks",
)
_PROFILE_VERBS: Final = ("cmdarg-profile", "cmdarg-profile-remove-disabled")
_ALGORITHM_VERBS: Final = (
    "cmdarg-ek1keyalgo",
    "cmdarg-ek2keyalgo",
    "cmdarg-iakkeyalgo",
    "cmdarg-idevidkeyalgo",
)


class TpmMakers:
    """Asked when somebody wants to know, and not before.

    Args:
        command: The emulator to ask; empty for libtpms in this process.

    Raises:
        UsageError: There is no such program.
    """

    def __init__(self, command: str | None) -> None:
        self.command = tuple((command or "").split())
        if self.command:
            from vtpm_cuse.programs import find_program

            found = find_program(self.command[0])
            if found is None:
                raise UsageError(f"swtpm at {self.command[0]} is not an executable.")
            self.command = (found, *self.command[1:])

    def need_version(self, *, tpm2: bool) -> None:
        """Raises UsageError when there are no TPMs of this version."""
        name = "2.0" if tpm2 else "1.2"
        if name not in self.versions():
            who = f"swtpm at {self.command[0]}" if self.command else "libtpms"
            raise UsageError(f"{who} does not support TPM {name.removesuffix('.0')}")

    def versions(self) -> frozenset[str]:
        """Of "1.2" and "2.0", those that can be made."""
        if self.command:
            return frozenset(v for v in ("1.2", "2.0") if f"tpm-{v}" in self._features)
        from vtpm_cuse.service.compose import supported_versions

        return supported_versions()

    def rsa_sizes(self) -> list[int]:
        """Bits of RSA keys that a TPM 2.0 can have as endorsement key."""
        if self.command:
            return [bits for bits in RSA_BITS if f"rsa-keysize-{bits}" in self._features]
        sizes = rsa_key_sizes(self._engine)
        return [bits for bits in RSA_BITS if bits in sizes]

    def profiles(self) -> frozenset[str]:
        """Names of the built-in profiles."""
        return frozenset(profile["Name"] for profile in self.builtin_profiles())

    # Any: JSON whose shape is libtpms' to choose.
    def builtin_profiles(self) -> list[dict[str, Any]]:
        """The built-in profiles. Raises UsageError when the emulator does not say."""
        if self.command:
            if "cmdarg-print-profiles" not in self._features:
                return []
            from vtpm_cuse.manufacture.tpms import ask_json

            answer = ask_json((*self.command, "--tpm2", "--print-profiles"))
        elif self._engine.has_profiles:
            answer = json.loads(self._engine.info(InfoFlag.AVAILABLE_PROFILES))
        else:
            return []
        return [
            profile
            for profile in _listed(answer, "AvailableProfiles")
            if isinstance(profile, dict) and isinstance(profile.get("Name"), str)
        ]

    def capabilities_text(self) -> str:
        """``--print-capabilities``: spaced as the C suite's, for callers that compare it."""
        verbs = [f"tpm-{version}" for version in sorted(self.versions())]
        verbs += _VERBS
        names: list[str] = []
        if "2.0" in self.versions():
            verbs += [f"tpm2-rsa-keysize-{bits}" for bits in self.rsa_sizes()]
            names = [profile["Name"] for profile in self.builtin_profiles()]
        if names:
            verbs += _PROFILE_VERBS
        if "2.0" in self.versions():
            verbs += _ALGORITHM_VERBS
        return (
            f'{{ "type": "swtpm_setup", "features": [ {_quoted(verbs)} ], '
            f'"profiles": [ {_quoted(names)} ], "version": "{PEER_VERSION}" }}'
        ).replace("[  ]", "[ ]")

    @cached_property
    def _features(self) -> frozenset[str]:
        from vtpm_cuse.manufacture.tpms import ask_json

        answer = ask_json((*self.command, "--tpm2", "--print-capabilities"))
        return frozenset(map(str, _listed(answer, "features")))

    @cached_property
    def _engine(self) -> Engine:
        from vtpm_cuse.service.compose import bare_engine

        return bare_engine(tpm2=True)


# Any: JSON of another program.
def _listed(answer: dict[str, Any], name: str) -> list[Any]:
    found = answer.get(name)
    return found if isinstance(found, list) else []


def _quoted(names: list[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)
