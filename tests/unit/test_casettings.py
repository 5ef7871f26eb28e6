"""The CA's two files: grammar, where they are looked for, hostile content."""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtpm_cuse.ca import configfile
from vtpm_cuse.ca import settings as casettings
from vtpm_cuse.ca.certificates import Maker
from vtpm_cuse.ca.passwords import PASSWORD_MAX, read_password
from vtpm_cuse.ca.settings import CaProfile, CaSettings
from vtpm_cuse.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CONFIG = """\
# a CA
statedir = /ca/${NAME}  # here
signingkey=/ca/key.pem
  other = /not/at/the/start
issuercert\t=\t/ca/cert.pem
issuercert = /second
this is nothing
env:TOKEN_DIR = /tokens # kept
signingkey_password = geheim
"""


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """An environment whose user and system folders are below tmp_path."""
    (tmp_path / "etc").mkdir()
    (tmp_path / "home" / ".config").mkdir(parents=True)
    monkeypatch.setattr(configfile, "SYSTEM_FOLDER", str(tmp_path / "etc"))
    return {"HOME": str(tmp_path / "home"), "NAME": "one"}


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_grammar(tmp_path: Path) -> None:
    settings = CaSettings.load(write(tmp_path / "f", CONFIG), {"NAME": "one"})
    assert settings.state_dir == "/ca/one"
    assert settings.signing_key == "/ca/key.pem"
    assert settings.issuer_certificate == "/ca/cert.pem"
    assert settings.serial_file == "/ca/one/certserial"
    assert settings.password == b"geheim"
    assert settings.pin == b"geheim"
    assert settings.environment == {"TOKEN_DIR": "/tokens # kept"}
    assert "geheim" not in repr(settings)


@pytest.mark.parametrize("name", ["statedir", "signingkey", "issuercert"])
def test_a_missing_setting_is_named(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "f", CONFIG.replace(name, "x"))
    with pytest.raises(UsageError, match=rf"Missing '{name}' config value in config file {path}\."):
        CaSettings.load(path, {})


@pytest.mark.parametrize(
    ("text", "environ", "pin"),
    [
        ("", {}, b"swtpm-tpmca"),
        ("", {"SWTPM_PKCS11_PIN": "env"}, b"env"),
        ("SWTPM_PKCS11_PIN = own\n", {"SWTPM_PKCS11_PIN": "env"}, b"own"),
        ("SWTPM_PKCS11_PIN = own\nsigningkey_password = pw\n", {}, b"pw"),
    ],
)
def test_pin(text: str, environ: dict[str, str], pin: bytes, tmp_path: Path) -> None:
    text += "statedir=/a\nsigningkey = pkcs11:token=x\\;object=y\nissuercert=/b\n"
    settings = CaSettings.load(write(tmp_path / "f", text), environ)
    assert settings.pin == pin
    assert settings.signing_key == "pkcs11:token=x;object=y"


@pytest.mark.parametrize("blank", [" ", "\t", "\v", "\f", "\r", " \f\v\t"])
def test_blanks_as_c_has_them(blank: str) -> None:
    text = f"statedir{blank}={blank}/a b{blank}# x\nenv:A{blank}={blank}b\n"
    assert configfile.parse(text, {}) == {"statedir": "/a b", "env:A": "b"}


def test_other_blanks_belong_to_a_value() -> None:
    assert configfile.parse("statedir = \xa0/a\x85\n", {}) == {"statedir": "\xa0/a\x85"}


@pytest.mark.parametrize(
    "line",
    [
        *(" statedir = /c", "\tstatedir=/c", "\fstatedir=/c", "statedir: /c", "certserial /c"),
        *(
            "\xa0statedir = /c",
            "statedir\xa0= /c",
            "\udca0statedir = /c",
            "issuercert",
            " env:A = b",
        ),
        *("env: A = b", "signingkey_password: geheim"),
    ],
)
def test_a_line_that_is_meant_as_a_setting_is_named(line: str, tmp_path: Path) -> None:
    """The built-in place, or a later line, would be another CA."""
    path = tmp_path / "f"
    path.write_bytes(f"# first\n{line}\n{CONFIG}".encode(errors="surrogateescape"))
    with pytest.raises(UsageError, match=rf"{path}, line 2: '[\w:]+' is not read as") as caught:
        CaSettings.load(str(path), {})
    assert "geheim" not in str(caught.value)


@pytest.mark.parametrize("line", ["", "words", " # statedir = /c", "x: statedir", "\udce9"])
def test_other_lines_that_are_no_setting_are_no_error(line: str, tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(f"{line}\n{CONFIG}".encode(errors="surrogateescape"))
    assert CaSettings.load(str(path), {}) == replace(
        CaSettings.load(write(tmp_path / "plain", CONFIG), {}), origin=str(path)
    )


def test_files_in_another_charset(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"# Jos\xe9\nstatedir = /Jos\xe9\nsigningkey=/k\nissuercert=/i\n")
    settings = CaSettings.load(str(path), {})
    assert os.fsencode(settings.state_dir) == b"/Jos\xe9"


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=rf"Need read rights on config file {tmp_path}/x for user"):
        CaSettings.load(str(tmp_path / "x"), {})
    with pytest.raises(
        UsageError, match=rf"Need read rights on options file {tmp_path}/y for user"
    ):
        CaProfile.load(str(tmp_path / "y"), {})


def test_the_users_file_comes_first(places: dict[str, str], tmp_path: Path) -> None:
    assert CaSettings.load(None, places).origin == "the built-in configuration"
    system = write(tmp_path / "etc" / casettings.CONFIG_NAME, f"{CONFIG}statedir={tmp_path}\n")
    assert CaSettings.load(None, places).origin == system
    own = write(tmp_path / "home" / ".config" / casettings.CONFIG_NAME, CONFIG)
    assert CaSettings.load(None, places).origin == own
    other = tmp_path / "xdg"
    other.mkdir()
    there = {**places, "XDG_CONFIG_HOME": str(other)}
    assert CaSettings.load(None, there).origin == system
    assert CaSettings.load(None, {**places, "XDG_CONFIG_HOME": "relative"}).origin == own


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
@pytest.mark.parametrize("at_fault", ["home", "home/.config", "the file", "a link"])
def test_root_uses_no_files_that_others_can_change(
    at_fault: str, places: dict[str, str], tmp_path: Path
) -> None:
    """They name keys, libraries and programs; those that are named to root are used."""
    folder = tmp_path / "home" / ".config"
    texts = {casettings.CONFIG_NAME: CONFIG, casettings.OPTIONS_NAME: OPTIONS}
    for name, text in texts.items():
        write(folder / name, text)
    assert CaSettings.load(None, places).state_dir == "/ca/one"
    if at_fault == "a link":
        folder.rename(tmp_path / "elsewhere")
        (tmp_path / "others").mkdir()
        (tmp_path / "others").chmod(0o777)
        (tmp_path / "others" / "link").symlink_to(tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "others" / "link")
    for name, load in zip(texts, (CaSettings.load, CaProfile.load), strict=True):
        path = {"the file": folder / name}.get(at_fault, tmp_path / at_fault)
        if path.exists():
            os.chown(path, 65534, 65534)
        with pytest.raises(UsageError, match=rf"Root does not use .*{name}: others than root"):
            load(None, places)
        load(str(folder / name), places)


@pytest.mark.parametrize("load", [CaSettings.load, CaProfile.load])
def test_a_byte_order_mark_hides_no_setting(
    load: Callable[[str, dict[str, str]], object], tmp_path: Path
) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"\xef\xbb\xbfcertserial=/x\n" + CONFIG.encode())
    with pytest.raises(UsageError, match="begins with a byte order mark"):
        load(str(path), {})


def test_who_is_not_root_gets_a_ca_of_his_own(
    places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "home" / ".config" / "var/lib/swtpm-localca"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert CaSettings.load(None, places).state_dir == str(own)
    system = tmp_path / "system-ca"
    system.mkdir()
    config = f"statedir={system}\nsigningkey={system}/k\nissuercert={system}/c\n"
    write(tmp_path / "etc" / casettings.CONFIG_NAME, config)
    assert CaSettings.load(None, places).state_dir == str(system)
    real = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: str(path) != str(system) and real(path, mode)
    )
    assert CaSettings.load(None, places).state_dir == str(own)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    (tmp_path / "etc" / casettings.CONFIG_NAME).unlink()
    assert CaSettings.load(None, places).state_dir == "/var/lib/swtpm-localca"


# -- options file ---------------------------------------------------------------------------

OPTIONS = "--platform-manufacturer Fedora\n--platform-version=2.1\n\n --platform-model  QEMU\n"


def test_options(tmp_path: Path) -> None:
    profile = CaProfile.load(write(tmp_path / "f", OPTIONS), {})
    assert profile.platform == Maker("Fedora", "QEMU", "2.1")
    assert not profile.allow_signing
    more = CaProfile.load(
        write(tmp_path / "f", OPTIONS + "--allow-signing --subject O=x --days 3 --decryption"), {}
    )
    assert (more.allow_signing, more.decryption, more.subject) == (True, True, "O=x")


def test_quoted_values_in_the_options_may_have_blanks(tmp_path: Path) -> None:
    text = (
        "--platform-manufacturer \"Fedora XYZ\"\n--platform-version='2 1'\n"
        "--platform-model O'Reilly\"s #1_x\n--decryption"
    ).replace(" #1_x", "_#1_x")
    profile = CaProfile.load(write(tmp_path / "f", text), {})
    assert profile.platform == Maker("Fedora XYZ", "O'Reilly\"s_#1_x", "2 1")
    assert profile.decryption


def test_what_the_options_say_of_the_tpm(tmp_path: Path) -> None:
    text = '--tpm-manufacturer "id: 1"\n--tpm-model=m --tpm-version v --tpm-spec-level 7 --serial 3'
    assert CaProfile.load(write(tmp_path / "f", text), {}).tpm == {
        "tpm-manufacturer": "id: 1",
        "tpm-model": "m",
        "tpm-version": "v",
        "tpm-spec-level": "7",
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (OPTIONS + '"two words"', "'two words' is no option"),
        (OPTIONS + "stray", "'stray' is no option"),
        (OPTIONS + "--out-cert /etc/passwd", "'--out-cert' is no option"),
        (OPTIONS + "--signkey=/x", "'--signkey=/x' is no option"),
        (OPTIONS + "--subject", "option '--subject' requires an argument"),
        (OPTIONS + "--decryption=1", "option '--decryption' doesn't allow an argument"),
        ("\0", "zero byte"),
        ("\udcff", "not text in UTF-8"),
        ("x" * (1 << 20) + "y", "larger than any configuration file"),
    ],
)
def test_options_that_cannot_be(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UsageError, match=said) as caught:
        CaProfile.load(str(path), {})
    assert str(path) in str(caught.value)


@given(st.binary(max_size=300))
def test_any_files_give_settings_or_usage_error(data: bytes) -> None:
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        for load in (CaSettings.load, CaProfile.load):
            try:
                load(file.name, {})
            except UsageError as exc:
                assert file.name in str(exc)  # noqa: PT017 - hypothesis tries many


def test_a_huge_number_of_settings_is_quick(tmp_path: Path) -> None:
    text = "a" * 50_000 + "\n" + "b " * 50_000 + "\n" + "xenv:" * 50_000 + "\n"
    text += "env:A" + "= " * 50_000 + "\n" + CONFIG
    assert CaSettings.load(write(tmp_path / "f", text), {}).signing_key == "/ca/key.pem"


def test_without_options_the_machine_is_the_platform(places: dict[str, str]) -> None:
    profile = CaProfile.load(None, places)
    assert profile.platform == casettings.machine_maker()
    assert profile.platform.manufacturer == os.uname().sysname


# -- passwords ------------------------------------------------------------------------------


def test_passwords(tmp_path: Path) -> None:
    path = tmp_path / "p"
    path.write_bytes(b"geheim\n")
    assert read_password("plain", "o", {}) == b"plain"
    assert read_password("pass:a:b", "o", {}) == b"a:b"
    assert read_password("other:a", "o", {}) == b"other:a"
    assert read_password("env:X", "o", {"X": "y"}) == b"y"
    assert read_password(f"file:{path}", "o", {}) == b"geheim\n"
    read, write_end = os.pipe()
    os.write(write_end, b"geheim")
    os.close(write_end)
    assert read_password(f"fd:{read}", "o", {}) == b"geheim"


@pytest.mark.parametrize("spec", ["env:X", "fd:x", "fd:", "fd:-1", "fd:999999", "file:/no/such"])
def test_passwords_that_are_not_there(spec: str) -> None:
    with pytest.raises(UsageError, match="of --option"):
        read_password(spec, "option", {})


def test_a_pipe_for_a_password_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "p")
    with pytest.raises(UsageError, match="it is a pipe that nobody may ever write to"):
        read_password(f"file:{tmp_path / 'p'}", "o", {})


def test_a_password_that_is_too_long_is_not_cut(tmp_path: Path) -> None:
    path = tmp_path / "p"
    path.write_bytes(b"s" * PASSWORD_MAX)
    assert len(read_password(f"file:{path}", "o", {})) == PASSWORD_MAX
    path.write_bytes(b"s" * (PASSWORD_MAX + 1))
    with pytest.raises(UsageError, match="longer than") as caught:
        read_password(f"file:{path}", "o", {})
    assert "sss" not in str(caught.value)


@pytest.mark.parametrize("what", ["pipe", "folder", "link to nothing"])
def test_what_is_in_the_place_of_the_users_file_is_not_passed_over(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system's file may name another CA."""
    monkeypatch.setattr(configfile, "SYSTEM_FOLDER", str(tmp_path / "etc"))
    monkeypatch.setattr(configfile, "changed_by_others", lambda _: "")
    for folder in ("etc", "own"):
        (tmp_path / folder).mkdir()
    (tmp_path / "etc/x.conf").write_text("name = value\n")
    path = tmp_path / "own/x.conf"
    environ = {"XDG_CONFIG_HOME": str(path.parent)}
    assert configfile.find("x.conf", environ, "--x") == str(tmp_path / "etc/x.conf")
    if what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "nowhere")
    assert configfile.find("x.conf", environ, "--x") == str(path)
    with pytest.raises(OSError, match=r"pipe|directory"):
        configfile.read_text(str(path))
