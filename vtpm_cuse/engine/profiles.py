"""``--profile ...,remove-disabled``: a profile less what OpenSSL refuses on a FIPS host.

Only the profiles named "custom" and "custom:..." can be changed; any other stays as it is, as in
the C suite. Algorithm and attribute names are those of libtpms' profiles.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vtpm_cuse.engine.base import InfoFlag

if TYPE_CHECKING:
    from vtpm_cuse.config import ProfileConfig
    from vtpm_cuse.engine.base import Engine

_FIPS_MODE: Final = Path("/proc/sys/crypto/fips_enabled")

_REFUSED: Final = frozenset({"tdes", "tdes-min-size", "rsaes", "camellia", "camellia-min-size"})
_REFUSED_CURVES: Final = frozenset({"ecc-nist-p192"})
_LEAST: Final = {"rsa": ("rsa-min-size", 2048), "ecc": ("ecc-min-size", 224)}
_ATTRIBUTES: Final = ("no-sha1-signing", "no-sha1-verification", "no-unpadded-encryption")
_DIGITS_MAX: Final = 10  # of a size in bits; what has more is none
_ALL_ATTRIBUTES: Final = "fips-host"


def profile_text(config: ProfileConfig, engine: Engine) -> str:
    """The profile to give to *engine*: as configured, less what is to be removed."""
    wanted = config.remove_disabled
    # PEER: "check" tries each algorithm out. OpenSSL refuses them in FIPS mode, which is asked here.
    if wanted is None or (wanted == "check" and not _fips_mode()):
        return config.text
    try:
        profile = json.loads(config.text)
    except (ValueError, RecursionError):
        return config.text  # libtpms will say so
    if not isinstance(profile, dict) or str(profile.get("Name")).partition(":")[0] != "custom":
        return config.text
    algorithms = profile.get("Algorithms") or _default_algorithms(engine)
    profile["Algorithms"] = ",".join(_allowed(str(algorithms).split(",")))
    attributes = [name for name in str(profile.get("Attributes", "")).split(",") if name]
    if _ALL_ATTRIBUTES not in attributes:
        attributes = [name for name in attributes if name not in _ATTRIBUTES] + [*_ATTRIBUTES]
    profile["Attributes"] = ",".join(attributes)
    return json.dumps(profile, separators=(",", ":"))


def _fips_mode() -> bool:
    try:
        return _FIPS_MODE.read_text().strip() == "1"
    except OSError:
        return False


def _default_algorithms(engine: Engine) -> str:
    # Any: JSON whose shape is libtpms' to choose.
    found: dict[str, Any] = json.loads(engine.info(InfoFlag.AVAILABLE_PROFILES))
    by_name = {profile["Name"]: profile for profile in found["AvailableProfiles"]}
    return str(by_name["custom"]["Algorithms"])


def _allowed(algorithms: list[str]) -> list[str]:
    """What a FIPS host can do of *algorithms*, with the key sizes it asks for."""
    values = dict(name.strip().partition("=")[::2] for name in algorithms)
    for name in _REFUSED | _REFUSED_CURVES:
        values.pop(name, None)
    for family, (name, least) in _LEAST.items():
        if family in values:
            given = values.get(name, "")
            is_size = given.isdecimal() and len(given) < _DIGITS_MAX
            values[name] = str(max(least, int(given) if is_size else 0))
    return [f"{name}={value}" if value else name for name, value in values.items()]
