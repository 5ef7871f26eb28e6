"""The local CA: a folder with keys, certificates and the last serial number.

`LocalCa.from_files` reads and checks, and writes nothing. `LocalCa.issue` makes
what is missing of the CA, takes a serial number and returns a certificate. The
folder is shared with the C suite: file names, the lock (flock) and the form of
the serial file are its.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import stat
import threading
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from vtpm_cuse.ca.certificates import (
    SERIAL_MAX,
    CertificateKind,
    CertificateRequest,
    Issuer,
    Validity,
    ca_certificate,
    stored_form,
    tpm_certificate,
)
from vtpm_cuse.ca.issuers import open_issuer, own_key, pem_certificate
from vtpm_cuse.ca.keys import PrivateKey
from vtpm_cuse.ca.names import common_name, escaped
from vtpm_cuse.ca.settings import CaProfile, CaSettings
from vtpm_cuse.ca.tpmkeys import KeyTpm, is_handle, new_key
from vtpm_cuse.errors import CertificateError, UsageError
from vtpm_cuse.files import (
    behind_own_links,
    make_folder,
    read_small,
    set_mode,
    set_owner,
    write_output,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from vtpm_cuse.ca.certificates import Maker, TpmSpecification
    from vtpm_cuse.ca.keys import PublicKey

CREATING_CA: Final = "Creating root CA and a local CA's signing key and issuer cert."

_NO_TPM: Final = KeyTpm()
_LOCK_NAME: Final = ".lock.swtpm-localca"
_ROOT_KEY: Final = "swtpm-localca-rootca-privkey.pem"
_ROOT_CERTIFICATE: Final = "swtpm-localca-rootca-cert.pem"
_ROOT_NAME: Final = "swtpm-localca-rootca"
_CA_NAME: Final = "swtpm-localca"
_CA_KEY_BITS: Final = 3072
_KEY_MODE: Final = 0o640
_PUBLIC_MODE: Final = 0o644
_FOLDER_MODE: Final = 0o750
_SERIAL_TEXT_MAX: Final = 49
_LOCK_SECONDS: Final = 30.0
_LOCK_POLL_SECONDS: Final = 0.02


class LocalCa:
    """A CA in a folder, or with its key in a TPM or a PKCS #11 token.

    Args:
        settings: Where it is.
        profile: What its certificates say.
        report: Takes lines about what is being done.
        environ: For the password of the root key.
    """

    def __init__(
        self,
        settings: CaSettings,
        profile: CaProfile,
        report: Callable[[str], None] = lambda _: None,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self._settings, self._profile, self._report = settings, profile, report
        self._root_password = os.fsencode(environ.get("SWTPM_ROOTCA_PASSWORD", "")) or None
        self._issuer: Issuer | None = None
        self._given_up = threading.Event()

    @classmethod
    def from_files(
        cls,
        configfile: str | None = None,
        optsfile: str | None = None,
        report: Callable[[str], None] = lambda _: None,
    ) -> LocalCa:
        """The CA of these files, or of the user's, the system's, the built-in ones. Writes nothing.

        Raises:
            UsageError: A file cannot be read, or says what cannot be.
            CertificateError: The CA's key or certificate is no good.
        """
        ca = cls(
            CaSettings.load(configfile, os.environ), CaProfile.load(optsfile, os.environ), report
        )
        ca.check()
        return ca

    @property
    def tpm(self) -> Mapping[str, str]:
        """What its options say of TPMs: see `CaProfile`."""
        return self._profile.tpm

    def check(self) -> None:
        """Opens the CA if it is there, and sees whether it can be made if not. Writes nothing.

        Raises:
            UsageError: It can be neither.
            CertificateError: Its key or certificate is no good.
        """
        settings = self._settings
        if not self._is_complete():
            self._check_can_be_made()
        else:
            self._open()
        if os.path.isdir(settings.state_dir) and not os.access(settings.state_dir, os.W_OK):
            raise UsageError(
                f"Need write rights on statedir {settings.state_dir}", hint=f"see {settings.origin}"
            )

    def prepare(self) -> None:
        """Makes what is missing of the CA and opens it: what takes long is done before `issue`.

        Raises:
            UsageError: It cannot be made.
            CertificateError: Its key or certificate is no good, or a file cannot be written.
        """
        with self._locked():
            self._complete()
        if self._issuer is None:
            self._open()

    def request(
        self,
        kind: CertificateKind,
        key: PublicKey,
        tpm: Maker | None,
        specification: TpmSpecification | None = None,
        vmid: str = "",
        tpm_serial: str = "",
        *,
        is_tpm2: bool = True,
        allow_signing: bool = False,
        decryption: bool = False,
    ) -> CertificateRequest:
        """What a certificate of this CA's will say, for `issue`: the rest is its options' to say.

        Args:
            kind: EK, platform, IAK or IDevID.
            key: That key; of a platform, the EK.
            tpm: The TPM's maker; needed for all but an IAK and IDevID.
            specification: What the TPM implements; needed for an EK.
            vmid: Name of the VM; "unknown" stands for none.
            tpm_serial: The TPM's serial number; needed for an IAK and IDevID.
            is_tpm2: TPM 2.0 and not 1.2.
            allow_signing: The EK may sign (TPM 2.0).
            decryption: The EK may decrypt (TPM 2.0).

        Raises:
            UsageError: That can be in no certificate.
        """
        profile = self._profile
        if kind is CertificateKind.PLATFORM and profile.platform is None:
            raise UsageError(
                "--platform-manufacturer and --platform-model and --platform version must all "
                f"be provided in {profile.origin}"
            )
        try:
            return CertificateRequest(
                kind,
                key,
                tpm,
                specification if kind is CertificateKind.EK else None,
                profile.platform,
                profile.subject if profile.subject is not None else _subject(kind, vmid),
                is_tpm2,
                allow_signing or profile.allow_signing,
                decryption or profile.decryption,
                tpm_serial,
            )
        except ValueError as exc:
            raise UsageError(f"No {kind.value} certificate can be made: {exc}") from exc

    def issue(self, request: CertificateRequest) -> bytes:
        """A certificate in DER, for a TPM 1.2 with its header; makes the CA if there is none.

        Raises:
            UsageError: The CA cannot be made.
            CertificateError: Its key or certificate is no good, or a file cannot be written.
        """
        with self._locked():
            self._complete()
            serial = self._next_serial()
        issuer = self._issuer or self._open()
        certificate = tpm_certificate(request, issuer, serial, Validity(_now()))
        return certificate if request.is_tpm2 else stored_form(certificate)

    # -- the CA itself ----------------------------------------------------------------------

    def _open(self) -> Issuer:
        settings = self._settings
        self._issuer = open_issuer(
            settings.issuer_certificate,
            settings.signing_key,
            settings.password,
            settings.pin,
            settings.environment,
            settings.tpm,
        )
        return self._issuer

    @property
    def _has_key_file(self) -> bool:
        return ":" not in self._settings.signing_key.partition("/")[0]

    def _is_complete(self) -> bool:
        paths = [self._settings.issuer_certificate]
        if self._has_key_file:
            paths.append(self._settings.signing_key)
        return all(os.path.lexists(path) for path in paths)

    def _check_can_be_made(self) -> None:
        settings = self._settings
        if not self._has_key_file and not is_handle(settings.signing_key):
            raise UsageError(
                f"The CA certificate {settings.issuer_certificate} of {settings.origin} is missing",
                hint="one for a key in a token cannot be made here",
            )
        pairs = [self._root_paths]
        if self._has_key_file:
            pairs.insert(0, (settings.signing_key, settings.issuer_certificate))
        for key, certificate in pairs:
            if os.path.lexists(certificate) and not os.path.lexists(key):
                raise UsageError(
                    f"The key {key} of the certificate {certificate} is missing",
                    hint="bring it back, or put the certificate away to have a new CA",
                )

    @property
    def _root_paths(self) -> tuple[str, str]:
        settings = self._settings
        own = settings.signing_key if self._has_key_file else settings.issuer_certificate
        folder = os.path.dirname(own)
        return os.path.join(folder, _ROOT_KEY), os.path.join(folder, _ROOT_CERTIFICATE)

    def _complete(self) -> None:
        """Makes what is missing, under the lock. What is there stays, after an interruption too."""
        if self._is_complete():
            return
        self._check_can_be_made()
        self._report(CREATING_CA)
        settings = self._settings
        root_key, root_certificate = self._root_paths
        in_memory = {root_key: self._root_password}
        if self._has_key_file:
            if not settings.tpm.named:
                in_memory[settings.signing_key] = settings.password
            elif not os.path.lexists(settings.signing_key):
                made = new_key(settings.tpm, settings.new_key, settings.password, settings.parent)
                self._keep(settings.signing_key, made.to_pem())
        missing = [path for path in in_memory if not os.path.lexists(path)]
        for path, new in zip(missing, _new_keys(len(missing)), strict=True):
            with _errors_of(path):
                self._keep(path, new.to_pem(in_memory[path]))
        root = self._pair(root_key, root_certificate, self._root_password, _ROOT_NAME, None)
        paths = (settings.signing_key, settings.issuer_certificate)
        self._issuer = self._pair(*paths, settings.password, _CA_NAME, root, settings.tpm)

    @staticmethod
    def _keep(path: str, pem: bytes) -> None:
        with _errors_of(path):
            write_output(path, pem, _KEY_MODE, of_folder=True)

    @staticmethod
    def _pair(
        key_path: str,
        certificate_path: str,
        password: bytes | None,
        name: str,
        issuer: Issuer | None,
        tpm: KeyTpm = _NO_TPM,
    ) -> Issuer:
        """The certificate of a key by *issuer*, or by itself, if there is none yet."""
        if not os.path.lexists(certificate_path):
            key = own_key(key_path, password, tpm)
            subject = common_name(name)
            signing = issuer or Issuer(subject, key.public.key_id, key)
            serial = secrets.randbits(158) | 1 << 158  # 20 bytes, as RFC 5280 allows at most
            made = ca_certificate(subject, key.public, signing, serial, Validity(_now()))
            with _errors_of(certificate_path):
                write_output(certificate_path, pem_certificate(made), _PUBLIC_MODE, of_folder=True)
        return open_issuer(certificate_path, key_path, password, tpm=tpm)

    # -- lock and serial number -------------------------------------------------------------

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        folder = self._settings.state_dir
        with _errors_of(folder):
            if not os.path.isdir(folder):
                self._report(f"Creating swtpm-localca dir '{folder}'.")
                make_folder(folder, _FOLDER_MODE, of_folder=True, umask=False)
        path = os.path.join(folder, _LOCK_NAME)
        with _errors_of(path):
            fd = _open_lock(path)
        try:
            self._take(fd, path)
            yield
        finally:
            os.close(fd)

    def _take(self, fd: int, path: str) -> None:
        """Waits for the lock, and not for ever: whoever can open the file can hold it."""
        end = time.monotonic() + _LOCK_SECONDS
        with _errors_of(path):
            while not _try_lock(fd):
                if time.monotonic() >= end:
                    raise CertificateError(
                        path,
                        f"{_holder(fd)} keeps this CA locked, for more than {_LOCK_SECONDS:.0f} s",
                    )
                if self._given_up.wait(_LOCK_POLL_SECONDS):
                    raise CertificateError(path, "the wait for the CA's lock was ended")

    def give_up(self) -> None:
        """Ends a wait for the lock. From any thread."""
        self._given_up.set()

    def _next_serial(self) -> int:
        """One more than the last, which the file keeps."""
        path = self._settings.serial_file
        with _errors_of(path):
            path = behind_own_links(path)
            try:
                text = read_small(path).strip()
            except FileNotFoundError:
                text = b""
            usable = text.isdigit() and len(text) <= _SERIAL_TEXT_MAX and int(text) < SERIAL_MAX
            last = int(text) if usable else _random_serial()
            write_output(path, b"%d" % (last + 1), _PUBLIC_MODE, of_folder=True)
        return last + 1


def _open_lock(path: str) -> int:
    """The lock file: for its owner and, where the folder is for a group, for that group.

    The C suite has it open to all, and so anybody can keep all set-ups waiting. What root makes
    in the folder of a user's CA is that user's. The folder is held: who can turn a link on the way
    could else be given a file in one folder as the owner of another.
    """
    above, name = os.path.split(path)
    folder_fd = os.open(above or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return _open_lock_in(folder_fd, name, path)
    finally:
        os.close(folder_fd)


def _open_lock_in(folder_fd: int, name: str, path: str) -> int:
    flags = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(name, flags | os.O_RDWR | os.O_CREAT, 0o600, dir_fd=folder_fd)
    except PermissionError:
        fd = os.open(name, flags | os.O_RDONLY, dir_fd=folder_fd)  # enough for flock(2)
    found, folder = os.fstat(fd), os.fstat(folder_fd)
    if not stat.S_ISREG(found.st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "it is no file", path)
    if found.st_nlink != 1 or found.st_size:
        return fd  # not made for this alone: it keeps owner and mode
    group = folder.st_mode & stat.S_IWGRP
    mode = 0o660 if group else 0o600
    with contextlib.suppress(PermissionError):
        if found.st_uid == os.geteuid() == 0:
            set_owner(fd, folder.st_uid, folder.st_gid)
        elif group and found.st_gid != folder.st_gid:
            set_owner(fd, -1, folder.st_gid)
        if stat.S_IMODE(found.st_mode) != mode:
            set_mode(fd, mode)
    return fd


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holder(fd: int) -> str:
    """Who has the lock, as far as the kernel says."""
    inode = b":%d" % os.fstat(fd).st_ino
    with contextlib.suppress(OSError), open("/proc/locks", "rb") as table:
        for line in table:
            fields = line.split()
            if len(fields) > 5 and fields[1] == b"FLOCK" and fields[5].endswith(inode):
                return f"process {fields[4].decode()}"
    return "another process"


def _new_keys(count: int) -> list[PrivateKey]:
    """So many at once, each on a processor of its own, if there are threads to be had."""
    made: list[PrivateKey] = []

    def make() -> None:
        made.append(PrivateKey.generate(_CA_KEY_BITS))

    threads = [threading.Thread(target=make) for _ in range(count - 1)]
    started = []
    for thread in threads:
        with contextlib.suppress(RuntimeError):
            thread.start()
            started.append(thread)
    for _ in range(count - len(started)):
        make()
    for thread in started:
        thread.join()
    if len(made) < count:
        raise CertificateError("CA key", "it cannot be generated")
    return made


def _random_serial() -> int:
    """Of 20 digits, as the C suite's, and of 64 bits: its older versions cannot count further."""
    return 10**19 + secrets.randbelow(8 * 10**18)


def _subject(kind: CertificateKind, vmid: str) -> str:
    # What separates the parts of a name becomes "_", as in the C suite; "\\+" is a plus sign.
    plain = re.sub(r"(?<!\\)\+", "_", vmid.replace(",", "_")).replace("\\+", "+")
    return ("serialNumber=" if kind.is_identity else "CN=") + escaped(plain or "unknown")


def _now() -> datetime:
    return datetime.now(UTC)


@contextlib.contextmanager
def _errors_of(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise CertificateError(path, exc.strerror or str(exc)) from exc
    except ValueError as exc:
        raise CertificateError(path, str(exc)) from exc
