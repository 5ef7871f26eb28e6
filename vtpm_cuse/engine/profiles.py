"""``--profile ...,remove-disabled``: a profile less what OpenSSL refuses on a FIPS host.

Only the profiles named "custom" and "custom:..." can be changed; any other stays as it is, as in
the C suite. Algorithm and attribute names are those of libtpms' profiles.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vtpm_cuse.engine.base import InfoFlag
from vtpm_cuse.errors import UsageError
from vtpm_cuse.wire.profile import STATE_LEVELS, oldest_library

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


def check_profile(text: str, engine: Engine) -> None:
    """Says what *engine* lacks for that profile, as far as can be told before it is given to it.

    Raises:
        UsageError: It has no profile of that name, or no state format of that level.
    """
    try:
        profile = json.loads(text)
    except (ValueError, RecursionError):
        return  # libtpms will say so
    name = profile.get("Name") if isinstance(profile, dict) else None
    if not isinstance(name, str):
        return
    version = ".".join(map(str, engine.version))
    names = _builtin(engine)
    if name not in names and not (name.startswith("custom:") and "custom" in names):
        raise UsageError(
            f"Error: libtpms {version} has no profile '{name}'",
            hint=f"it has {', '.join(names)}; a newer libtpms may have more",
        )
    level, highest = profile.get("StateFormatLevel"), STATE_LEVELS.get(engine.version[:2])
    if isinstance(level, int) and highest is not None and level > highest:
        raise UsageError(
            f"Error: The profile '{name}' has StateFormatLevel {level}, libtpms {version} has "
            f"those up to {highest}",
            hint=f"install {oldest_library(level)}",
        )


def _fips_mode() -> bool:
    try:
        return _FIPS_MODE.read_text().strip() == "1"
    except OSError:
        return False


def _default_algorithms(engine: Engine) -> str:
    return str(_builtin(engine)["custom"]["Algorithms"])


# Any: JSON whose shape is libtpms' to choose.
def _builtin(engine: Engine) -> dict[str, dict[str, Any]]:
    """The library's profiles by their names."""
    found: dict[str, Any] = json.loads(engine.info(InfoFlag.AVAILABLE_PROFILES))
    return {profile["Name"]: profile for profile in found["AvailableProfiles"]}


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
