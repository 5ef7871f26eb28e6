"""--profile on both engines: libtpms 0.9 refuses, 0.10 makes what is asked for, once."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.support import commands as tpm
from tests.support.processes import in_child
from tests.support.stores import FailingStore
from vtpm_cuse.config import ProfileConfig, StateConfig, VtpmConfig
from vtpm_cuse.engine import profiles
from vtpm_cuse.engine.libtpms import LibtpmsEngine
from vtpm_cuse.errors import StorageError, TpmUnavailable, UsageError
from vtpm_cuse.service.compose import make_vtpm
from vtpm_cuse.storage.sealed import SealedStore
from vtpm_cuse.vtpm.vtpm import Vtpm, VtpmOptions

if TYPE_CHECKING:
    from pathlib import Path

ACTIVE_PROFILE = 0x20
V1 = '{"Name":"default-v1"}'


def engine(*, tpm2: bool = True) -> LibtpmsEngine:
    return LibtpmsEngine(tpm2=tpm2, nvram=SealedStore(FailingStore()))


def need_profiles(*, wanted: bool) -> None:
    if engine().has_profiles is not wanted:
        pytest.skip(f"this libtpms has {'no ' if wanted else ''}profiles")


def made(folder: Path, profile: str | None, how: str | None = None, *, tpm2: bool = True) -> Vtpm:
    given = None if profile is None else ProfileConfig(profile, how)
    return make_vtpm(VtpmConfig(tpm2=tpm2, state=StateConfig(f"dir://{folder}"), profile=given))


def active(vtpm: Vtpm) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(vtpm.info(ACTIVE_PROFILE))
    return dict(found["ActiveProfile"])


@in_child
def test_refused_where_there_are_none(tmp_path: Path) -> None:
    need_profiles(wanted=False)
    with pytest.raises(UsageError, match="no profiles"):
        made(tmp_path, V1)
    assert list(tmp_path.iterdir()) == []
    made(tmp_path, None).start()


@in_child
def test_unused_for_tpm12(tmp_path: Path) -> None:
    vtpm = made(tmp_path, V1, tpm2=False)
    vtpm.start()
    vtpm.close()


@in_child
def test_a_new_tpm_gets_the_null_profile(tmp_path: Path) -> None:
    need_profiles(wanted=True)
    vtpm = made(tmp_path, None)
    vtpm.start()
    assert active(vtpm)["Name"] == "null"
    assert active(vtpm)["StateFormatLevel"] == 1
    vtpm.close()


@pytest.mark.parametrize(
    ("profile", "name", "least_level"),
    [(V1, "default-v1", 7), ('{"Name":"custom"}', "custom", 2), ('{"Name":"null"}', "null", 1)],
)
@in_child
def test_a_new_tpm_gets_its_profile_and_keeps_it(
    tmp_path: Path, profile: str, name: str, least_level: int
) -> None:
    need_profiles(wanted=True)
    vtpm = made(tmp_path, profile)
    vtpm.start()
    assert active(vtpm)["Name"] == name
    assert active(vtpm)["StateFormatLevel"] >= least_level
    vtpm.start()  # a reset, for which the profile must not be given again
    assert active(vtpm)["Name"] == name
    vtpm.close()
    vtpm = made(tmp_path, None)
    vtpm.start()
    assert active(vtpm)["Name"] == name
    vtpm.close()


@in_child
def test_custom_profile_takes_an_algorithm_away(tmp_path: Path) -> None:
    need_profiles(wanted=True)
    everything = profiles._default_algorithms(engine())
    less = everything.replace("camellia,camellia-min-size=128,", "")
    test_camellia = tpm.tpm2(0x18A, bytes.fromhex("0025002600800043"))
    for number, (algorithms, usable) in enumerate([(everything, True), (less, False)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        vtpm = made(folder, json.dumps({"Name": "custom", "Algorithms": algorithms}))
        vtpm.start()
        vtpm.process(tpm.TPM2_STARTUP_CLEAR)
        assert (tpm.code_of(vtpm.process(test_camellia)) == 0) is usable
        vtpm.close()


@in_child
def test_existing_tpm_refuses_a_profile_and_is_not_touched(tmp_path: Path) -> None:
    need_profiles(wanted=True)
    vtpm = made(tmp_path, None)
    vtpm.start()
    vtpm.close()
    state = tmp_path / "tpm2-00.permall"
    before = state.read_bytes()
    vtpm = made(tmp_path, V1)
    with pytest.raises(TpmUnavailable, match="existing TPM 2") as caught:
        vtpm.start()
    assert caught.value.result == 9
    vtpm.close()
    assert state.read_bytes() == before
    vtpm = made(tmp_path, None)
    vtpm.start()
    vtpm.close()


@pytest.mark.parametrize("profile", ['{"Name":"nonsense"}', "{}", "nonsense", ""])
@in_child
def test_bad_profile_makes_no_tpm(tmp_path: Path, profile: str) -> None:
    need_profiles(wanted=True)
    with pytest.raises((TpmUnavailable, UsageError)):
        made(tmp_path, profile).start()
    assert not (tmp_path / "tpm2-00.permall").exists()


@in_child
def test_profile_waits_for_the_first_start_that_succeeds() -> None:
    need_profiles(wanted=True)
    store = FailingStore()
    sealed = SealedStore(store)
    vtpm = Vtpm(LibtpmsEngine(tpm2=True, nvram=sealed), sealed, VtpmOptions(profile=V1))
    store.faults["store"] = StorageError("x", "disk full")
    with pytest.raises(TpmUnavailable):
        vtpm.start()
    store.faults.clear()
    vtpm.start()
    assert active(vtpm)["Name"] == "default-v1"


# -- remove-disabled ----------------------------------------------------------------------


@pytest.fixture
def fips_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that says whether the kernel is in FIPS mode: it is not."""
    path = tmp_path / "fips_enabled"
    path.write_text("0\n")
    monkeypatch.setattr(profiles, "_FIPS_MODE", path)
    return path


CUSTOM = {
    "Name": "custom",
    "Algorithms": "rsa,rsa-min-size=1024,tdes,tdes-min-size=128,rsaes,ecc,ecc-min-size=256,aes",
    "Attributes": "pct,no-sha1-signing",
}


def changed(profile: dict[str, str], how: str) -> dict[str, str]:
    text = profiles.profile_text(ProfileConfig(json.dumps(profile), how), engine())
    found: dict[str, str] = json.loads(text)
    return found


@in_child
def test_what_a_fips_host_refuses_is_taken_out() -> None:
    assert changed(CUSTOM, "fips-host") == {
        "Name": "custom",
        "Algorithms": "rsa,rsa-min-size=2048,ecc,ecc-min-size=256,aes",
        "Attributes": "pct,no-sha1-signing,no-sha1-verification,no-unpadded-encryption",
    }
    assert changed({**CUSTOM, "Attributes": "fips-host"}, "fips-host")["Attributes"] == "fips-host"
    endless = {**CUSTOM, "Algorithms": f"rsa,rsa-min-size={'9' * 5000}"}
    assert changed(endless, "fips-host")["Algorithms"] == "rsa,rsa-min-size=2048"


@pytest.mark.usefixtures("fips_mode")
@in_child
def test_check_takes_nothing_out_on_another_host() -> None:
    assert changed(CUSTOM, "check") == CUSTOM


@in_child
def test_check_in_fips_mode(fips_mode: Path) -> None:
    fips_mode.write_text("1\n")
    assert changed(CUSTOM, "check") == changed(CUSTOM, "fips-host")
    fips_mode.unlink()
    assert changed(CUSTOM, "check") == CUSTOM


@pytest.mark.parametrize("name", ["null", "default-v1", "customary"])
@in_child
def test_other_profiles_stay(name: str) -> None:
    profile = {**CUSTOM, "Name": name}
    assert changed(profile, "fips-host") == profile


@pytest.mark.parametrize("text", ["nonsense", "[]", "7", "[" * 60000], ids=len)
@in_child
def test_rubbish_is_left_to_libtpms(text: str) -> None:
    assert profiles.profile_text(ProfileConfig(text, "fips-host"), engine()) == text
