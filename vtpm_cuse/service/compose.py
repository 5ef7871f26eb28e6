"""From configuration to a vTPM: the one place that makes engines and gives a store its keys."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, cast

from vtpm_cuse.engine.callbacks import uninterrupted
from vtpm_cuse.engine.libtpms import LibtpmsEngine, supported_versions
from vtpm_cuse.errors import TpmUnavailable, UsageError
from vtpm_cuse.service.keys import open_key
from vtpm_cuse.service.process import logs
from vtpm_cuse.storage.memory import MemoryStore
from vtpm_cuse.storage.reserve import Reserve
from vtpm_cuse.storage.sealed import SealedStore
from vtpm_cuse.storage.stores import open_store
from vtpm_cuse.vtpm.vtpm import Vtpm, VtpmOptions
from vtpm_cuse.wire.ptm import PtmResult
from vtpm_cuse.wire.tpm import TpmSu

if TYPE_CHECKING:
    from vtpm_cuse.config import ChipConfig, KeySource, VtpmConfig
    from vtpm_cuse.engine.base import Engine
    from vtpm_cuse.storage.base import StateStore
    from vtpm_cuse.storage.keys import Key

__all__ = [
    *("bare_engine", "make_vtpm", "make_vtpm_in_memory", "make_vtpm_on", "power_on"),
    "supported_versions",
]

log = logging.getLogger(__name__)

_STARTUP_KINDS = {
    False: {
        "clear": TpmSu.TPM_ST_CLEAR,
        "state": TpmSu.TPM_ST_STATE,
        "deactivated": TpmSu.TPM_ST_DEACTIVATED,
    },
    True: {"clear": TpmSu.TPM_SU_CLEAR, "state": TpmSu.TPM_SU_STATE},
}


def make_vtpm(config: VtpmConfig, chip_fd: int | None = None) -> Vtpm:
    """A stopped vTPM; of its state nothing is read, written or locked yet.

    Without a state location it can be made, but not started. Of a chip, *chip_fd* is its device.

    Raises:
        EngineUnavailable: libtpms is missing or cannot be what is asked for.
        UsageError: The configuration cannot hold.
    """
    if config.chip is not None and chip_fd is not None:
        return _make_borrowed(config, config.chip, chip_fd)
    return _make_vtpm(config, _make_store(config))


def _make_borrowed(config: VtpmConfig, chip: ChipConfig, fd: int) -> Vtpm:
    from vtpm_cuse.engine.chip import Chip
    from vtpm_cuse.vtpm.borrowed import Borrowed

    borrowed = Borrowed(chip.flush_all, chip.below_manager)
    options = VtpmOptions(limits=config.limits, borrowed=borrowed)
    return Vtpm(_recorded(Chip(fd, chip.path), config), None, options)


def make_vtpm_in_memory(config: VtpmConfig, blobs: dict[str, bytes]) -> tuple[Vtpm, SealedStore]:
    """As `make_vtpm`, and where its state is: in *blobs*, header and all, by name."""
    memory = MemoryStore()
    memory.blobs = blobs
    store = SealedStore(memory, _key(config.key), _key(config.migration_key))
    return _make_vtpm(config, store), store


def make_vtpm_on(config: VtpmConfig, blobs: StateStore) -> Vtpm:
    """As `make_vtpm`, with its state in *blobs*, whose keeper has the keys, and descriptors."""
    return _make_vtpm(config, SealedStore(blobs))


def _make_vtpm(config: VtpmConfig, store: SealedStore | None) -> Vtpm:
    engine = _make_engine(config, store or SealedStore(MemoryStore()))
    if debug := logs.engine_debug():
        engine.set_debug(debug.fd, debug.level, debug.prefix)
    if config.profile is not None and config.tpm2 and not engine.has_profiles:
        raise UsageError(
            "Error: This libtpms has no profiles", hint="use libtpms 0.10 or newer, or no --profile"
        )
    options = VtpmOptions(
        auto_shutdown=config.startup.auto_shutdown,
        reject_locality_4=config.locality.reject_locality_4,
        allow_set_locality=config.locality.allow_set_locality,
        incoming=config.incoming,
        release_outgoing=config.release_outgoing,
        profile=_profile(config, engine),
        limits=config.limits,
    )
    return Vtpm(engine, store, options)


def bare_engine(*, tpm2: bool) -> Engine:
    """An engine without a TPM's state, to be asked what it can do.

    Raises:
        EngineUnavailable: libtpms is missing or cannot be such a TPM.
    """
    return LibtpmsEngine(tpm2=tpm2, nvram=MemoryStore())


def _make_engine(config: VtpmConfig, nvram: SealedStore) -> Engine:
    return _recorded(LibtpmsEngine(tpm2=config.tpm2, nvram=nvram), config)


def _recorded(engine: Engine, config: VtpmConfig) -> Engine:
    if config.pcap is None:
        return engine
    from vtpm_cuse.engine.recorded import RecordedTpm

    return cast("Engine", RecordedTpm(engine, config.pcap))  # it has all that the engine has


def _profile(config: VtpmConfig, engine: Engine) -> str | None:
    if config.profile is None or not config.tpm2:
        return None
    from vtpm_cuse.engine.profiles import check_profile, profile_text

    check_profile(config.profile.text, engine)
    return profile_text(config.profile, engine)


def _make_store(config: VtpmConfig) -> SealedStore | None:
    # Keys come first: a wrong one is an error even where there is nothing to encrypt.
    key, migration_key = _key(config.key), _key(config.migration_key)
    if (state := config.state) is None:
        return None
    blobs = open_store(
        state.uri,
        tpm2=config.tpm2,
        mode=state.mode,
        lock=state.lock,
        fsync=state.fsync,
        backup=state.backup,
    )
    return SealedStore(blobs, key, migration_key, reserve=Reserve())


def _key(source: KeySource | None) -> Key | None:
    return None if source is None else open_key(source)


def power_on(vtpm: Vtpm, config: VtpmConfig) -> bool:
    """Starts the TPM if the flags say so; returns False when there is nothing to serve.

    Raises:
        TpmUnavailable: The TPM could not be started.
    """
    kind = config.startup.startup
    if kind == "deactivated" and config.tpm2:
        log.error("TPM 2 does not support startup deactivated.")
        return False
    if config.startup.not_need_init:
        vtpm.start()
        if kind in _STARTUP_KINDS[config.tpm2]:
            with uninterrupted():
                vtpm.startup(_STARTUP_KINDS[config.tpm2][kind])
        if vtpm.state_lost:
            raise TpmUnavailable(PtmResult.TPM_FAIL, "The state is another process'")
    return True
