"""Set-ups in odd surroundings: other people's files, no standard output, no threads, odd tools."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cryptography import x509

from tests.support.files import open_files, umask
from tests.support.programs import module_of
from tests.support.setups import OURS, PEER_SWTPM, Word, Workshop, make_workshop
from tests.support.waiting import PATIENCE_SECONDS, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

USER = 48_211  # nobody's, and so without other processes
LOCALCA = str(Path(OURS).parent / "swtpm_localca")
CERT = str(Path(OURS).parent / "swtpm_cert")
TPM = ("--tpm-spec-family", "2.0", "--tpm-spec-level", "0", "--tpm-spec-revision", "183")
MAKER = ("--tpm-manufacturer", "id:1", "--tpm-model", "m", "--tpm-version", "id:2")
KEY = ("--type", "ek", "--ek", "c" * 512, "--tpm2")

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def set_up(
    workshop: Workshop, *words: Word, pass_fds: tuple[int, ...] = ()
) -> subprocess.CompletedProcess[str]:
    state = workshop.path / "state"
    state.mkdir(exist_ok=True)
    return workshop.run(OURS, "--tpm2", "--tpm-state", state, *words, pass_fds=pass_fds)


def has_tpm(workshop: Workshop) -> bool:
    return (workshop.path / "state" / "tpm2-00.permall").exists()


def use_tool(workshop: Workshop, text: str) -> Path:
    """Makes a program of *text* the one that makes certificates."""
    tool = workshop.path / "tool"
    tool.write_text(text)
    tool.chmod(0o755)
    config = workshop.config.read_text().replace("swtpm_localca\n", f"{tool}\n", 1)
    workshop.config.write_text(config)
    return tool


# -- whose configuration it is ------------------------------------------------------------------


@needs_root
@pytest.mark.parametrize("whose", ["conf", "conf/swtpm_setup.conf"])
def test_root_runs_no_program_that_others_name(workshop: Workshop, whose: str) -> None:
    use_tool(workshop, f"#!/bin/sh\ntouch {workshop.path}/ran\n")
    os.chown(workshop.path / whose, USER, USER)
    run = set_up(workshop, "--create-ek-cert")
    assert run.returncode == 1
    assert f"Root does not use {workshop.config}: others than root can change" in run.stderr
    assert "--config" in run.stderr
    assert len(run.stderr.splitlines()) == 1
    assert not (workshop.path / "ran").exists()
    assert not has_tpm(workshop)
    set_up(workshop, "--create-ek-cert", "--config", workshop.config)
    assert (workshop.path / "ran").exists()  # it was named


@needs_root
def test_root_writes_no_configuration_where_others_can_change_it(workshop: Workshop) -> None:
    for path in (workshop.path / "conf").iterdir():
        path.unlink()
    os.chown(workshop.path / "conf", USER, USER)
    run = workshop.run(OURS, "--create-config-files", "root")
    assert run.returncode == 1
    assert "no configuration of root's" in run.stderr
    assert not list((workshop.path / "conf").iterdir())


def test_a_program_in_the_current_folder_is_not_run_for_its_name(workshop: Workshop) -> None:
    tool = use_tool(workshop, "#!/bin/sh\ntouch ran\n")
    config = workshop.config.read_text().replace(str(tool), tool.name)
    workshop.config.write_text(config)
    for program in (
        [OURS, "--tpm2", "--tpm-state", ".", "--create-ek-cert"],
        [OURS, "--tpm2", "--tpm-state", ".", "--tpm", f"{tool.name} socket"],
    ):
        run = subprocess.run(
            program,
            check=False,
            capture_output=True,
            text=True,
            cwd=workshop.path,
            env={**workshop.environment, "PATH": ".::/usr/bin:/bin"},
        )
        assert run.returncode == 1
        assert tool.name in run.stderr
    assert not (workshop.path / "ran").exists()


# -- what the configuration says ----------------------------------------------------------------


@pytest.mark.parametrize("words", [("--create-ek-cert",), ("--create-platform-cert",)])
@pytest.mark.parametrize(
    ("text", "said"),
    [
        (" create_certs_tool = {tool}\n", "line 1: 'create_certs_tool' is not read as a setting"),
        ("create_certs_tool: {tool}\n", "line 1: 'create_certs_tool' is not read as a setting"),
        ("nothing of ours\n", "There is no setting in config file"),
        ("\ufeffcreate_certs_tool = {tool}\n", "begins with a byte order mark"),
        ("# nothing\n", "names no create_certs_tool"),
        ("", "names no create_certs_tool"),
        ("active_pcr_banks = sha256\n create_certs_tool = {tool}\n", "line 2: 'create_certs_tool'"),
        ("create_certs_tool =\n", "names no create_certs_tool"),
    ],
)
def test_no_other_ca_than_the_one_that_is_meant(
    workshop: Workshop, text: str, said: str, words: tuple[str, ...]
) -> None:
    file = workshop.path / "file"
    file.write_text(text.format(tool="/bin/false"))
    run = set_up(workshop, *words, "--config", file)
    assert run.returncode == 1
    assert said in run.stderr
    assert str(file) in run.stderr
    assert not has_tpm(workshop)
    assert not list(workshop.ca.iterdir())


def test_a_configuration_without_a_certificate_tool_makes_a_tpm_without_certificates(
    workshop: Workshop,
) -> None:
    run = set_up(workshop, "--createek", "--config", "/dev/null")
    assert (run.returncode, run.stderr) == (0, "")
    assert has_tpm(workshop)


@pytest.mark.parametrize("flags", [("--allow-signing",), ("--allow-signing", "--decryption"), ()])
def test_what_a_key_may_do_is_in_its_certificate(
    workshop: Workshop, flags: tuple[str, ...]
) -> None:
    copies = workshop.path / "copies"
    copies.mkdir()
    run = set_up(workshop, "--create-ek-cert", "--write-ek-cert-files", copies, *flags)
    assert run.returncode == 0, run.stderr
    for name, use in (("rsa2048", "key_encipherment"), ("secp384r1", "key_agreement")):
        der = (copies / f"ek-{name}.crt").read_bytes()
        found = x509.load_der_x509_certificate(der).extensions
        usage = found.get_extension_for_class(x509.KeyUsage).value
        assert usage.digital_signature is bool(flags)
        assert getattr(usage, use) is (len(flags) != 1)


def test_a_tool_of_the_users_is_told_what_a_key_may_do(workshop: Workshop) -> None:
    use_tool(workshop, f'#!/bin/sh\necho "$@" >> {workshop.path}/calls; exit 1\n')
    set_up(workshop, "--create-ek-cert", "--allow-signing", "--decryption")
    words = (workshop.path / "calls").read_text().split()
    assert {"--allow-signing", "--decryption"} <= set(words)


def test_what_the_options_file_says_of_the_tpm_is_certified(workshop: Workshop) -> None:
    options = workshop.path / "conf" / "swtpm-localca.options"
    options.write_text(
        '--tpm-manufacturer "id: 9"\n--tpm-model swtpm\n--tpm-version id:3\n'
        '--platform-manufacturer "Fedora XYZ" --platform-version 1 --platform-model m\n'
    )
    run = workshop.run(LOCALCA, *KEY, *TPM, "--dir", workshop.path)
    assert run.returncode == 0, run.stderr
    assert b"\x0c\x05id: 9" in (workshop.path / "ek.cert").read_bytes()
    run = workshop.run(LOCALCA, *KEY, *TPM, "--dir", workshop.path, "--tpm-manufacturer", "id:8")
    assert run.returncode == 0, run.stderr
    assert b"\x0c\x04id:8" in (workshop.path / "ek.cert").read_bytes()
    run = set_up(workshop, "--create-ek-cert", "--create-platform-cert")
    assert run.returncode == 0, run.stderr


# -- the CA's lock ------------------------------------------------------------------------------


def test_a_signal_ends_a_wait_for_the_cas_lock(workshop: Workshop) -> None:
    state = workshop.new_state("state")
    lock = workshop.ca / ".lock.swtpm-localca"
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        process = subprocess.Popen(
            [OURS, "--tpm2", "--tpm-state", state, "--create-ek-cert"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=workshop.environment,
        )
        wait_until(
            lambda: str(lock) in open_files(process.pid).values(),
            "it waits for the lock",
            process=process,
        )
        process.terminate()
        _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 128 + signal.SIGTERM
    assert errors == b"Interrupted. What is stored is as it was.\n"
    assert not has_tpm(workshop)


# -- what is said to nobody ---------------------------------------------------------------------


@pytest.mark.parametrize("output", ["full", "closed pipe"])
def test_where_nobody_hears_it_the_tpm_is_made_all_the_same(
    workshop: Workshop, output: str
) -> None:
    if output == "full":
        fd = os.open("/dev/full", os.O_WRONLY)
    else:
        read_end, fd = os.pipe()
        os.close(read_end)
    state = workshop.new_state("state")
    programs: tuple[list[Word], ...] = (
        [OURS, "--tpm2", "--tpm-state", state, "--create-ek-cert"],
        [LOCALCA, *KEY, *TPM, *MAKER, "--dir", workshop.path],
        [OURS, "--create-config-files", "root,overwrite"],
    )
    for words in programs:
        run = subprocess.run(
            words, check=False, stdout=fd, stderr=subprocess.PIPE, env=workshop.environment
        )
        assert (run.returncode, run.stderr) == (0, b""), words
    os.close(fd)
    assert has_tpm(workshop)
    assert (workshop.path / "ek.cert").exists()


def test_what_is_asked_for_is_missed(workshop: Workshop) -> None:
    with open("/dev/full", "wb") as full:
        run = subprocess.run([OURS, "--print-capabilities"], check=False, stdout=full)
    assert run.returncode == 1


# -- files in the way ---------------------------------------------------------------------------


@pytest.mark.parametrize("program", ["setup", "localca"])
def test_a_pipe_in_place_of_the_log_is_not_waited_for(workshop: Workshop, program: str) -> None:
    os.mkfifo(workshop.path / "log")
    words = ("--logfile", workshop.path / "log")
    if program == "setup":
        run = set_up(workshop, *words)
    else:
        run = workshop.run(LOCALCA, *KEY, *TPM, *MAKER, "--dir", workshop.path, *words)
    assert run.returncode == 1
    assert run.stderr == f"Cannot write to logfile {workshop.path}/log.; it is a pipe\n"
    assert not has_tpm(workshop)


READ: list[tuple[str, bytes]] = [
    ("--keyfile", b"0123456789abcdef" * 2),
    ("--pwdfile", b"a passphrase"),
    ("--profile-file", b'{"Name":"null"}'),
]


@pytest.mark.parametrize("option", [option for option, _ in READ])
def test_a_fifo_in_place_of_what_is_read_is_not_waited_for(workshop: Workshop, option: str) -> None:
    """Somebody holds it open, and writes nothing."""
    os.mkfifo(workshop.path / "fifo")
    holder = os.open(workshop.path / "fifo", os.O_RDWR)
    try:
        run = set_up(workshop, option, workshop.path / "fifo")
    finally:
        os.close(holder)
    assert run.returncode == 1
    assert "it is a pipe" in run.stderr + run.stdout
    assert not has_tpm(workshop)


@pytest.mark.parametrize(("option", "content"), READ)
def test_a_pipe_that_the_shell_passes_is_read(
    workshop: Workshop, option: str, content: bytes
) -> None:
    read_end, write_end = os.pipe()
    os.write(write_end, content)
    os.close(write_end)
    run = set_up(workshop, option, f"/dev/fd/{read_end}", pass_fds=(read_end,))
    os.close(read_end)
    if "does not support a profile" in run.stderr:
        pytest.skip("libtpms has no profiles")
    assert run.returncode == 0, run.stdout + run.stderr
    assert has_tpm(workshop)


def test_copies_of_certificates_follow_no_link(workshop: Workshop) -> None:
    (workshop.path / "target").write_bytes(b"precious")
    (workshop.path / "ek-rsa2048.crt").symlink_to("target")
    run = set_up(workshop, "--create-ek-cert", "--write-ek-cert-files", workshop.path)
    assert run.returncode == 1
    assert "ek-rsa2048.crt: it is a symbolic link" in run.stderr
    assert (workshop.path / "target").read_bytes() == b"precious"


@pytest.mark.parametrize("mask", [0, 0o077])
def test_configuration_files_are_nobody_elses_whatever_the_umask(
    workshop: Workshop, mask: int
) -> None:
    conf = workshop.path / "new" / "conf"
    with umask(mask):
        run = subprocess.run(
            [OURS, "--create-config-files", "root"],
            check=False,
            capture_output=True,
            env={**workshop.environment, "XDG_CONFIG_HOME": str(conf)},
        )
    assert run.returncode == 0
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in conf.rglob("*")}
    assert modes == {
        "swtpm_setup.conf": 0o644,
        "swtpm-localca.conf": 0o644,
        "swtpm-localca.options": 0o644,
        "var": 0o755,
        "lib": 0o755,
        "swtpm-localca": 0o750,
    }
    assert stat.S_IMODE(conf.stat().st_mode) == 0o700


# -- programs and processes ---------------------------------------------------------------------


def test_a_script_that_does_not_say_by_what_is_run_by_the_shell(workshop: Workshop) -> None:
    use_tool(workshop, f'{LOCALCA} "$@"\n')
    run = set_up(workshop, "--create-ek-cert")
    assert run.returncode == 0, run.stderr
    assert has_tpm(workshop)


@pytest.mark.skipif(not os.path.exists(PEER_SWTPM[0]), reason="needs the C suite")
def test_an_emulators_script_that_does_not_say_by_what_is_run_by_the_shell(
    workshop: Workshop,
) -> None:
    script = workshop.path / "emulator"
    script.write_text(f'exec {PEER_SWTPM[0]} "$@"\n')
    script.chmod(0o755)
    run = set_up(workshop, "--createek", "--tpm", f"{script} socket")
    assert run.returncode == 0, run.stderr
    assert has_tpm(workshop)


@pytest.fixture
def users_workshop() -> Iterator[Workshop]:
    """One that a user without other processes can use."""
    folder = Path(tempfile.mkdtemp(prefix="workshop."))
    try:
        workshop = make_workshop(folder)
        (folder / "state").mkdir()
        (folder / "tmp").mkdir()
        for path in (folder, *folder.rglob("*")):
            os.chown(path, USER, USER)
        yield workshop
    finally:
        shutil.rmtree(folder)


@needs_root
@pytest.mark.parametrize("limit", [1, 2, 3, 4])
def test_where_hardly_a_process_may_be_started_nothing_is_half_made(
    users_workshop: Workshop, limit: int
) -> None:
    code = (
        "import os, resource, sys\n"
        f"os.setgroups([]); os.setgid({USER}); os.setuid({USER})\n"
        f"resource.setrlimit(resource.RLIMIT_NPROC, ({limit}, {limit}))\n"
        "os.execv(sys.argv[1], sys.argv[1:])\n"
    )
    words = ("--tpm2", "--tpm-state", users_workshop.path / "state", "--create-ek-cert")
    run = users_workshop.run(sys.executable, "-c", code, OURS, *words)
    if limit == 1:
        assert run.returncode == 1
    if run.returncode:
        assert "ulimit -u" in run.stderr
        assert "Traceback" not in run.stderr
        assert not has_tpm(users_workshop)
        assert not list(users_workshop.ca.iterdir())
    else:
        assert has_tpm(users_workshop)


# -- secrets ------------------------------------------------------------------------------------

SAY_DUMPABLE = """
import ctypes, sys
from {module} import main
from vtpm_cuse.ca.keys import PrivateKey
real = PrivateKey.sign
def sign(self, *args):
    with open({path!r}, "a") as file:
        print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0), file=file)
    return real(self, *args)
PrivateKey.sign = sign
sys.exit(main())
"""


@pytest.mark.parametrize("module", ["swtpm_setup", "swtpm_localca", "swtpm_cert"])
def test_nobody_looks_into_a_process_that_has_keys(workshop: Workshop, module: str) -> None:
    (workshop.path / "state").mkdir()
    assert workshop.run(LOCALCA, *KEY, *TPM, *MAKER, "--dir", workshop.path).returncode == 0
    words: tuple[Word, ...] = (*KEY, *TPM, *MAKER, "--dir", workshop.path)
    if module == "swtpm_setup":
        words = ("--tpm2", "--tpm-state", workshop.path / "state", "--create-ek-cert")
    elif module == "swtpm_cert":
        words = (
            *("--tpm2", "--modulus", "c" * 512, *TPM, *MAKER, "--out-cert", "/dev/null"),
            *("--signkey", workshop.ca / "signkey.pem"),
            *("--issuercert", workshop.ca / "issuercert.pem"),
        )
    path = workshop.path / "dumpable"
    code = SAY_DUMPABLE.format(module=module_of(module), path=str(path))
    run = workshop.run(sys.executable, "-c", code, *words)
    assert run.returncode == 0, run.stderr
    assert set(path.read_text().split()) == {"0"}


def test_a_token_key_without_its_library_names_the_command(workshop: Workshop) -> None:
    issuer = workshop.path / "issuer.pem"
    assert workshop.run(LOCALCA, *KEY, *TPM, *MAKER, "--dir", workshop.path).returncode == 0
    shutil.copy(workshop.ca / "issuercert.pem", issuer)
    code = (
        "import sys; sys.modules['pkcs11'] = None\n"
        "from vtpm_cuse.cli.ca import swtpm_cert; sys.exit(swtpm_cert.main())"
    )
    run = workshop.run(
        *(sys.executable, "-c", code, "--tpm2", "--modulus", "c" * 512, *TPM, *MAKER),
        *("--signkey", "pkcs11:token=x;object=y", "--issuercert", issuer),
    )
    assert run.returncode == 1
    assert f"{sys.executable} -m pip install python-pkcs11" in run.stderr
    assert len(run.stderr.splitlines()) == 1
