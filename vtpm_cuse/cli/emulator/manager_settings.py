"""From a command line to the configuration of a resource manager for a TPM that is not ours."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vtpm_cuse.acquire.chip import is_below_manager
from vtpm_cuse.cli.emulator import addresses, settings
from vtpm_cuse.config import (
    ChipConfig,
    CuseConfig,
    FuseConfig,
    SocketConfig,
    StartupConfig,
    VtpmConfig,
)
from vtpm_cuse.storage.locations import absolute_path

if TYPE_CHECKING:
    from vtpm_cuse.cli.words.commandline import CommandLine


def manager_config(line: CommandLine) -> SocketConfig | FuseConfig | CuseConfig:
    """All of ``swtpm resource-manager``. Raises UsageError."""
    vtpm = VtpmConfig(
        tpm2=True,
        startup=StartupConfig(not_need_init=True),
        pcap=settings.pcap_config(line),
        chip=_chip_config(line),
        limits=settings.managed_limits(line),
    )
    process = settings.process_config(line, background=line.has("daemon"))
    managed = addresses.managed_channel(line, vtpm)
    if (managed is None) != line.has("name"):
        raise line.error(
            "Error: Where are clients to come? Give one of --name NAME, --name NAME --mount DIR, "
            "--managed type=..."
        )
    if managed is not None:
        if line.has("mount"):
            raise line.error("Error: --mount is for the file that --name names")
        control, control_terminate = addresses.control_channel(line)
        return SocketConfig(
            vtpm=vtpm,
            control=addresses.passed(line, "ctrl", control),
            managed=managed,
            control_terminate=control_terminate,
            process=process,
        )
    if line.has("ctrl"):
        raise line.error("Error: --ctrl is for the clients of --managed")
    mount = line.value("mount")
    if mount is None:
        return CuseConfig(name=settings.device_name(line), vtpm=vtpm, process=process)
    return FuseConfig(
        name=settings.file_name(line),
        mount=absolute_path(mount),
        vtpm=vtpm,
        allow_other=line.has("allow-other"),
        process=process,
    )


def _chip_config(line: CommandLine) -> ChipConfig:
    path = line.value("tpm")
    if not path:
        raise line.error("Error: Which TPM? Give --tpm DEVICE, such as /dev/tpm0")
    return ChipConfig(
        path=absolute_path(path),
        below_manager=is_below_manager(path),
        exclusive=line.has("exclusive"),
        flush_all=line.has("flush-all"),
    )
