"""``swtpm-create-tpmca``: a local CA whose key is in a TPM."""

from __future__ import annotations

import contextlib
import os
import shlex
import stat
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from vtpm_cuse.cli.words.commandline import CommandLine
from vtpm_cuse.cli.words.help import help_text
from vtpm_cuse.cli.words.program import complain, inform, run_program, version_text
from vtpm_cuse.cli.words.table import Example, Option, Program, Term
from vtpm_cuse.errors import CertificateError, UsageError
from vtpm_cuse.service.confine import secrecy

if TYPE_CHECKING:
    from vtpm_cuse.ca.settings import CaSettings

_KEY: Final = "swtpm-localca-tpmca-key.pem"
_PUBLIC_KEY: Final = "swtpm-localca-tpmca-pubkey.pem"
_CERTIFICATE: Final = "swtpm-localca-tpmca-cert.pem"
_ALGORITHMS: Final = ("rsa2048", "rsa3072", "ecc256", "secp256r1", "ecc384", "secp384r1")
_FOLDER_MODE: Final = 0o750
_PUBLIC_MODE: Final = 0o644
_CONFIG_MODE: Final = 0o640
_WHERE_FORMS: Final = (
    "WHERE is fd:NUMBER of a descriptor, file:PATH, env:VARIABLE or pass:PASSWORD, or the password "
    "itself; others can see the last two."
)

PROGRAM: Final = Program(
    "swtpm-create-tpmca",
    "create a CA for swtpm_localca whose key is in a TPM",
    (
        Option("dir", "folder of the CA, which is made", metavar="DIR"),
        Option(
            "overwrite",
            "use a folder that is there: what is missing in it is made, and what is there is kept",
        ),
        Option("tpm2", "the TPM is a TPM 2.0; needed"),
        Option(
            "tpm",
            "the TPM: path of a device or Unix socket, or HOST:PORT; default: /dev/tpmrm0",
            metavar="PATH",
        ),
        Option(
            "algorithm",
            "what the key is; default: rsa2048",
            metavar="ALGORITHM",
            choices=_ALGORITHMS,
        ),
        Option(
            "key-password",
            "where the key's password is, if it is to have one",
            metavar="WHERE",
            more=f"{_WHERE_FORMS} The configuration will have it, too.",
        ),
        Option(
            "parent",
            "handle of a persistent storage key of which the key is made, as 0x81000001; by "
            "default a primary key of the owner's, which is made anew each time",
            metavar="HANDLE",
        ),
        Option(
            "srk-password",
            "where the password of that key is or, without --parent, of the owner",
            metavar="WHERE",
            more=f"{_WHERE_FORMS} The configuration will have it, too.",
        ),
        Option("outfile", "write the configuration there and not to the output", metavar="FILE"),
        Option("owner", "user whose the CA's files are to be; for root", metavar="USER"),
        Option("group", "their group; for root", metavar="GROUP"),
        Option("pid", "accepted, without effect: there is no token", metavar="ID"),
        Option("version", "display the version and exit"),
        Option("help", "display this help and exit", letter="h"),
    ),
    description=(
        "Creates a root CA and, below it, a CA whose key a TPM has made and alone can use, and "
        "prints the configuration with which swtpm_localca(8) signs by it: swtpm-localca.conf(5). "
        "No other program is needed. The TPM may be a chip, or one of swtpm(8) that is kept for "
        "this.",
        "In a folder that is there no key is ever replaced: one that is no longer wanted has to "
        "be moved away. The key file is of no use without the TPM, nor after TPM2_Clear.",
        "The root CA's key is a file as any other: keep it elsewhere, it is needed for nothing "
        "but a new CA.",
    ),
    examples=(
        Example(
            "With a chip, for user tss",
            "swtpm-create-tpmca --tpm2 --dir /var/lib/swtpm-localca --owner tss \\\n"
            "  --group tss --algorithm ecc384 --outfile /etc/swtpm-localca.conf",
        ),
        Example(
            "With a TPM of its own, which has to run when certificates are made",
            "mkdir -m 700 /var/lib/ca-tpm\n"
            "swtpm socket --tpm2 --tpmstate dir=/var/lib/ca-tpm --daemon \\\n"
            "  --managed type=unixio,path=/run/ca-tpm --flags startup-clear\n"
            "swtpm-create-tpmca --tpm2 --dir /var/lib/swtpm-localca \\\n"
            "  --tpm /run/ca-tpm --key-password file:/root/ca-password \\\n"
            "  --outfile /etc/swtpm-localca.conf\n"
            "swtpm_setup --tpm2 --tpm-state dir:///var/lib/vtpm0 --create-ek-cert",
        ),
    ),
    environment=(Term("SWTPM_ROOTCA_PASSWORD", "Password of the root CA's key."),),
    files=(
        Term(f"DIR/{_KEY}", "The key, encrypted by the TPM: TSS2 PRIVATE KEY."),
        Term(f"DIR/{_PUBLIC_KEY}", "Its public half."),
        Term(f"DIR/{_CERTIFICATE}", "Its certificate."),
        Term("DIR/swtpm-localca-rootca-privkey.pem", "The root CA's key."),
        Term("DIR/swtpm-localca-rootca-cert.pem", "Its certificate, which verifiers need."),
    ),
    see_also=("swtpm_localca(8)", "swtpm-localca.conf(5)", "swtpm_cert(8)", "swtpm_setup(8)"),
)


def main() -> int:
    """The program swtpm-create-tpmca."""
    return run_program(lambda: _run(sys.argv[1:]), complain)


def _run(words: list[str]) -> int:
    line = CommandLine(PROGRAM, words)
    if line.has("help"):
        print(help_text(PROGRAM), end="")
    elif line.has("version"):
        print(version_text("TPM CA tool ", "TPM"))
    else:
        secrecy.hide_process()  # before keys and passwords are in memory
        _create(line)
    return 0


def _create(line: CommandLine) -> None:
    from vtpm_cuse.ca.issuers import own_key
    from vtpm_cuse.ca.localca import LocalCa
    from vtpm_cuse.ca.settings import CaProfile
    from vtpm_cuse.ca.tpmkeys import check_tpm

    settings = _settings(line)
    owner = _owner(line)
    text = _configuration(settings)
    path = line.value("outfile")
    if path is not None and (settings.password or settings.tpm.parent_password):
        _check_private(path)
    check_tpm(settings.tpm)
    _make_folder(settings.state_dir, owner, overwrite=line.has("overwrite"))
    if os.path.lexists(settings.signing_key) and line.has("algorithm"):
        _check_algorithm(settings)
    LocalCa(settings, CaProfile(), complain).prepare()
    pem = own_key(settings.signing_key, settings.password, settings.tpm).public.to_pem()
    _write(os.path.join(settings.state_dir, _PUBLIC_KEY), pem, _PUBLIC_MODE)
    if path is None:
        inform(text)
    else:
        _write(path, os.fsencode(text), _CONFIG_MODE, owner)


def _check_private(path: str) -> None:
    """A file that is there keeps its mode. Raises UsageError where all can read passwords then."""
    with contextlib.suppress(FileNotFoundError):
        found = os.stat(path)
        if stat.S_ISREG(found.st_mode) and found.st_mode & stat.S_IROTH:
            raise UsageError(
                f"Others can read {path}, which is to have a password",
                hint=f"chmod o= {shlex.quote(path)}",
            )


def _check_algorithm(settings: CaSettings) -> None:
    """Raises UsageError for a key that is there and is another one than what is asked for."""
    from vtpm_cuse.ca.issuers import own_key
    from vtpm_cuse.ca.tpmkeys import TpmKey

    key = own_key(settings.signing_key, settings.password, settings.tpm)
    if not (isinstance(key, TpmKey) and key.is_a(settings.new_key)):
        raise UsageError(
            f"{settings.signing_key} is there, and no {settings.new_key} key.",
            hint="move it and its certificate away to have a new one",
        )


def _settings(line: CommandLine) -> CaSettings:
    """What the configuration will say, and what the key is to be. Raises UsageError."""
    from vtpm_cuse.ca.passwords import read_password
    from vtpm_cuse.ca.settings import CaSettings
    from vtpm_cuse.ca.tpmkeys import KeyTpm, read_handle

    if not line.has("tpm2"):
        raise UsageError("TPM1.2 is not supported anymore.", hint="see --tpm2")
    if not (folder := line.value("dir")):
        raise UsageError("The CA needs a folder.", hint="see --dir")
    algorithm = line.value("algorithm") or _ALGORITHMS[0]
    if algorithm not in _ALGORITHMS:
        raise UsageError(f"Unknown algorithm '{algorithm}'.", hint=", ".join(_ALGORITHMS))
    passwords = {}
    for option in ("key-password", "srk-password"):
        value = line.value(option)
        passwords[option] = read_password(value, option) if value is not None else b""
    folder = os.path.abspath(folder)
    settings = CaSettings(
        folder,
        os.path.join(folder, _KEY),
        os.path.join(folder, _CERTIFICATE),
        os.path.join(folder, "certserial"),
        passwords["key-password"] or None,
        tpm=KeyTpm(_whole(line.value("tpm") or ""), passwords["srk-password"]),
        new_key=algorithm,
        origin="the command line",
    )
    if (handle := line.value("parent")) is None:
        return settings
    try:
        return replace(settings, parent=read_handle(handle))
    except ValueError as exc:
        raise UsageError(f"{exc} of --parent") from exc


def _whole(where: str) -> str:
    """A TPM for a configuration that is read in another folder."""
    from vtpm_cuse.ca.tpmkeys import USUAL_TPM

    return os.path.abspath(where) if "/" in where else where or USUAL_TPM


def _configuration(settings: CaSettings) -> str:
    """The lines of the configuration. Raises UsageError where its grammar cannot hold them."""
    from vtpm_cuse.ca import configfile

    rows = {
        "statedir": settings.state_dir,
        "signingkey": settings.signing_key,
        "signingkey_tpm": settings.tpm.named,
        "issuercert": settings.issuer_certificate,
        "certserial": settings.serial_file,
        "signingkey_password": os.fsdecode(settings.password or b""),
        "parentkey_password": os.fsdecode(settings.tpm.parent_password),
    }
    rows = {name: value for name, value in rows.items() if value}
    text = "".join(f"{name} = {value}\n" for name, value in rows.items())
    read = configfile.parse(text, {})
    for name, value in rows.items():
        if read.get(name) != value:
            what = "That password" if name.endswith("password") else f"'{value}'"
            raise UsageError(
                f"{what} cannot stand in a configuration file as {name}",
                hint="no '#', '${', line feed, or blank at an end",
            )
    return text


def _owner(line: CommandLine) -> tuple[int, int] | None:
    """User and group, -1 for as it is. Raises UsageError."""
    user, group = line.value("owner"), line.value("group")
    if user is None and group is None:
        return None
    if os.geteuid() != 0:
        raise UsageError("Only root can give files to others.", hint="see --owner and --group")
    from vtpm_cuse.service.confine.privileges import find_user

    return (
        -1 if user is None else find_user(user).uid,
        -1 if group is None else _group_number(group),
    )


def _group_number(text: str) -> int:
    if text.isascii() and text.isdigit():
        return int(text)
    import grp

    try:
        return grp.getgrnam(text).gr_gid
    except KeyError:
        raise UsageError(f"Group '{text}' does not exist.") from None


def _make_folder(path: str, owner: tuple[int, int] | None, *, overwrite: bool) -> None:
    """What is made in it later on has its owner. Raises UsageError, CertificateError."""
    from vtpm_cuse.files import make_folder

    if os.path.lexists(path) and not overwrite:
        raise UsageError(f"{path} exists already.", hint="see --overwrite")
    mine = os.geteuid(), os.getegid()
    given = tuple(new if new >= 0 else old for new, old in zip(owner or mine, mine, strict=True))
    try:
        make_folder(path, _FOLDER_MODE, (given[0], given[1]), umask=False)
    except OSError as exc:
        raise CertificateError(path, exc.strerror or str(exc)) from exc


def _write(path: str, data: bytes, mode: int, owner: tuple[int, int] | None = None) -> None:
    from vtpm_cuse.files import open_to_read, set_owner, write_output

    try:
        write_output(path, data, mode, streams=owner is None, of_folder=owner is None)
        if owner is not None:
            fd = open_to_read(path)
            try:
                set_owner(fd, *owner)
            finally:
                os.close(fd)
    except OSError as exc:
        raise CertificateError(path, exc.strerror or str(exc)) from exc
