"""A private TPM as a file in a FUSE mount: it does what one on sockets does."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING, Literal

import pytest

from tests.support.commands import code_of, get_random, pcr_extend, tpm12_pcr_extend
from tests.support.fuse import mounts, needs_fuse
from tests.support.private import runtime_folder
from vtpm_cuse.errors import LabError
from vtpm_cuse.lab.device import DeviceTpm
from vtpm_cuse.lab.tpm import Tpm

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(autouse=True)
def _place(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In the end nothing is left in it."""
    needs_fuse()
    with runtime_folder() as runtime:
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
        yield
        assert str(runtime) not in str(mounts())


@pytest.mark.parametrize("version", ["2.0", "1.2"])
def test_it_goes_back_in_time(version: Literal["2.0", "1.2"]) -> None:
    extend = pcr_extend(3, b"x" * 32) if version == "2.0" else tpm12_pcr_extend(3, b"x" * 20)
    with DeviceTpm(version=version) as tpm:
        before = tpm.snapshot()
        blank = tpm.pcr(3)
        assert code_of(tpm.command(extend)) == 0
        extended, after = tpm.pcr(3), tpm.snapshot()
        assert extended != blank
        tpm.rewind(before)
        assert tpm.pcr(3) == blank
        tpm.rewind(after)
        assert tpm.pcr(3) == extended
        tpm.power_cycle()
        assert tpm.pcr(3) == blank
        tpm.command(extend)
        tpm.reset()
        assert tpm.pcr(3) == blank
    with DeviceTpm(snapshot=after) as tpm:
        assert tpm.pcr(3) == extended
    with Tpm(snapshot=after) as tpm:
        assert tpm.pcr(3) == extended


def test_files_are_found_by_the_environment() -> None:
    with DeviceTpm() as tpm:
        device, raw = tpm.env["VTPM_DEVICE"], tpm.env["VTPM_RAW_DEVICE"]
        assert (device, raw) == (tpm.path, tpm.raw_path)
        assert device != raw
        assert tpm.env["TPM2TOOLS_TCTI"] == tpm.tcti == f"device:{device}"
        assert {os.stat(path).st_mode & 0o777 for path in (device, raw)} == {0o600}
        tool = ["tpm2_getrandom", "--hex", "8"]
        subprocess.run(tool, env={**os.environ, **tpm.env}, check=True, capture_output=True)
        with open(raw, "r+b", buffering=0), pytest.raises(LabError, match="busy"):
            tpm.snapshot()
        assert tpm.clients == 0
    with pytest.raises(LabError, match="is not running"):
        _ = tpm.path


def test_its_state_is_kept(tmp_path: Path) -> None:
    with DeviceTpm(state=tmp_path / "state") as tpm:
        tool = ["tpm2_nvdefine", "-Q", "-C", "o", "-s", "4", "0x1500016"]
        subprocess.run(tool, env={**os.environ, **tpm.env}, check=True)
    with Tpm(state=tmp_path / "state") as same:
        tool = ["tpm2_nvreadpublic", "0x1500016"]
        subprocess.run(tool, env={**os.environ, **same.env}, check=True, capture_output=True)


def test_what_it_has_not() -> None:
    with pytest.raises(LabError, match="a device has none"):
        DeviceTpm(faults=True).start()
    with pytest.raises(LabError, match="leave out trace or capture"):
        DeviceTpm(trace=1, capture=1)


def test_one_that_was_killed_says_so() -> None:
    with DeviceTpm() as tpm:
        os.kill(tpm.pid, 9)
        with pytest.raises(LabError, match="signal 9"):
            tpm.command(get_random(8))
        assert not tpm.alive
        assert tpm.ending == "signal 9"
