"""A state that this libtpms is too old for is told from a damaged one, and its backup left alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.engine import FakeEngine
from tests.support.vectors import STATE
from vtpm_cuse.engine.profiles import check_profile
from vtpm_cuse.errors import EngineError, PtmError, TpmUnavailable, UsageError
from vtpm_cuse.storage.directory import DirectoryStore
from vtpm_cuse.storage.sealed import SealedStore
from vtpm_cuse.vtpm.vtpm import Vtpm
from vtpm_cuse.wire.profile import StoredProfile, stored_profile_untrusted
from vtpm_cuse.wire.ptm import PtmBlobType

if TYPE_CHECKING:
    from pathlib import Path

PROFILED = (STATE / "v0.10.2-tpm2-setup/tpm2-00.permall").read_bytes()
PLAIN = (STATE / "v0.10.2-tpm2-dir-plain/tpm2-00.permall").read_bytes()
PAYLOAD = 16
"""Where libtpms' own begins in such a file."""
LEVEL = b'"StateFormatLevel":7'


def at_level(level: int) -> bytes:
    """No length changes: the text goes over what follows it."""
    text = b'"StateFormatLevel":%d' % level
    at = PROFILED.index(LEVEL)
    return PROFILED[:at] + text + b"," + PROFILED[at + len(text) + 1 :]


@dataclass
class Refusing(FakeEngine):
    """Reads the state, and does not start from it."""

    version: tuple[int, int, int] = (0, 9, 2)
    attempts: int = 0

    def start(self) -> None:
        assert self.nvram is not None
        self.nvram.load("permall")
        self.attempts += 1
        raise EngineError("TPMLIB_MainInit", 0x101)


def refusal(folder: Path, state: bytes, version: tuple[int, int, int]) -> tuple[str, int]:
    """What is said, and how many states were tried, of which one is a backup."""
    (folder / "tpm2-00.permall").write_bytes(state)
    (folder / "tpm2-00.permall.bak").write_bytes(state[:-1] + b"\0")
    store = SealedStore(DirectoryStore(str(folder), tpm2=True, backup=True))
    engine = Refusing(nvram=store, version=version)
    with pytest.raises(TpmUnavailable) as caught:
        Vtpm(engine, store).start()
    assert (folder / "tpm2-00.permall").read_bytes() == state
    return str(caught.value), engine.attempts


@pytest.mark.parametrize(
    ("level", "version", "cure"),
    [
        (7, (0, 9, 2), "install libtpms 0.10 or newer"),
        (8, (0, 10, 2), "install libtpms 0.11 or newer"),
        (9, (0, 11, 0), "install a newer libtpms"),
    ],
)
def test_what_is_missing_is_said(
    tmp_path: Path, level: int, version: tuple[int, int, int], cure: str
) -> None:
    said, attempts = refusal(tmp_path, at_level(level), version)
    number = ".".join(map(str, version))
    assert f"has StateFormatLevel {level}, which libtpms {number} does not read" in said
    assert said.endswith(cure)
    assert attempts == 1


def test_it_is_said_of_a_state_that_comes_from_another_host(tmp_path: Path) -> None:
    store = SealedStore(DirectoryStore(str(tmp_path), tpm2=True))
    engine = Refusing(nvram=store, version=(0, 10, 2))
    engine.faults["set_state"] = EngineError("TPMLIB_SetState", 0x2E)
    flags, blob = store.to_migration(at_level(8)[PAYLOAD:], decrypted=False)
    with pytest.raises(PtmError, match=r"StateFormatLevel 8, .* 0\.10\.2 does not read") as caught:
        Vtpm(engine, store).import_blob(PtmBlobType.PTM_BLOB_TYPE_PERMANENT, flags, blob)
    assert caught.value.result == 0x2E


@pytest.mark.parametrize(("state", "version"), [(PROFILED, (0, 10, 0)), (PLAIN, (0, 9, 2))])
def test_any_other_is_damaged(tmp_path: Path, state: bytes, version: tuple[int, int, int]) -> None:
    said, attempts = refusal(tmp_path, state, version)
    assert "it is damaged, of another TPM" in said
    assert attempts == 2


def test_what_a_state_says_of_its_profile() -> None:
    assert stored_profile_untrusted(PROFILED[PAYLOAD:]) == StoredProfile("default-v1", 7)
    assert stored_profile_untrusted(PLAIN[PAYLOAD:]) is None


@given(st.binary(max_size=80), st.integers(0, 60))
def test_any_other_bytes_say_something_or_nothing(noise: bytes, at: int) -> None:
    payload = PROFILED[PAYLOAD : PAYLOAD + at] + noise
    found = stored_profile_untrusted(payload)
    assert found is None or found.level >= 0


PROFILES = {"AvailableProfiles": [{"Name": "default-v1"}, {"Name": "null"}, {"Name": "custom"}]}


@pytest.mark.parametrize(
    ("profile", "said"),
    [
        (
            '{"Name":"default-v2"}',
            "Error: libtpms 0.10.2 has no profile 'default-v2'; it has default-v1, null, custom; a "
            "newer libtpms may have more",
        ),
        (
            '{"Name":"custom:x","StateFormatLevel":8}',
            "Error: The profile 'custom:x' has StateFormatLevel 8, libtpms 0.10.2 has those up to "
            "7; install libtpms 0.11 or newer",
        ),
        ('{"Name":"default-v1"}', ""),
        ('{"Name":"custom","StateFormatLevel":7}', ""),
        ('{"Name":7}', ""),
        ("[[", ""),
        ("[]", ""),
    ],
)
def test_a_profile_that_is_not_to_be_had(profile: str, said: str) -> None:
    engine = Refusing(version=(0, 10, 2), text=json.dumps(PROFILES))
    if not said:
        check_profile(profile, engine)
        return
    with pytest.raises(UsageError) as caught:
        check_profile(profile, engine)
    assert str(caught.value) == said
