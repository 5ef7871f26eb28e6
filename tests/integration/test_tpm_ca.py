"""A CA whose key is in a TPM: made, used, refused; and the TPM has nothing loaded afterwards."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from cryptography import x509

from tests.support import setups
from tests.support.certificates import der_of, make_ca
from tests.support.commands import tpm2
from tests.support.sockets import listener
from vtpm_cuse.ca import localca, tpmkeys
from vtpm_cuse.ca.certificates import CertificateKind, Maker, TpmSpecification, bare_certificate
from vtpm_cuse.ca.issuers import own_key
from vtpm_cuse.ca.keyfiles import TpmKeyFile
from vtpm_cuse.ca.keys import PublicKey
from vtpm_cuse.ca.localca import LocalCa
from vtpm_cuse.ca.settings import CaProfile, CaSettings
from vtpm_cuse.ca.tpmkeys import KeyTpm, new_key
from vtpm_cuse.cli.ca import swtpm_create_tpmca
from vtpm_cuse.cli.words.commandline import CommandLine
from vtpm_cuse.client.commands import TpmConnection, TpmUnix, connected, send_command
from vtpm_cuse.errors import CertificateError, UsageError
from vtpm_cuse.faults import exit_status
from vtpm_cuse.lab import Tpm
from vtpm_cuse.wire.tpm2 import Scheme, TpmAlg, TpmaObject

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vtpm_cuse.wire.tpm2 import Public

PROGRAMS: Final = Path(sys.executable).parent
ROOT: Final = "swtpm-localca-rootca-cert.pem"
PASSWORD: Final = b"open sesame"
MODULUS: Final = "c5" * 256
EK: Final = (
    CertificateKind.EK, PublicKey.from_rsa(int(MODULUS, 16)), Maker("a", "b", "c"),
    TpmSpecification("2.0", 0, 183), "vm",
)  # fmt: skip
TPM_WORDS: Final = [
    *("--tpm2", "--tpm-manufacturer", "id:1", "--tpm-model", "m", "--tpm-version", "1"),
    *("--tpm-spec-family", "2.0", "--tpm-spec-level", "0", "--tpm-spec-revision", "183"),
]
_PASSWORD_SESSION: Final = bytes.fromhex("00000009 40000009 0000 00 0000")
CLEAR: Final = tpm2(0x126, bytes.fromhex("4000000c") + _PASSWORD_SESSION, sessions=True)
TRANSIENT: Final = tpm2(0x17A, bytes.fromhex("00000001 80000000 000000fe"))


def owner_password(old: bytes, new: bytes) -> bytes:
    """TPM2_HierarchyChangeAuth."""
    session = bytes.fromhex("40000009 0000 00") + len(old).to_bytes(2, "big") + old
    body = bytes.fromhex("40000001") + len(session).to_bytes(4, "big") + session
    return tpm2(0x129, body + len(new).to_bytes(2, "big") + new, sessions=True)


def ask(tpm: Tpm, command: bytes) -> bytes:
    """Asks the TPM itself, past its resource manager."""
    response = send_command(TpmUnix(tpm.raw_path), command, 60)
    assert response[6:10] == bytes(4), response.hex()
    return response


@pytest.fixture(autouse=True)
def _small_root_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(localca, "_CA_KEY_BITS", 1024 + 512)


@pytest.fixture(scope="module")
def private_tpm() -> Iterator[Tpm]:
    with Tpm() as tpm:
        yield tpm


@pytest.fixture
def tpm(private_tpm: Tpm) -> Iterator[Tpm]:
    """Ours for a test, after which there is nothing in it that it has loaded."""
    yield private_tpm
    assert ask(private_tpm, TRANSIENT)[-4:] == bytes(4), "objects are left loaded"


def ca_of(folder: Path, tpm: Tpm, password: bytes | None = None, kind: str = "ecc256") -> LocalCa:
    settings = CaSettings.in_folder(str(folder))
    key_tpm = KeyTpm(tpm.raw_path)
    settings = replace(settings, password=password, tpm=key_tpm, new_key=kind)
    return LocalCa(settings, CaProfile())


def key_file(folder: Path, tpm: Tpm, password: bytes | None = None) -> Path:
    path = folder / "key.pem"
    path.write_bytes(new_key(KeyTpm(tpm.raw_path), "ecc256", password).to_pem())
    return path


def loaded(certificate: bytes) -> x509.Certificate:
    return x509.load_der_x509_certificate(bare_certificate(certificate))


def test_programs_make_a_ca_and_use_it(tpm: Tpm, tmp_path: Path) -> None:
    """From the TPM's key to the certificates of another TPM, each step by another program."""
    shop = setups.make_workshop(tmp_path)
    folder, config = tmp_path / "tpmca", shop.path / "conf" / "swtpm-localca.conf"
    config.unlink()
    words: list[str | Path] = ["--tpm2", "--dir", folder, "--tpm", tpm.raw_path]
    words += ["--algorithm", "ecc384"]
    words += ["--key-password", "env:CA_PASSWORD", "--outfile", config, "--pid", "1"]
    made = subprocess.run(
        [PROGRAMS / "swtpm-create-tpmca", *words],
        check=False, capture_output=True, text=True,
        env={**os.environ, "CA_PASSWORD": PASSWORD.decode()},
    )  # fmt: skip
    assert (made.returncode, made.stdout) == (0, ""), made.stderr
    assert PASSWORD.decode() not in made.stderr
    assert config.stat().st_mode & 0o777 == 0o640
    certificates = tmp_path / "certificates"
    certificates.mkdir()
    done = shop.run(
        setups.OURS,
        *("--tpm2", "--tpm-state", shop.new_state("state"), "--create-ek-cert"),
        *("--write-ek-cert-files", certificates),
    )
    assert done.returncode == 0, done.stderr
    assert PASSWORD.decode() not in done.stdout + done.stderr
    found = sorted(certificates.iterdir())
    assert len(found) == 2
    for path in found:
        pem = path.with_suffix(".pem")
        setups.succeed("openssl", "x509", "-inform", "DER", "-in", path, "-out", pem)
        chain: list[str | Path] = ["-CAfile", folder / ROOT]
        chain += ["-untrusted", folder / "swtpm-localca-tpmca-cert.pem"]
        setups.succeed("openssl", "verify", "-x509_strict", *chain, pem)
        assert "ecdsa-with-SHA384" in setups.succeed("openssl", "x509", "-in", pem, "-text")
    public = setups.succeed(
        "openssl", "x509", "-in", folder / "swtpm-localca-tpmca-cert.pem", "-noout", "-pubkey"
    )
    assert public == (folder / "swtpm-localca-tpmca-pubkey.pem").read_text()


def test_a_program_says_what_is_wrong(tpm: Tpm, tmp_path: Path) -> None:
    """One line, without the password; no certificate."""
    ca_of(tmp_path, tpm, PASSWORD).prepare()
    words: list[str | Path] = ["--signkey", tmp_path / "signkey.pem"]
    words += ["--issuercert", tmp_path / "issuercert.pem"]
    words += ["--signkey-tpm", tpm.raw_path, "--modulus", MODULUS, "--out-cert", tmp_path / "cert"]
    for password, status in (("shut sesame", 1), (PASSWORD.decode(), 0)):
        done = subprocess.run(
            [PROGRAMS / "swtpm_cert", *TPM_WORDS, *words, "--signkey-pwd", "env:CA_PASSWORD"],
            check=False, capture_output=True, text=True,
            env={**os.environ, "CA_PASSWORD": password},
        )  # fmt: skip
        assert done.returncode == status, done.stderr
        assert ("its password is missing or wrong" in done.stderr) == bool(status)
        assert "sesame" not in done.stdout + done.stderr
        assert len(done.stderr.splitlines()) == status
        assert (tmp_path / "cert").exists() != bool(status)
    issuer = x509.load_der_x509_certificate(der_of(tmp_path / "issuercert.pem"))
    loaded((tmp_path / "cert").read_bytes()).verify_directly_issued_by(issuer)


@pytest.mark.parametrize("kind", ["rsa2048", "ecc256", "secp384r1"])
def test_kinds_of_keys_sign_by_their_own_hash(kind: str, tpm: Tpm, tmp_path: Path) -> None:
    """Also where a TPM 1.2's certificates are signed with SHA-1."""
    ca_of(tmp_path, tpm, kind=kind).prepare()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    ca = ca_of(tmp_path, tpm)
    issuer = x509.load_der_x509_certificate(der_of(tmp_path / "issuercert.pem"))
    for version in (True, False):
        made = loaded(ca.issue(ca.request(*EK, is_tpm2=version)))
        made.verify_directly_issued_by(issuer)
        assert made.signature_hash_algorithm is not None
        wanted = "sha384" if kind == "secp384r1" else "sha256"
        assert made.signature_hash_algorithm.name == wanted
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


@pytest.mark.parametrize(("kind", "own"), [("ecc256", "sha256"), ("ecc384", "sha384")])
def test_a_key_of_no_scheme_signs_as_any_other(
    kind: str, own: str, tpm: Tpm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its size, and what a TPM 1.2 knows with SHA-1."""
    change_new_keys(monkeypatch, lambda public: replace(public, scheme=None))
    ca = ca_of(tmp_path, tpm, kind=kind)
    for version, name in ((True, own), (False, "sha1")):
        found = loaded(ca.issue(ca.request(*EK, is_tpm2=version))).signature_hash_algorithm
        assert found is not None
        assert found.name == name


def test_a_persistent_key_below_a_persistent_parent(tpm: Tpm, tmp_path: Path) -> None:
    """Made persistent by other programs, as on a machine with a storage root key."""
    tools = {**os.environ, "TPM2TOOLS_TCTI": tpm.tcti}

    def tool(name: str, *words: str | Path) -> None:
        command = [f"tpm2_{name}", *words]
        subprocess.run(command, check=True, capture_output=True, cwd=tmp_path, env=tools)

    tool("createprimary", "-Q", "-C", "o", "-G", "ecc", "-c", "srk.ctx")
    tool("evictcontrol", "-Q", "-C", "o", "-c", "srk.ctx", "0x81000001")
    key_tpm = KeyTpm(tpm.raw_path)
    made = new_key(key_tpm, "ecc384", PASSWORD, 0x81000001)
    (tmp_path / "below.pem").write_bytes(made.to_pem())
    public, private = (len(part).to_bytes(2, "big") + part for part in (made.public, made.private))
    (tmp_path / "pub").write_bytes(public)
    (tmp_path / "priv").write_bytes(private)
    tool("load", "-Q", "-C", "0x81000001", "-u", "pub", "-r", "priv", "-c", "key.ctx")
    tool("evictcontrol", "-Q", "-C", "o", "-c", "key.ctx", "0x81000010")
    try:
        settings = replace(
            CaSettings.in_folder(str(tmp_path / "ca")),
            signing_key="handle:0x81000010", password=PASSWORD, tpm=key_tpm,
        )  # fmt: skip
        (tmp_path / "ca").mkdir()
        ca = LocalCa(settings, CaProfile())
        issuer = x509.load_der_x509_certificate
        certificate = loaded(ca.issue(ca.request(*EK)))
        certificate.verify_directly_issued_by(issuer(der_of(tmp_path / "ca" / "issuercert.pem")))
        again = replace(settings, signing_key=str(tmp_path / "below.pem"))
        LocalCa(again, CaProfile()).check()  # the same key: it proves that with a signature
        for key, said in (("0x81000001", "may not sign"), ("0x81000011", "TPM_RC_HANDLE")):
            with pytest.raises(CertificateError, match=said):
                own_key(f"handle:{key}", None, key_tpm)
    finally:
        for handle in ("0x81000001", "0x81000010"):
            tool("evictcontrol", "-Q", "-C", "o", "-c", handle)


def change_new_keys(monkeypatch: pytest.MonkeyPatch, change: Callable[[Public], Public]) -> None:
    """Has new keys be others than those that sign certificates."""
    template = tpmkeys._template

    monkeypatch.setattr(
        tpmkeys, "_template", lambda kind, guarded: change(template(kind, guarded=guarded))
    )


_SCHNORR: Final = Scheme(0x1C, TpmAlg.TPM_ALG_SHA256)


@pytest.mark.parametrize(
    ("without", "more", "scheme", "said"),
    [
        (TpmaObject.SIGN, TpmaObject.DECRYPT, None, "may not sign"),
        (0, TpmaObject.RESTRICTED, False, "restricted"),
        (TpmaObject.USER_WITH_AUTH, 0, False, "it has a policy"),
        (0, 0, _SCHNORR, "its scheme is none for certificates"),
    ],
)
def test_keys_that_sign_no_certificates(
    without: int,
    more: int,
    scheme: Scheme | bool | None,
    said: str,
    tpm: Tpm,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def change(public: Public) -> Public:
        attributes = public.objectAttributes & ~without | more
        own = public.scheme if isinstance(scheme, bool) else scheme
        return replace(public, objectAttributes=attributes, scheme=own)

    change_new_keys(monkeypatch, change)
    with pytest.raises(CertificateError, match=said) as caught:
        ca_of(tmp_path, tpm).prepare()
    assert exit_status(caught.value) == 1
    assert str(tmp_path / "signkey.pem") in str(caught.value)


def test_a_wrong_password_of_the_owner(tpm: Tpm, tmp_path: Path) -> None:
    path = str(key_file(tmp_path, tpm))
    ask(tpm, owner_password(b"", PASSWORD))
    try:
        with pytest.raises(CertificateError, match="password of its parent") as caught:
            own_key(path, None, KeyTpm(tpm.raw_path, b"shut sesame")).sign(b"data", "sha256")
        assert "sesame" not in str(caught.value) + repr(KeyTpm(tpm.raw_path, PASSWORD))
        assert own_key(path, None, KeyTpm(tpm.raw_path, PASSWORD)).sign(b"data", "sha256")
    finally:
        ask(tpm, owner_password(PASSWORD, b""))


def test_a_key_of_another_tpm(tpm: Tpm, tmp_path: Path) -> None:
    """As this one is, when it is cleared."""
    ca_of(tmp_path, tpm).prepare()
    ask(tpm, CLEAR)
    with pytest.raises(CertificateError, match="of another TPM"):
        ca_of(tmp_path, tpm).check()


@pytest.mark.parametrize("where", ["{tmp}/no/tpm", "{tmp}/dead", "{tmp}/signkey.pem", "tpm", ":0"])
def test_a_tpm_that_is_away(where: str, tpm: Tpm, tmp_path: Path) -> None:
    ca_of(tmp_path, tpm).prepare()
    with listener(tmp_path / "dead"):
        pass
    place = where.format(tmp=tmp_path)
    with pytest.raises(CertificateError, match=f"signkey.pem: its TPM at {place}: ") as caught:
        own_key(str(tmp_path / "signkey.pem"), None, KeyTpm(place)).sign(b"data", "sha256")
    assert exit_status(caught.value) == 1


def test_a_tpm_without_room(tpm: Tpm, tmp_path: Path) -> None:
    """It has room for three objects; what came before the refusal is flushed."""
    path = str(key_file(tmp_path, tpm))
    template = tpmkeys._ECC_PARENT.pack()
    body = bytes.fromhex("40000001") + _PASSWORD_SESSION + bytes.fromhex("0004 0000 0000")
    body += len(template).to_bytes(2, "big") + template + bytes(6)
    handles = [ask(tpm, tpm2(0x131, body, sessions=True))[10:14] for _ in range(2)]
    try:
        with pytest.raises(CertificateError, match="TPM2_Load: TPM_RC_OBJECT_MEMORY"):
            own_key(path, None, KeyTpm(tpm.raw_path)).sign(b"data", "sha256")
        assert ask(tpm, TRANSIENT)[-12:] == b"\0\0\0\2" + b"".join(handles)
    finally:
        for handle in handles:
            ask(tpm, tpm2(0x165, handle))


def test_a_damaged_key(tpm: Tpm, tmp_path: Path) -> None:
    path = key_file(tmp_path, tpm)
    good = path.read_bytes()
    path.write_bytes(good[:-60])
    with pytest.raises(CertificateError, match=f"{path}: it is no whole TSS2 PRIVATE KEY"):
        own_key(str(path), None, KeyTpm(tpm.raw_path))
    file = TpmKeyFile.from_pem(good)
    path.write_bytes(replace(file, private=file.private[:-1] + b"\0").to_pem())
    with pytest.raises(CertificateError, match="it is damaged, or of another TPM"):
        own_key(str(path), None, KeyTpm(tpm.raw_path)).sign(b"data", "sha256")


def test_no_other_key_where_one_of_a_tpm_is_wanted(tpm: Tpm, tmp_path: Path) -> None:
    key = str(make_ca(tmp_path, "p256").key)
    assert own_key(key).sign(b"data", "sha256")
    with pytest.raises(CertificateError, match="no key of a TPM"):
        own_key(key, None, KeyTpm(tpm.raw_path))


def test_options_of_the_program(tpm: Tpm, tmp_path: Path) -> None:
    folder, out = tmp_path / "ca", tmp_path / "conf"
    out.mkdir()
    config = out / "file"

    def create(*words: str | Path) -> None:
        usual = ["--tpm2", "--dir", str(folder), "--tpm", tpm.raw_path, "--outfile", str(config)]
        program = swtpm_create_tpmca.PROGRAM
        swtpm_create_tpmca._create(CommandLine(program, [*usual, *map(str, words)]))

    for words, said in (
        (["--algorithm", "ed25519"], "Unknown algorithm 'ed25519'"),
        (["--key-password", "pass:a#b"], "That password cannot stand in a configuration file"),
        (["--parent", "0x40000001"], "no persistent handle"),
        (["--group", "no-such-group"], "Group 'no-such-group' does not exist|Only root"),
        (["--tpm", tmp_path / "away"], "Unable to open device"),
    ):
        with pytest.raises((UsageError, CertificateError), match=said):
            create(*words)
        assert not folder.exists()
    config.touch()
    config.chmod(0o644)
    with pytest.raises(UsageError, match=rf"Others can read {config}"):
        create("--key-password", "pass:secret")
    assert not folder.exists()
    create("--algorithm", "ecc256")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UsageError, match="exists already"):
        create()
    with pytest.raises(UsageError, match="no rsa2048 key"):
        create("--overwrite", "--algorithm", "rsa2048")
    (folder / "swtpm-localca-tpmca-cert.pem").unlink()
    create("--overwrite")
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"swtpm-localca-tpmca-cert.pem"}
    LocalCa.from_files(str(config), str(make_options(tmp_path))).prepare()


def make_options(folder: Path) -> Path:
    path = folder / "options"
    path.write_text("--platform-manufacturer a --platform-model b --platform-version c\n")
    return path


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files away")
def test_the_owner_of_all_files(tpm: Tpm, tmp_path: Path) -> None:
    folder, config = tmp_path / "ca", tmp_path / "conf"
    words = ["--tpm2", "--dir", str(folder), "--tpm", tpm.raw_path, "--outfile", str(config)]
    words += ["--algorithm", "ecc256", "--owner", "nobody", "--group", "12345"]
    swtpm_create_tpmca._create(CommandLine(swtpm_create_tpmca.PROGRAM, words))
    uid = int(setups.succeed("id", "-u", "nobody"))
    owners = {
        (path.stat().st_uid, path.stat().st_gid) for path in (config, folder, *folder.iterdir())
    }
    assert owners == {(uid, 12345)}


@pytest.mark.parametrize("code", [0x131, 0x157, 0x15D], ids=["CreatePrimary", "Load", "Sign"])
def test_nothing_is_left_of_who_was_interrupted(
    code: int, tpm: Tpm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Ctrl-C, when the TPM has the command and nobody its response yet."""
    key = own_key(str(key_file(tmp_path, tpm)), None, KeyTpm(tpm.raw_path))
    ask, wait = TpmConnection.ask, TpmConnection._wait
    asked: list[int] = []

    def noticing(connection: TpmConnection, command: bytes) -> bytes:
        asked.append(int.from_bytes(command[6:10], "big"))
        return ask(connection, command)

    def interrupting(connection: TpmConnection, event: int) -> None:
        wait(connection, event)
        if event == select.POLLIN and asked[-1] == code:
            asked.append(0)
            raise KeyboardInterrupt

    monkeypatch.setattr(TpmConnection, "ask", noticing)
    monkeypatch.setattr(TpmConnection, "_wait", interrupting)
    with pytest.raises(KeyboardInterrupt):
        key.sign(b"data", "sha256")
    assert 0 in asked


def test_one_client_of_a_managed_tpm(tpm: Tpm, tmp_path: Path) -> None:
    """What is loaded is there for one connection: all commands go over it."""
    key = own_key(str(key_file(tmp_path, tpm)), None, KeyTpm(tpm.path))
    assert key.sign(b"data", "sha256")
    with connected(TpmUnix(tpm.path), 60) as connection:
        assert connection.ask(TRANSIENT)[-4:] == bytes(4)
