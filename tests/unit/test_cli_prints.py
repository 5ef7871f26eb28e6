"""The JSON texts of the print options, as management layers read them."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from tests.support.processes import in_child
from vtpm_cuse.cli.emulator import prints
from vtpm_cuse.cli.emulator.swtpm_cuse import PROGRAM
from vtpm_cuse.cli.words.commandline import CommandLine
from vtpm_cuse.service import compose

if TYPE_CHECKING:
    from pathlib import Path

INFO = {
    "TPMFeatures": {"RSAKeySizes": [1024, 2048]},
    "AvailableProfiles": [{"Name": "default-v1"}, {"Name": "null"}],
    "RuntimeAlgorithms": {"CanBeDisabled": "tdes", "Implemented": "rsa,tdes"},
    "RuntimeCommands": {"CanBeDisabled": "0x1", "Implemented": "0x1-0x2"},
}


def text_for(*words: str) -> str:
    text = prints.asked_text(CommandLine(PROGRAM, words))
    assert text is not None
    return text


@pytest.fixture
def libtpms_with_profiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A libtpms as of 0.10."""

    def engine(*, tpm2: bool) -> SimpleNamespace:
        return SimpleNamespace(tpm2=tpm2, has_profiles=True, info=lambda _flags: json.dumps(INFO))

    monkeypatch.setattr(compose, "bare_engine", engine)
    monkeypatch.setattr(compose, "supported_versions", lambda: {"1.2", "2.0"})


def test_nothing_asked() -> None:
    assert prints.asked_text(CommandLine(PROGRAM, [])) is None


@pytest.mark.usefixtures("libtpms_with_profiles")
def test_capabilities_with_profiles() -> None:
    text = text_for("--print-capabilities", "--tpm2")
    assert text.startswith('{ "type": "swtpm", "features": [ "tpm-1.2", "tpm-2.0", "flags-opt-')
    assert '"rsa-keysize-1024", "rsa-keysize-2048", "cmdarg-profile", ' in text
    assert text.endswith(
        '"profiles": { "names": [ "default-v1", "null" ], "algorithms": { "canbedisabled": "tdes",'
        ' "implemented": "rsa,tdes" }, "commands": { "canbedisabled": "0x1", "implemented": '
        '"0x1-0x2" } }, "version": "0.10.2" }\n'
    )


@pytest.mark.usefixtures("libtpms_with_profiles")
@pytest.mark.parametrize("verb", ["cmdarg-migration", "ctrl-opt-terminate", "cmdarg-chroot"])
def test_capabilities_of_the_device_are_those_of_sockets(verb: str) -> None:
    """As in the C suite, whose callers ask any interface."""
    assert f'"{verb}"' in text_for("--print-capabilities")


@pytest.mark.usefixtures("libtpms_with_profiles")
def test_profiles() -> None:
    assert text_for("--print-profiles", "--tpm2") == json.dumps(INFO)
    assert text_for("--print-profiles") == "{}"


@in_child
def test_capabilities_promise_only_what_works() -> None:
    found = json.loads(text_for("--print-capabilities"))
    assert found["type"] == "swtpm"
    assert found["profiles"] == {}
    assert {"tpm-1.2", "tpm-2.0", "nvram-backend-dir"} <= set(found["features"])
    assert not {"tpm-send-command-header", "rsa-keysize-2048"} & set(found["features"])
    sizes = json.loads(text_for("--print-capabilities", "--tpm2"))["features"]
    assert "rsa-keysize-2048" in sizes


@in_child
def test_info() -> None:
    text = prints.info(3, tpm2=True)
    assert text.endswith("}\n")
    assert json.loads(text)["TPMSpecification"]["family"] == "2.0"
    assert set(json.loads(prints.info(3, tpm2=False))) == {"TPMSpecification", "TPMAttributes"}


def test_states_of_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody names a place, those of the TPM that is in the place for it."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.delenv("TPM_PATH", raising=False)
    place = tmp_path / "vtpm-cuse/x"
    place.mkdir(parents=True)
    for name in ("tpm2-00.permall", "tpm-00.permall"):
        (place / name).write_bytes(b"12345")
        assert '"size": 5' in text_for("--print-states", "-n", "x")
        (place / name).unlink()
    assert "size" not in text_for("--print-states", "-n", "x")
