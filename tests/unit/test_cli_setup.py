"""swtpm_setup's options, configuration and profiles, without a TPM."""

from __future__ import annotations

import io
import json
import os
import sys
from typing import TYPE_CHECKING

import pytest

from vtpm_cuse.ca.certificates import Maker, TpmSpecification
from vtpm_cuse.cli.setup import profiles as setup_profiles
from vtpm_cuse.cli.setup import settings as setup_settings
from vtpm_cuse.cli.setup.swtpm_setup import PROGRAM
from vtpm_cuse.cli.words.commandline import CommandLine
from vtpm_cuse.cli.words.report import SetupReport
from vtpm_cuse.errors import UsageError
from vtpm_cuse.manufacture.config import Existing
from vtpm_cuse.manufacture.files import ConfigFile
from vtpm_cuse.manufacture.makers import TpmMakers
from vtpm_cuse.manufacture.plan import EccKey, KeyAlgorithm, RsaKey, SetupPlan, TpmFacts

if TYPE_CHECKING:
    from pathlib import Path

URI = "dir:///x"
BUILTIN = frozenset({"default-v1", "null", "custom"})


def line_of(*words: str) -> CommandLine:
    return CommandLine(PROGRAM, words)


def test_a_line_is_written_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CA reports from a thread of its own."""
    written: list[str] = []

    class Output(io.StringIO):
        def write(self, text: str, /) -> int:
            written.append(text)
            return len(text)

    monkeypatch.setattr(sys, "stdout", Output())
    SetupReport().line("done")
    assert written == ["done\n"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--tpm2 --take-ownership", "Taking ownership is not supported for TPM 2."),
        ("--ecc", "--ecc requires --tpm2."),
        ("--create-spk", "--create-spk requires --tpm2."),
        ("--reconfigure", "--reconfigure requires --tpm2."),
        ("--allow-signing", "--allow-signing requires --tpm2."),
        ("--decryption", "--decryption requires --tpm2."),
        ("--pcr-banks sha1", "--pcr-banks requires --tpm2."),
        ("--tpm2 --reconfigure --createek", "Reconfiguration is not supported with creation"),
        ("--tpm2 --reconfigure --create-platform-cert", "Reconfiguration is not supported with"),
        ("--tpm2 --profile a --profile-name b", "Only one of --profile, --profile-name,"),
        ("--profile-name null", "There's no --profile support for TPM 1.2"),
        ("--tpm2 --reconfigure --profile-name null", "Reconfiguration does not accept a (new)"),
        ("--tpm2 --profile-remove-disabled foo", "Unsupported parameter for --profile-remove"),
    ],
)
def test_options_that_do_not_go_together(words: str, message: str) -> None:
    with pytest.raises(UsageError) as info:
        setup_settings.check_options(line_of(*words.split()))
    assert str(info.value).startswith(message)


@pytest.mark.parametrize(
    ("words", "existing"),
    [
        ("", Existing.REFUSE),
        ("--overwrite", Existing.REPLACE),
        ("--not-overwrite --overwrite", Existing.KEEP),
        ("--tpm2 --reconfigure --overwrite", Existing.RECONFIGURE),
    ],
)
def test_what_becomes_of_an_earlier_tpm(words: str, existing: Existing) -> None:
    assert setup_settings.existing(line_of(*words.split())) is existing


@pytest.mark.parametrize(
    ("words", "uri"),
    [
        (["--tpm-state", "/a"], "dir:///a"),
        (["--tpmstate", "dir:///a/../b"], "dir:///b"),
        (["--tpm-state", "/x", "--tpmstate", "file:///b/c"], "file:///b/c"),
    ],
)
def test_state(words: list[str], uri: str) -> None:
    assert setup_settings.state_uri(line_of(*words)) == uri
    with pytest.raises(UsageError, match="--tpm-state must be provided"):
        setup_settings.state_uri(line_of())


def plan_of(
    words: str, settings: dict[str, str] | None = None, makers: TpmMakers | None = None
) -> SetupPlan:
    made = setup_settings.setup_config(
        line_of(*words.split()), ConfigFile(settings or {}), makers or TpmMakers(None), "u", URI
    )
    return made.plan


@pytest.mark.parametrize(
    ("words", "settings", "banks"),
    [
        ("--tpm2", {}, ("sha256",)),
        ("--tpm2", {"active_pcr_banks": "sha1,sha384"}, ("sha1", "sha384")),
        ("--tpm2 --pcr-banks sha1 --pcr-banks sha512,sha1", {}, ("sha1", "sha512", "sha1")),
        ("--tpm2 --pcr-banks -", {"active_pcr_banks": "sha1"}, None),
        ("", {"active_pcr_banks": "sha1"}, None),
    ],
)
def test_banks(words: str, settings: dict[str, str], banks: tuple[str, ...] | None) -> None:
    made = plan_of(words, settings)
    assert made.pcr_banks == banks
    assert not made.create_ek


RSA2048, RSA3072, RSA4096, P256, P384, P521 = KeyAlgorithm


@pytest.mark.parametrize(
    ("words", "settings", "algorithms"),
    [
        ("", {}, (RSA2048, P384)),
        ("", {"rsa_keysize": "3072"}, (RSA3072, P384)),
        ("--rsa-keysize max", {}, (RSA3072, P384)),
        ("--rsa-keysize 2048", {"rsa_keysize": "3072"}, (RSA2048, P384)),
        ("--ek1keyalgo RSA3072 --rsa-keysize foo", {}, (RSA3072, P384)),
        ("--ek1keyalgo ecc_nist_p256 --ek2keyalgo SECP521R1", {}, (P256, P521)),
        ("--ek1keyalgo secp384r1", {}, (P384,)),
        ("--ek2keyalgo rsa2048", {"ek1keyalgo": "ecc_nist_p521"}, (P521, RSA2048)),
        ("--ek1keyalgo rsa2048", {"ek1keyalgo": "foo"}, (RSA2048, P384)),
        ("--create-spk", {"ek2keyalgo": "rsa2048"}, (RSA2048,)),
    ],
)
def test_endorsement_keys(
    words: str, settings: dict[str, str], algorithms: tuple[KeyAlgorithm, ...]
) -> None:
    assert plan_of(f"--tpm2 {words}", settings).ek_algorithms == algorithms
    assert plan_of("", settings).ek_algorithms == ()


@pytest.mark.parametrize(
    ("words", "spk"),
    [
        ("--create-spk", RSA2048),
        ("--create-spk --rsa-keysize 3072 --ek1keyalgo secp256r1", RSA3072),
        ("--create-spk --ecc --rsa-keysize 3072", P384),
        ("--rsa-keysize 3072", None),
    ],
)
def test_storage_primary_keys(words: str, spk: KeyAlgorithm | None) -> None:
    assert plan_of(f"--tpm2 {words}").spk is spk


@pytest.mark.parametrize(
    ("words", "settings", "identities"),
    [
        ("--create-ek-cert", {}, (None, None)),
        ("--create-ek-cert --iakkeyalgo secp384r1 --no-iak", {}, (P384, None)),
        ("--create-ek-cert", {"idevidkeyalgo": "rsa2048"}, (None, RSA2048)),
        ("--create-ek-cert --iakkeyalgo secp256r1", {"iakkeyalgo": "rsa2048"}, (P256, None)),
        # A configuration for TPMs that are made keeps nobody from other set-ups.
        ("", {"iakkeyalgo": "rsa2048"}, (None, None)),
        ("--reconfigure", {"iakkeyalgo": "rsa2048"}, (None, None)),
    ],
)
def test_identity_keys(
    words: str,
    settings: dict[str, str],
    identities: tuple[KeyAlgorithm | None, KeyAlgorithm | None],
) -> None:
    made = plan_of(f"--tpm2 {words}", settings)
    assert (made.iak, made.idevid) == identities


@pytest.mark.parametrize(
    ("words", "settings", "message"),
    [
        ("--ek1keyalgo rsa1024", {}, "Key algorithm rsa1024 is not supported."),
        ("", {"ek2keyalgo": "Foo"}, "Key algorithm Foo is not supported."),
        ("--rsa-keysize 1024", {}, "Unsupported RSA key size 1024."),
        ("--rsa-keysize 4096", {}, "4096 bit RSA keys are not supported by libtpms."),
        ("--ek2keyalgo rsa4096", {}, "4096 bit RSA keys are not supported by libtpms."),
        ("--iakkeyalgo rsa2048", {}, "When creating IAK and/or IDevID keys, then an EK"),
        ("--createek --idevidkeyalgo secp256r1", {}, "When creating IAK and/or IDevID keys"),
        ("--createek", {"iakkeyalgo": "secp256r1"}, "When creating IAK and/or IDevID keys"),
    ],
)
def test_key_algorithms_that_cannot_be(words: str, settings: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        plan_of(f"--tpm2 {words}", settings)
    assert str(caught.value).startswith(message)


class NewerMakers(TpmMakers):
    """A library that can do what none here can."""

    def rsa_sizes(self) -> list[int]:
        return [2048, 3072, 4096]


def test_rsa_4096_of_a_library_that_has_it() -> None:
    makers = NewerMakers(None)
    for words in ("--rsa-keysize max", "--rsa-keysize 4096", "--ek1keyalgo rsa4096"):
        assert plan_of(f"--tpm2 {words}", makers=makers).ek_algorithms == (RSA4096, P384)
    verbs = json.loads(makers.capabilities_text())["features"]
    at = verbs.index("tpm2-rsa-keysize-3072")
    assert verbs[at + 1] == "tpm2-rsa-keysize-4096"
    assert verbs[-4:] == [f"cmdarg-{name}keyalgo" for name in ("ek1", "ek2", "iak", "idevid")]


@pytest.mark.parametrize(
    "word", ["--createek", "--create-ek-cert", "--create-platform-cert", "--take-ownership"]
)
def test_what_implies_an_endorsement_key(word: str) -> None:
    plan = plan_of(word)
    assert plan.create_ek
    assert plan.needs_certificates is (word == "--create-ek-cert")


def test_passwords_are_not_shown() -> None:
    line = line_of("--take-ownership", "--ownerpass", "geheim")
    made = setup_settings.setup_config(line, ConfigFile({}), TpmMakers(None), "u", URI)
    assert made.plan.ownership is not None
    assert made.plan.ownership.owner_auth.hex() not in repr(made)
    assert repr(made.plan.ownership.owner_auth) not in repr(made)


@pytest.mark.parametrize(
    ("words", "settings", "text"),
    [
        ([], {}, None),
        ([], {"profile": '{"Name":"null"}'}, '{"Name":"null"}'),
        (["--profile-name", "null"], {"profile": "x"}, '{"Name":"null"}'),
        (["--profile-name", "builtin:null"], {}, '{"Name":"null"}'),
        (["--profile-name", "custom:abc"], {}, '{"Name":"custom:abc"}'),
        (["--profile-name", "mine"], {}, '{"Name":"custom:mine"}'),
        (["--profile-name", "local:mine"], {}, '{"Name":"custom:mine"}'),
        (["--profile-name", "null2"], {}, "swtpm does not support a profile with name 'null2'"),
        (["--profile-name", "local:no"], {}, "Could not find or access profile 'local:no'."),
        (["--profile-name", "../x"], {}, "Profile name '../x' contains unacceptable characters."),
        (["--profile-name", "x" * 33], {}, "Profile name must not exceed 32 characters."),
        (["--profile", '{"Name":"foo"}'], {}, "swtpm does not support a profile with name 'foo'"),
        (["--profile", "xx"], {}, "Failed to get 'Name' from profile 'xx'."),
        (["--profile", "[]"], {}, "Failed to get 'Name' from profile '[]'."),
        (["--profile-file", "/proc/none"], {}, "Could not open profile file '/proc/none'"),
        (["--profile-file-fd", "x"], {}, "Invalid file descriptor 'x'"),
    ],
)
def test_profiles(
    tmp_path: Path, words: list[str], settings: dict[str, str], text: str | None
) -> None:
    (tmp_path / "mine.json").write_text('{"Name":"custom:mine"}\n')
    config = ConfigFile({**settings, "local_profiles_dir": str(tmp_path)})
    said: str | None
    try:
        found = setup_profiles.profile_config(line_of("--tpm2", *words), config, BUILTIN)
        said = found.text if found else None
    except UsageError as exc:
        said = str(exc).partition(": ")[0]
    assert said == text


def test_a_library_without_profiles_ignores_the_configurations() -> None:
    config = ConfigFile({"profile": '{"Name":"default-v1"}'})
    assert setup_profiles.profile_config(line_of("--tpm2"), config, frozenset()) is None
    with pytest.raises(UsageError, match="does not support a profile with name 'null'"):
        setup_profiles.profile_config(
            line_of("--tpm2", "--profile-name", "null"), config, frozenset()
        )


def test_all_profiles(tmp_path: Path) -> None:
    """A local one has the name by which it is asked for."""
    (tmp_path / "mine.json").write_text('{"Algorithms":"rsa","Name":"custom:one"}')
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "nameless.json").write_text("{}")
    os.mkfifo(tmp_path / "pipe.json")
    config = ConfigFile({"local_profiles_dir": str(tmp_path)})
    found = json.loads(setup_profiles.profiles_text(config, [{"Name": "null"}]))
    assert found["local"] == [{"Algorithms": "rsa", "Name": "mine"}]
    assert found["builtin"] == [{"Name": "null"}]


def test_an_empty_folder_of_profiles_is_shown(tmp_path: Path) -> None:
    config = ConfigFile({"local_profiles_dir": str(tmp_path)})
    assert setup_profiles.profiles_text(config, []) == '{"local":[]}'
    none = ConfigFile({"local_profiles_dir": str(tmp_path / "none")})
    assert setup_profiles.profiles_text(none, []) == "{}"


def test_keys_and_facts_as_a_certificate_tool_is_given_them() -> None:
    assert RsaKey(b"\x00\xab").text == "00ab"
    assert EccKey(b"\x01", b"\x02", "secp384r1").text == "x=01,y=02,id=secp384r1"
    text = {
        "TPMSpecification": {"family": "2.0", "level": 0, "revision": 183},
        "TPMAttributes": {"manufacturer": "id:1", "model": "swtpm", "version": "id:2"},
    }
    facts = TpmFacts.from_json(json.dumps(text))
    assert facts == TpmFacts(Maker("id:1", "swtpm", "id:2"), TpmSpecification("2.0", 0, 183))
    for bad in ("", "{}", "[]", '{"TPMSpecification": 1, "TPMAttributes": 2}'):
        with pytest.raises(UsageError, match="Could not get the TPM spec"):
            TpmFacts.from_json(bad)


@pytest.mark.parametrize("line", [" create_certs_tool = /x", "create_certs_tool_config: /x"])
def test_a_line_of_the_config_file_that_is_meant_as_a_setting(line: str, tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_text(f"active_pcr_banks = sha256\n{line}\n")
    with pytest.raises(UsageError, match=rf"{path}, line 2: "):
        ConfigFile.load(str(path), "alice")


def test_config_file_in_another_charset(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"# Jos\xe9\ncreate_certs_tool = /Jos\xe9\nprofile = {\xe9}\n")
    config = ConfigFile.load(str(path), "alice")
    assert os.fsencode(config.certificate_tool() or "") == b"/Jos\xe9"
    with pytest.raises(UsageError, match="not text in UTF-8"):
        setup_profiles.profile_config(line_of("--tpm2"), config, BUILTIN)
