"""``--print-capabilities`` and its like: facts as JSON text, spaced as the C suite spaces it.

Test suites and management layers compare these texts literally.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from vtpm_cuse import PEER_VERSION
from vtpm_cuse.cli.emulator import settings
from vtpm_cuse.config import Exits
from vtpm_cuse.errors import TpmUnavailable, UsageError
from vtpm_cuse.service.confine.privileges import become

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vtpm_cuse.cli.words.commandline import CommandLine
    from vtpm_cuse.cli.words.table import Program
    from vtpm_cuse.config import ProcessConfig, VtpmConfig
    from vtpm_cuse.engine.base import Engine

_VERBS: Final = (
    ("tpm-send-command-header", "fd", ""),  # a stream can be handed over, and headers with it
    ("flags-opt-startup", "flags", "startup-clear"),
    ("flags-opt-disable-auto-shutdown", "flags", "disable-auto-shutdown"),
    ("ctrl-opt-terminate", "flags", ""),  # libvirt asks any interface, for that of sockets
    ("cmdarg-seccomp", "seccomp", ""),
    ("cmdarg-key-fd", "key", "fd"),
    ("cmdarg-pwd-fd", "key", "pwdfd"),
    ("cmdarg-print-states", "print-states", ""),
    ("cmdarg-chroot", "chroot", ""),
    ("cmdarg-migration", "migration", ""),
)
"""Verb, and the option and sub-option that must be available for it.

PEER: lists all of them always. We promise what the program can do today.
"""

_BACKENDS: Final = ("dir", "file")
"""Of the schemes that `storage.stores.open_store` knows, those that the C suite has, too."""


_ASKING: Final = ("print-capabilities", "print-states", "print-profiles")


def asked_text(line: CommandLine) -> str | None:
    """What the print options that need no TPM ask for; None if none was given.

    Raises:
        VtpmError: There is no libtpms, no state location, or the state cannot be looked at.
    """
    if any(line.has(option) for option in _ASKING) or line.number("print-info", 0xFFFF_FFFF):
        become(settings.user(line), Exits())
    if line.has("print-capabilities"):
        return _capabilities(line)
    if line.has("print-states"):
        return _states(line)
    if line.has("print-profiles"):
        from vtpm_cuse.engine.base import InfoFlag
        from vtpm_cuse.service.compose import bare_engine

        engine = bare_engine(tpm2=settings.is_tpm2(line))
        if not engine.tpm2 or not engine.has_profiles:
            return "{}"
        return engine.info(InfoFlag.AVAILABLE_PROFILES)
    return None


def info(flags: int, *, tpm2: bool) -> str:
    """``--print-info``, of a TPM that is off. Raises EngineUnavailable."""
    from vtpm_cuse.service.compose import bare_engine

    return bare_engine(tpm2=tpm2).info(flags) + "\n"


def info_of_state(flags: int, config: VtpmConfig, process: ProcessConfig) -> str | None:
    """``--print-info``. With a state location of the TPM there, which is made if there is none.

    From then on this process is in the sandbox. None after an error that was said already.

    Raises:
        VtpmError: There is no such TPM to be had.
    """
    if config.state is None or config.state.own_place:
        return info(flags, tpm2=config.tpm2)
    from vtpm_cuse.service.compose import make_vtpm
    from vtpm_cuse.service.confine import sandbox, seccomp

    vtpm = make_vtpm(config)
    try:
        rules = seccomp.make_filter(process.seccomp, sockets=False)
        sandbox.enter(process, config.state, rules, sandbox.no_thread)
        vtpm.start()
        return vtpm.info(flags) + "\n"
    except TpmUnavailable:
        return None
    finally:
        vtpm.close()


def _states(line: CommandLine) -> str:
    """Takes no lock: works while another process serves the state."""
    from vtpm_cuse.storage.stores import open_store

    state = settings.state_config(line)
    if state is None:
        raise UsageError("Error: --tpmstate option is required for --print-states")
    sizes = open_store(state.uri, tpm2=settings.is_tpm2_in(state, line), lock=False).sizes()
    found = ", ".join(f'{{"name": "{name}", "size": {size}}}' for name, size in sizes.items())
    return f'{{ "type": "swtpm", "states": [{f" {found} " if found else ""}] }}'


def _capabilities(line: CommandLine) -> str:
    from vtpm_cuse.service.compose import bare_engine

    engine = bare_engine(tpm2=settings.is_tpm2(line))
    features = ", ".join(f'"{verb}"' for verb in _verbs(line.program, engine))
    profiles = _profiles(engine) if engine.tpm2 and engine.has_profiles else {}
    return (
        f'{{ "type": "swtpm", "features": [ {features} ], '
        f'"profiles": {_spaced(profiles)}, "version": "{PEER_VERSION}" }}\n'
    )


def _verbs(program: Program, engine: Engine) -> Iterator[str]:
    from vtpm_cuse.engine.base import rsa_key_sizes
    from vtpm_cuse.service.compose import supported_versions

    for version in sorted(supported_versions()):
        yield f"tpm-{version}"
    options = {option.name: option for option in program.options}
    for verb, name, sub_name in _VERBS:
        option = options.get(name)
        if option and option.offers(sub_name):
            yield verb
    for backend in _BACKENDS:
        yield f"nvram-backend-{backend}"
    if engine.tpm2:
        for size in rsa_key_sizes(engine):
            yield f"rsa-keysize-{size}"
        if engine.has_profiles:
            yield from ("cmdarg-profile", "cmdarg-print-profiles", "profile-opt-remove-disabled")
    yield from ("cmdarg-print-info", "tpmstate-opt-lock")
    yield from ("tpmstate-dir-backend-opt-backup", "tpmstate-dir-backend-opt-fsync")
    yield from ("cmdarg-pcap", "systemd-notify")


# Any: JSON whose shape is libtpms' to choose.
def _profiles(engine: Engine) -> dict[str, Any]:
    from vtpm_cuse.engine.base import InfoFlag

    flags = InfoFlag.AVAILABLE_PROFILES | InfoFlag.ALGORITHMS | InfoFlag.COMMANDS
    found = json.loads(engine.info(flags))

    def described(part: str) -> dict[str, str]:
        return {
            "canbedisabled": found[part]["CanBeDisabled"],
            "implemented": found[part]["Implemented"],
        }

    return {
        "names": [profile["Name"] for profile in found["AvailableProfiles"]],
        "algorithms": described("RuntimeAlgorithms"),
        "commands": described("RuntimeCommands"),
    }


def _spaced(value: dict[str, Any] | list[str] | str) -> str:
    """JSON with a blank inside each brace and bracket."""
    if isinstance(value, dict):
        inner = ", ".join(f"{json.dumps(name)}: {_spaced(part)}" for name, part in value.items())
        return f"{{ {inner} }}" if inner else "{ }"
    if isinstance(value, list):
        return f"[ {', '.join(_spaced(part) for part in value)} ]"
    return json.dumps(value)
