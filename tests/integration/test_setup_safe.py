"""swtpm_setup and what can go wrong: an earlier TPM stays as it was, and nothing is left behind."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.support.setups import OURS, PEER, PEER_SWTPM, Word, Workshop, make_workshop
from tests.support.waiting import PATIENCE_SECONDS, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PEER_EMULATOR = " ".join((*PEER_SWTPM, "socket"))


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TPM of each version, with a volatile state that has to stay, too."""
    workshop = make_workshop(tmp_path_factory.mktemp("earlier"))
    directory = workshop.new_state("state")
    for words in ([], ["--tpm2"]):
        run = workshop.run(OURS, "--tpm-state", directory, *words)
        assert run.returncode == 0, run.stderr
    (directory / "tpm2-00.volatilestate").write_bytes(b"of the earlier TPM")
    return directory


@pytest.fixture
def state(workshop: Workshop, earlier: Path) -> Path:
    """The earlier TPMs, in a test's own folder."""
    return shutil.copytree(earlier, workshop.path / "state")


def contents(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file()
    }


def spoil_key(workshop: Workshop) -> None:
    (workshop.path / "key").write_text("no key at all")


def spoil_ca(workshop: Workshop) -> None:
    (workshop.ca / "signkey.pem").write_text("no key")
    (workshop.ca / "issuercert.pem").write_text("no certificate")


def spoil_ca_config(workshop: Workshop) -> None:
    (workshop.path / "conf" / "swtpm-localca.conf").write_text("nothing = here\n")


def use_tool(text: str) -> Callable[[Workshop], None]:
    def use(workshop: Workshop) -> None:
        tool = workshop.path / "tool"
        tool.write_text(f"#!/bin/sh\n{text}\n")
        tool.chmod(0o755)
        config = workshop.config.read_text().replace("swtpm_localca\n", f"{tool}\n", 1)
        workshop.config.write_text(config)

    return use


def nothing(_: Workshop) -> None:
    pass


@pytest.mark.parametrize(
    ("words", "spoil", "message"),
    [
        ("--cipher foo", nothing, "Unsupported cipher foo."),
        ("--config {path}/absent", nothing, "User root cannot read config file /"),
        ("--keyfile {path}/absent", nothing, "User root cannot read keyfile /"),
        ("--pwdfile {path}/absent", nothing, "User root cannot read passphrase file /"),
        ("--keyfile {path}/key", spoil_key, "Could not parse key hex string"),
        ("--keyfile-fd x", nothing, "Invalid file descriptor 'x' for --keyfile-fd"),
        ("--rsa-keysize 1024", nothing, "Unsupported RSA key size 1024."),
        ("--createek --iakkeyalgo rsa2048", nothing, "an EK certificate must be created as well"),
        ("--pcr-banks foo", nothing, "None of the selected algorithms are supported."),
        (
            "--create-ek-cert --write-ek-cert-files {path}/absent",
            nothing,
            "cannot access directory",
        ),
        ("--profile {{}}", nothing, "profile"),
        ("--take-ownership", nothing, "Taking ownership is not supported for TPM 2."),
        ("--create-ek-cert", spoil_ca, "no"),
        ("--create-ek-cert", spoil_ca_config, "Missing 'statedir' config value"),
        ("--create-ek-cert", use_tool("echo bad >&2; exit 3"), "exit with status 3: bad"),
        ("--create-ek-cert", use_tool("exit 0"), "made no certificate"),
        ("--tpm /bin/false", nothing, "/bin/false exit with status 1"),
        ("--tpm /proc/none/swtpm", nothing, "swtpm at /proc/none/swtpm is not an executable."),
        ("--logfile {path}/absent/log", nothing, "Cannot write to logfile /"),
        ("--runas nosuchuser", nothing, "Error: User 'nosuchuser' does not exist."),
        ("--nosuchoption", nothing, "unrecognized option '--nosuchoption'"),
    ],
)
def test_a_failed_overwrite_changes_nothing(
    workshop: Workshop,
    state: Path,
    words: str,
    spoil: Callable[[Workshop], None],
    message: str,
) -> None:
    spoil(workshop)
    before = contents(state)
    given = words.format(path=workshop.path).split(" ")
    run = workshop.run(OURS, "--tpm2", "--tpm-state", state, "--overwrite", *given)
    assert run.returncode == 1, run.stdout
    assert message in run.stderr
    assert "Traceback" not in run.stderr
    assert contents(state) == before
    assert list((workshop.path / "tmp").iterdir()) == []


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ("", 1, "Found existing TPM state 'permall'."),
        ("--not-overwrite", 0, "Not overwriting existing state file."),
        ("--not-overwrite --overwrite", 0, "Not overwriting existing state file."),
        ("--not-overwrite --config /proc/none", 0, "Not overwriting existing state file."),
    ],
)
def test_an_earlier_tpm_is_not_overwritten(
    workshop: Workshop, state: Path, words: str, status: int, message: str
) -> None:
    before = contents(state)
    for program in (OURS, PEER):
        run = workshop.run(program, "--tpm2", "--tpm-state", state, *words.split())
        assert (run.returncode, run.stdout + run.stderr) == (status, f"{message}\n")
    assert contents(state) == before


def test_overwrite_replaces_only_the_tpm_of_that_version(workshop: Workshop, state: Path) -> None:
    before = contents(state)
    run = workshop.run(OURS, "--tpm2", "--tpm-state", state, "--overwrite", "--createek")
    assert run.returncode == 0, run.stderr
    after = contents(state)
    assert after.keys() == before.keys() - {"tpm2-00.volatilestate"}
    assert after["tpm2-00.permall"] != before["tpm2-00.permall"]
    assert after["tpm-00.permall"] == before["tpm-00.permall"]


@pytest.mark.parametrize("words", ["--pcr-banks foo", "--createek", "--keyfile {path}/key"])
def test_a_failed_reconfiguration_changes_nothing(
    workshop: Workshop, state: Path, words: str
) -> None:
    (state / "tpm2-00.volatilestate").unlink()
    (workshop.path / "key").write_text("00" * 16)
    before = contents(state)
    given = words.format(path=workshop.path).split()
    run = workshop.run(OURS, "--tpm2", "--tpm-state", state, "--reconfigure", *given)
    assert run.returncode == 1
    assert contents(state) == before


def test_reconfigure_makes_no_tpm(workshop: Workshop) -> None:
    empty = workshop.new_state("empty")
    run = workshop.run(OURS, "--tpm2", "--tpm-state", empty, "--reconfigure")
    assert (run.returncode, run.stderr) == (1, "There is no TPM state to reconfigure.\n")
    assert contents(empty) == {}


def test_a_tpm_in_use_is_left_alone(workshop: Workshop, state: Path) -> None:
    before = contents(state)
    with open(state / ".lock", "rb+") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for words in (["--overwrite"], ["--reconfigure"]):
            run = workshop.run(OURS, "--tpm2", "--tpm-state", state, *words)
            assert run.returncode == 1
            assert "Could not lock access to lockfile" in run.stderr
        run = workshop.run(OURS, "--tpm2", "--tpm-state", state, "--not-overwrite")
        assert run.returncode == 0
        assert contents(state) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
@pytest.mark.parametrize("emulator", [None, PEER_EMULATOR], ids=["engine", "swtpm"])
def test_a_signal_leaves_the_earlier_tpm(
    workshop: Workshop, state: Path, number: signal.Signals, emulator: str | None
) -> None:
    """The tool says that it runs, and then does not end: the signal comes in the middle."""
    started = workshop.path / "started"
    use_tool(f"touch {started}; exec sleep {PATIENCE_SECONDS}")(workshop)
    before = contents(state)
    words: list[Word] = [OURS, "--tpm2", "--tpm-state", state, "--overwrite", "--create-ek-cert"]
    words += [] if emulator is None else ["--tpm", emulator]
    process = subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=workshop.environment,
        start_new_session=True,
    )
    wait_until(started.exists, "what it runs is started", process=process)
    process.send_signal(number)
    assert process.stderr is not None
    if number == signal.SIGKILL:
        assert process.wait(PATIENCE_SECONDS) == -number
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.stderr.close()
    else:
        said = process.communicate(timeout=PATIENCE_SECONDS)[1].decode()
        assert process.returncode == 128 + number
        assert said == "Interrupted. What is stored is as it was.\n"
        assert list((workshop.path / "tmp").iterdir()) == []
    found = {n: d for n, d in contents(state).items() if not n.startswith(".swtpm_setup.")}
    assert found == before
    run = workshop.run(OURS, "--tpm2", "--tpm-state", state, "--overwrite")
    assert run.returncode == 0, run.stderr


def test_an_emulator_of_the_users_makes_the_same_tpm(workshop: Workshop) -> None:
    lines = []
    for name, words in (("engine", []), ("swtpm", ["--tpm", PEER_EMULATOR])):
        directory = workshop.new_state(name)
        key = ["--pwdfile-fd", "0"]
        command: list[Word] = [
            OURS,
            "--tpm2",
            "--tpm-state",
            directory,
            "--create-ek-cert",
            *words,
            *key,
        ]
        run = subprocess.run(
            command,
            check=True,
            capture_output=True,
            input="secret",
            text=True,
            env=workshop.environment,
        )
        rows = run.stdout.splitlines()
        lines.append([row for row in rows if not row.startswith(("Starting", "Ending"))])
        assert {path.name for path in directory.iterdir()} == {".lock", "tpm2-00.permall"}
    assert lines[0][-1] == "Successfully authored TPM state."
    assert sorted(lines[0]) == sorted(
        lines[1] + ["swtpm_localca: Creating root CA and a local CA's signing key and issuer cert."]
    )


def test_capabilities(workshop: Workshop) -> None:
    found = [json.loads(workshop.run(p, "--print-capabilities").stdout) for p in (OURS, PEER)]
    assert found[0]["type"] == found[1]["type"] == "swtpm_setup"
    newer = ("profile", "keyalgo")  # than Debian's version
    known = [f for f in found[0]["features"] if not any(word in f for word in newer)]
    assert known == found[1]["features"]


@pytest.mark.parametrize("how", [[], ["root"], ["root,skip-if-exist"], ["root,overwrite"]])
def test_config_files(workshop: Workshop, how: list[str]) -> None:
    """As root; the peer's lines and files, but for what only the newer version has."""
    ends = []
    for name, program in (("ours", OURS), ("peer", PEER)):
        home = workshop.path / name
        for _ in range(2):
            run = subprocess.run(
                [program, "--create-config-files", *how],
                check=False,
                capture_output=True,
                text=True,
                env={**workshop.environment, "XDG_CONFIG_HOME": str(home)},
            )
            said = (run.stdout + run.stderr).replace(str(home), "HOME")
            ends.append((run.returncode, said))
        if how:
            assert (home / "var/lib/swtpm-localca").is_dir()
            assert f"statedir = {home}/var" in (home / "swtpm-localca.conf").read_text()
    assert ends[:2] == ends[2:]


def test_quiet_and_logfile(workshop: Workshop) -> None:
    log, state = workshop.path / "log", workshop.new_state("state")
    words: list[Word] = ["--tpm2", "--tpm-state", state, "--createek", "--quiet"]
    run = workshop.run(OURS, *words, "--logfile", log)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    assert "Successfully authored TPM state." in log.read_text()
    assert log.stat().st_mode & 0o777 == 0o640
    run = workshop.run(OURS, *words)
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr == "Found existing TPM state 'permall'.\n"
    link = workshop.path / "link"
    link.symlink_to(log)
    run = workshop.run(OURS, *words, "--overwrite", "--logfile", link)
    assert (run.returncode, run.stderr) == (1, "Logfile must not be a symlink.\n")


def test_a_signal_ends_an_emulator_that_hangs(workshop: Workshop, state: Path) -> None:
    started, emulator = workshop.path / "started", workshop.path / "emulator"
    emulator.write_text(
        '#!/bin/sh\ncase "$*" in *print-capabilities*) echo \'{"features":["tpm-2.0"]}\';;\n'
        f"*) touch {started}; exec sleep 1000;; esac\n"
    )
    emulator.chmod(0o755)
    before = contents(state)
    process = subprocess.Popen(
        [OURS, "--tpm2", "--tpm-state", state, "--overwrite", "--tpm", emulator],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=workshop.environment,
    )
    wait_until(started.exists, "what it runs is started", process=process)
    process.terminate()
    # Without our signal to it, it would be waited for as long as any answer is.
    _, said = process.communicate(timeout=PATIENCE_SECONDS / 2)
    assert (process.returncode, said) == (143, b"Interrupted. What is stored is as it was.\n")
    assert contents(state) == before


@pytest.mark.parametrize("milliseconds", range(60, 240, 15))
def test_a_signal_at_any_time_is_in_time_or_too_late(workshop: Workshop, milliseconds: int) -> None:
    """Whenever it comes, the status tells the truth about the state, and nothing crashes."""
    state = workshop.new_state("state")
    process = subprocess.Popen(
        [OURS, "--tpm2", "--tpm-state", state, "--createek", "--rsa-keysize", "3072"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env=workshop.environment,
    )
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(milliseconds / 1000)
    process.terminate()
    status = process.wait(PATIENCE_SECONDS)
    made = (state / "tpm2-00.permall").exists()
    assert (status, made) in {(0, True), (143, False), (-signal.SIGTERM, False)}
