"""The local CA's folder: made once, completed after an interruption, never replaced."""

from __future__ import annotations

import fcntl
import itertools
import os
import stat
import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from tests.support.certificates import Parts, der_of, make_ca, verify
from tests.support.processes import in_child
from vtpm_cuse import files
from vtpm_cuse.ca import localca
from vtpm_cuse.ca.certificates import CertificateKind, Maker, TpmSpecification
from vtpm_cuse.ca.keys import PrivateKey, PublicKey
from vtpm_cuse.ca.localca import CREATING_CA, LocalCa
from vtpm_cuse.ca.settings import CaProfile, CaSettings
from vtpm_cuse.errors import CertificateError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

PROFILE = CaProfile(Maker("m", "o", "v"))
ORDER = (
    CertificateKind.EK, PublicKey.from_rsa(1 << 2047 | 1), Maker("a", "b", "c"),
    TpmSpecification("2.0", 0, 183), "vm",
)  # fmt: skip
ROOT_KEY, ROOT = "swtpm-localca-rootca-privkey.pem", "swtpm-localca-rootca-cert.pem"
FILES = [ROOT_KEY, ROOT, "signkey.pem", "issuercert.pem"]


def issue(ca: LocalCa) -> bytes:
    return ca.issue(ca.request(*ORDER))


@pytest.fixture(scope="module")
def keys() -> Iterator[PrivateKey]:
    """To make one takes longer than all else in a test; whoever wants some gets different ones."""
    return itertools.cycle([PrivateKey.generate(1024 + 512) for _ in range(6)])


@pytest.fixture(autouse=True)
def _keys_made_before(keys: Iterator[PrivateKey], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PrivateKey, "generate", lambda _: next(keys))


@pytest.fixture(autouse=True)
def _umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def ca_in(folder: Path, password: bytes | None = None, root: str = "") -> LocalCa:
    settings = replace(CaSettings.in_folder(str(folder)), password=password)
    return LocalCa(settings, PROFILE, environ={"SWTPM_ROOTCA_PASSWORD": root} if root else {})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_new_ca(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "ca"
    said: list[str] = []
    settings = CaSettings.in_folder(str(folder))
    ca = LocalCa(settings, PROFILE, said.append, {})
    ca.check()
    assert not folder.parent.exists()  # a check writes nothing
    verify(issue(ca), der_of(folder / "issuercert.pem"))
    verify(der_of(folder / "issuercert.pem"), der_of(folder / ROOT))
    verify(der_of(folder / ROOT), der_of(folder / ROOT))
    assert said == [f"Creating swtpm-localca dir '{folder}'.", CREATING_CA]
    assert sorted(contents(folder)) == sorted([*FILES, "certserial", ".lock.swtpm-localca"])
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert modes[ROOT_KEY] == modes["signkey.pem"] == 0o640
    assert modes[".lock.swtpm-localca"] == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o750


def test_subjects_and_extensions_of_a_new_ca(tmp_path: Path) -> None:
    ca_in(tmp_path).prepare()
    root, own = (x509.load_der_x509_certificate(der_of(tmp_path / n)) for n in (ROOT, FILES[3]))
    assert root.subject == root.issuer == own.issuer
    assert root.subject.rfc4514_string() == "CN=swtpm-localca-rootca"
    assert own.subject.rfc4514_string() == "CN=swtpm-localca"
    for certificate in (root, own):
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
        assert constraints.critical
        assert constraints.value == x509.BasicConstraints(ca=True, path_length=None)
        assert len(Parts.of(certificate.public_bytes(serialization.Encoding.DER)).serial) == 20
    assert root.serial_number != own.serial_number


def test_the_ca_is_made_once(tmp_path: Path) -> None:
    first, second = Parts.of(issue(ca_in(tmp_path))), None
    before = contents(tmp_path)
    second = Parts.of(issue(ca_in(tmp_path)))
    after = contents(tmp_path)
    assert int.from_bytes(second.serial, "big") == int.from_bytes(first.serial, "big") + 1
    assert before.pop("certserial") == b"%d" % int.from_bytes(first.serial, "big")
    assert after.pop("certserial") == b"%d" % int.from_bytes(second.serial, "big")
    assert before == after


@pytest.mark.parametrize("step", range(5))
@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_interruption_loses_nothing_and_is_made_up_for(
    step: int, moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C before or after each file: what was there stays, and the next run completes it."""
    real, calls = files.write_output, [0]

    def interrupted(*args: Any, **names: Any) -> None:  # noqa: ANN401
        calls[0] += 1
        if calls[0] == step + 1 and moment == "before":
            raise KeyboardInterrupt
        real(*args, **names)
        if calls[0] == step + 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(localca, "write_output", interrupted)
    with pytest.raises(KeyboardInterrupt):
        issue(ca_in(tmp_path))
    before = contents(tmp_path)
    monkeypatch.setattr(localca, "write_output", real)
    certificate = issue(ca_in(tmp_path))
    after = contents(tmp_path)
    assert {name: after[name] for name in before if name != "certserial"} == {
        name: data for name, data in before.items() if name != "certserial"
    }
    assert set(FILES) <= after.keys()
    verify(certificate, der_of(tmp_path / "issuercert.pem"))
    verify(der_of(tmp_path / "issuercert.pem"), der_of(tmp_path / ROOT))


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f"
    files.write_output(str(path), b"old", 0o600)

    def fail(*_args: object, **_names: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="No space"):
        files.write_output(str(path), b"new", 0o600)
    assert contents(tmp_path) == {"f": b"old"}


@pytest.mark.parametrize("lost", [(ROOT_KEY, ROOT), ("signkey.pem", "issuercert.pem")])
def test_a_lost_key_is_an_error_and_no_reason_for_a_new_ca(
    lost: tuple[str, str], tmp_path: Path
) -> None:
    """The C suite makes all of it anew, over keys that are there."""
    ca_in(tmp_path).prepare()
    (tmp_path / lost[0]).unlink()
    if lost[0] == ROOT_KEY:
        (tmp_path / "issuercert.pem").unlink()
    before = contents(tmp_path)
    for work in (ca_in(tmp_path).check, lambda: issue(ca_in(tmp_path))):
        with pytest.raises(UsageError, match=rf"{lost[0]} of the certificate .*{lost[1]} is miss"):
            work()
    assert contents(tmp_path) == before


def test_a_lost_certificate_is_made_again_for_the_same_key(tmp_path: Path) -> None:
    ca_in(tmp_path).prepare()
    before = contents(tmp_path)
    (tmp_path / "issuercert.pem").unlink()
    verify(issue(ca_in(tmp_path)), der_of(tmp_path / "issuercert.pem"))
    after = contents(tmp_path)
    assert all(after[name] == before[name] for name in (ROOT_KEY, ROOT, "signkey.pem"))


def test_encrypted_keys(tmp_path: Path) -> None:
    issue(ca_in(tmp_path, b"geheim", "wurzel"))
    for name, password in ((ROOT_KEY, b"wurzel"), ("signkey.pem", b"geheim")):
        pem = (tmp_path / name).read_bytes()
        assert pem.startswith(b"-----BEGIN ENCRYPTED PRIVATE KEY-----\n")
        assert serialization.load_pem_private_key(pem, password) is not None
    before = contents(tmp_path)
    issue(ca_in(tmp_path, b"geheim"))  # the root is not needed any more
    for wrong in (None, b"falsch"):
        with pytest.raises(CertificateError, match=r"signkey\.pem") as caught:
            ca_in(tmp_path, wrong).check()
        assert "falsch" not in str(caught.value)
    (tmp_path / "issuercert.pem").unlink()
    with pytest.raises(CertificateError, match=ROOT_KEY):
        issue(ca_in(tmp_path, b"geheim", "falsch"))
    issue(ca_in(tmp_path, b"geheim", "wurzel"))
    assert contents(tmp_path)[ROOT] == before[ROOT]


def test_a_key_of_another_certificate(tmp_path: Path) -> None:
    ca_in(tmp_path).prepare()
    (tmp_path / "signkey.pem").write_bytes(PrivateKey.generate(1536).to_pem(None))
    with pytest.raises(CertificateError, match="the key is not that of the certificate"):
        ca_in(tmp_path).check()


@pytest.mark.parametrize("junk", [b"", b"junk", b"-----BEGIN CERTIFICATE-----\nAAAA\n", b"\0" * 99])
@pytest.mark.parametrize("name", ["signkey.pem", "issuercert.pem"])
def test_damaged_files_are_named_and_left(name: str, junk: bytes, tmp_path: Path) -> None:
    ca_in(tmp_path).prepare()
    (tmp_path / name).write_bytes(junk)
    with pytest.raises(CertificateError, match=name):
        ca_in(tmp_path).check()
    with pytest.raises(CertificateError, match=name):
        issue(ca_in(tmp_path))
    assert (tmp_path / name).read_bytes() == junk


def test_an_issuer_without_key_identifier(tmp_path: Path) -> None:
    ca = make_ca(tmp_path / "x")
    key = serialization.load_pem_private_key(ca.key.read_bytes(), None)
    assert isinstance(key, rsa.RSAPrivateKey)
    issuer = x509.load_pem_x509_certificate(ca.certificate.read_bytes())
    bare = x509.CertificateBuilder(
        issuer.issuer, issuer.subject, key.public_key(), issuer.serial_number,
        datetime.now(UTC), datetime.now(UTC) + timedelta(1),
    ).sign(key, hashes.SHA256())  # fmt: skip
    ca.certificate.write_bytes(bare.public_bytes(serialization.Encoding.PEM))
    settings = CaSettings(str(tmp_path), str(ca.key), str(ca.certificate), str(tmp_path / "s"))
    made = x509.load_der_x509_certificate(issue(LocalCa(settings, PROFILE)))
    made.verify_directly_issued_by(bare)
    found = made.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value
    assert (
        found.key_identifier == x509.SubjectKeyIdentifier.from_public_key(key.public_key()).digest
    )


# -- serial numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize("there", [True, False])
def test_a_serial_file_elsewhere(there: bool, tmp_path: Path) -> None:
    """On a share of several machines, say: the link stays."""
    (tmp_path / "ca").mkdir(0o755)
    (tmp_path / "shared").mkdir()
    number = tmp_path / "shared" / "number"
    if there:
        number.write_bytes(b"6")
    (tmp_path / "second").symlink_to("shared/number")
    link = tmp_path / "ca" / "certserial"
    link.symlink_to("../second")
    made = Parts.of(issue(ca_in(tmp_path / "ca")))
    assert link.is_symlink()
    assert int(number.read_bytes()) == int.from_bytes(made.serial, "big")
    assert not there or number.read_bytes() == b"7"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
@pytest.mark.parametrize("whose", ["link", "folder", "mode"])
def test_no_link_of_somebody_elses_is_followed_to_write(whose: str, tmp_path: Path) -> None:
    """Root would write a number over any file."""
    folder, victim = tmp_path / "ca", tmp_path / "victim"
    folder.mkdir(0o777 if whose == "mode" else 0o755)
    victim.write_bytes(b"6")
    link = folder / "certserial"
    link.symlink_to(victim)
    if whose != "mode":
        os.chown(link if whose == "link" else folder, 1000, 1000, follow_symlinks=False)
    with pytest.raises(CertificateError, match="a symbolic link that others can change"):
        issue(ca_in(folder))
    assert victim.read_bytes() == b"6"


def test_a_serial_file_that_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "certserial").symlink_to("certserial")
    with pytest.raises(CertificateError, match="Too many levels of symbolic links"):
        issue(ca_in(tmp_path))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [(b"41", 42), (b"41\n", 42), (b"0", 1), (b"127", 128), (b"9" * 30, 10**30)],
)
def test_the_next_serial(text: bytes, wanted: int, tmp_path: Path) -> None:
    (tmp_path / "certserial").write_bytes(text)
    made = Parts.of(issue(ca_in(tmp_path)))
    assert int.from_bytes(made.serial, "big", signed=True) == wanted
    assert (tmp_path / "certserial").read_bytes() == b"%d" % wanted


@pytest.mark.parametrize(
    "text", [None, b"", b"x", b"-5", b"1 2", b"9" * 50, b"%d" % ((1 << 160) - 1), "²".encode()]
)
def test_a_serial_file_that_says_nothing(text: bytes | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "certserial").write_bytes(text)
    made = int.from_bytes(Parts.of(issue(ca_in(tmp_path))).serial, "big", signed=True)
    assert 10**19 <= made <= 18 * 10**18
    assert made < 1 << 64
    assert (tmp_path / "certserial").read_bytes() == b"%d" % made


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
@pytest.mark.parametrize("name", ["certserial", ".lock.swtpm-localca", "issuercert.pem"])
def test_nothing_in_the_way_makes_a_ca_wait(
    make: Callable[[Path], object], name: str, tmp_path: Path
) -> None:
    ca_in(tmp_path).prepare()
    (tmp_path / name).unlink(missing_ok=True)
    make(tmp_path / name)
    with pytest.raises(CertificateError, match=rf"{name}.*(pipe|no file|directory)"):
        issue(ca_in(tmp_path))


# -- the lock -----------------------------------------------------------------------------------


def test_a_wait_for_the_lock_has_an_end_and_names_the_holder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(localca, "_LOCK_SECONDS", 0.1)
    issue(ca_in(tmp_path))
    before = contents(tmp_path)
    with (tmp_path / ".lock.swtpm-localca").open("rb") as held:  # to read it is enough
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(CertificateError, match=rf"lock\.swtpm.*process {os.getpid()} keeps"):
            issue(ca_in(tmp_path))
    assert contents(tmp_path) == before
    issue(ca_in(tmp_path))


def test_a_wait_for_the_lock_can_be_ended(tmp_path: Path) -> None:
    ca = ca_in(tmp_path)
    ca.prepare()
    with (tmp_path / ".lock.swtpm-localca").open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        ca.give_up()
        with pytest.raises(CertificateError, match="was ended"):
            issue(ca)


@pytest.mark.parametrize(("folder", "lock"), [(0o700, 0o600), (0o755, 0o600), (0o770, 0o660)])
def test_the_lock_is_for_those_who_may_write_to_the_folder(
    folder: int, lock: int, tmp_path: Path
) -> None:
    """One that an earlier version or the C suite left open to all is closed to them."""
    tmp_path.chmod(folder)
    for before in (None, 0o755):
        if before is not None:
            (tmp_path / ".lock.swtpm-localca").chmod(before)
        issue(ca_in(tmp_path))
        assert stat.S_IMODE((tmp_path / ".lock.swtpm-localca").stat().st_mode) == lock


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give a folder away")
def test_the_owner_of_a_folder_gets_no_lock_in_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """He turns a link as soon as the lock is there."""
    roots, users, link = tmp_path / "roots", tmp_path / "users", tmp_path / "link"
    for folder in (roots, users):
        folder.mkdir()
    os.chown(users, 12345, 12345)
    link.symlink_to(roots)
    fstat = os.fstat

    def turn(fd: int) -> os.stat_result:
        monkeypatch.undo()
        link.unlink()
        link.symlink_to(users)
        return fstat(fd)

    monkeypatch.setattr(os, "fstat", turn)
    os.close(localca._open_lock(str(link / "lock")))
    assert (roots / "lock").stat().st_uid == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_file_with_another_name_is_not_given_away_as_a_lock(tmp_path: Path) -> None:
    """A user may have put a link to a file of root's in the place of the lock."""
    folder, precious = tmp_path / "ca", tmp_path / "precious"
    folder.mkdir()
    os.chown(folder, 1234, 1234)
    precious.touch(0o600)
    precious.chmod(0o604)
    os.link(precious, folder / ".lock.swtpm-localca")
    issue(ca_in(folder))
    found = precious.stat()
    assert (found.st_uid, stat.S_IMODE(found.st_mode)) == (0, 0o604)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_users_ca_stays_usable_after_root_has_issued_from_it(tmp_path: Path) -> None:
    """Whatever root's umask is, and whoever made which file."""
    folder = tmp_path / "ca"
    folder.mkdir()
    os.chown(folder, 1234, 1234)
    os.umask(0o027)
    issue(ca_in(folder))
    for path in folder.iterdir():
        assert (path.stat().st_uid, path.stat().st_gid) == (1234, 1234), path
    (folder / "certserial").chmod(0o600)
    issue(ca_in(folder))
    assert stat.S_IMODE((folder / "certserial").stat().st_mode) == 0o600
    tmp_path.chmod(0o755)
    tmp_path.parent.chmod(0o755)

    @in_child
    def as_user() -> None:
        os.chdir(folder)
        os.setgroups([])
        os.setgid(1234)
        os.setuid(1234)
        os.umask(0o022)
        issue(LocalCa(CaSettings.in_folder("."), PROFILE, environ={}))

    as_user()
    before = contents(folder)
    issue(ca_in(folder))
    assert int(contents(folder)["certserial"]) == int(before["certserial"]) + 1


def test_a_ca_is_made_where_no_thread_is_to_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    verify(issue(ca_in(tmp_path)), der_of(tmp_path / "issuercert.pem"))


# -- orders -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vmid", "subject"),
    [
        ("", "unknown"),
        ("vm,1+2", "vm_1_2"),
        (r"a\+b", "a+b"),
        ('a"b', 'a"b'),
        ("#1", "#1"),
        ("ü=7", "ü=7"),
        (r"a\b", r"a\b"),
    ],
)
def test_names_of_vms(vmid: str, subject: str, tmp_path: Path) -> None:
    ca = ca_in(tmp_path)
    made = x509.load_der_x509_certificate(ca.issue(ca.request(*ORDER[:4], vmid)))
    assert [attribute.value for attribute in made.subject] == [subject]


def test_a_bad_order_costs_no_serial_number(tmp_path: Path) -> None:
    ca = LocalCa(CaSettings.in_folder(str(tmp_path)), CaProfile())
    for kind in (CertificateKind.PLATFORM, CertificateKind.EK):
        with pytest.raises(UsageError):
            ca.issue(ca.request(kind, *ORDER[1:3]))
    assert not list(tmp_path.iterdir())


def test_a_platform_of_a_tpm12(tmp_path: Path) -> None:
    ca = ca_in(tmp_path)
    made = ca.issue(ca.request(CertificateKind.PLATFORM, *ORDER[1:3], is_tpm2=False))
    assert made[:3] == b"\x10\x01\x00"
    assert int.from_bytes(made[3:5], "big") == len(made) - 5
    verify(made[7:], der_of(tmp_path / "issuercert.pem"))


def test_a_link_in_place_of_the_lock(tmp_path: Path) -> None:
    target = tmp_path / "target"
    (tmp_path / ".lock.swtpm-localca").symlink_to(target)
    with pytest.raises(CertificateError, match="lock"):
        issue(ca_in(tmp_path))
    assert not target.exists()
