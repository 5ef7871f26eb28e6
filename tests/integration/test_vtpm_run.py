"""`vtpm run` and `vtpm env` as their users meet them: terminals, signals, tools, sudden ends."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import resource
import select
import shutil
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Final

import pytest

from tests.support.fuse import mounts, needs_fuse
from tests.support.private import children
from tests.support.vtpm_run import VTPM
from tests.support.waiting import PATIENCE_SECONDS, wait_until
from vtpm_cuse.lab import Snapshot

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.vtpm_run import Place

AT_ONCE: Final = 24
"""As many as a busy machine of two processors starts in a few seconds; 200 were tried by hand."""


def first_line(process: subprocess.Popen[str]) -> list[str]:
    assert process.stdout is not None
    return process.stdout.readline().split()


def emulator_of(process: subprocess.Popen[str]) -> int:
    (found,) = [pid for pid, words in children(process.pid).items() if "cli.swtpm\0" in words]
    return found


@contextlib.contextmanager
def ends(*pids: int) -> Iterator[None]:
    """Processes that have ended behind the block, or shortly after."""
    fds = [os.pidfd_open(pid) for pid in pids]
    try:
        yield
        for fd in fds:
            assert select.select([fd], [], [], PATIENCE_SECONDS)[0], "a process goes on"
    finally:
        for fd in fds:
            os.close(fd)


# -- exit statuses, and what is wrong -------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "status"),
    [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", 137), ("kill -TERM $$", 143)],
)
def test_the_status_is_the_commands(place: Place, script: str, status: int) -> None:
    done = place.run("--", "sh", "-c", script)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", "")


def test_a_command_that_is_not_there_starts_no_tpm(place: Place, tmp_path: Path) -> None:
    """Where a TPM could not be had either: that is not what is complained about."""
    plain = tmp_path / "plain"
    plain.write_text("#!/bin/sh\n")
    nowhere = {**place.env, "PATH": f"{tmp_path}:/bin:/usr/bin"}
    words = ["--state", "/proc/nowhere"]
    for command, status, text in (
        ("no-such-command", 127, "There is no command 'no-such-command'"),
        ("", 127, "There is no command ''"),
        ("/no/such", 127, "There is no command '/no/such'"),
        (plain, 126, f"{plain} may not be executed; see its mode"),
        ("plain", 126, "plain may not be executed; see its mode"),
        (tmp_path, 126, f"{tmp_path} is a directory and no command"),
    ):
        done = place.run(*words, "--", command, env=nowhere)
        assert (done.returncode, done.stderr) == (status, f"vtpm run: {text}\n")
    assert place.run(*words, "true").returncode == 125


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ((), "There is no command; name one, or say --shell"),
        (("--bogus", "true"), "unrecognized option '--bogus'"),
        (("--shell", "true"), "With --shell there is no command"),
        (("--managed", "--raw", "true"), "--managed and --raw exclude each other"),
        (("--managed", "--tpm1.2", "true"), "A TPM 1.2 has no resource manager"),
        (("--name", "a/b", "true"), "'a/b' is no name for a TPM"),
        (("--name", "12", "true"), "'12' is no name for a TPM"),
        (("--from", "/etc/passwd", "true"), "Could not begin from /etc/passwd: it is no snapshot"),
        (("--from", "/no/file", "true"), "Could not begin from /no/file: No such file"),
        (("--save", "/dev/full", "true"), "/dev/full is no file"),
        (("--save", "/no/folder/x", "true"), "its folder is not there"),
        (("--trace", "/no/folder/x", "true"), "Could not write /no/folder/x: No such file"),
        (("--profile", "no-such", "true"), "The emulator did not start"),
        (("--from", "/etc/passwd", "--state", "/no/x", "true"), "is no snapshot"),
    ],
)
def test_own_failures_are_125(place: Place, words: tuple[str, ...], text: str) -> None:
    done = place.run(*words)
    assert done.returncode == 125
    assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_snapshot_knows_its_version(place: Place, tmp_path: Path) -> None:
    old, new = tmp_path / "1.2", tmp_path / "2.0"
    old.write_bytes(Snapshot(b"x", tpm2=False).to_bytes())
    new.write_bytes(Snapshot(b"x").to_bytes())
    done = place.run("--from", new, "--tpm1.2", "true")
    said = f"vtpm run: {new} is of a TPM 2.0; leave --tpm1.2 out\n"
    assert (done.returncode, done.stderr) == (125, said)
    done = place.run("--from", old, "--managed", "true")
    said = "vtpm run: A TPM 1.2 has no resource manager; leave --managed out\n"
    assert (done.returncode, done.stderr) == (125, said)


def test_options_end_at_the_command(place: Place) -> None:
    assert place.run("echo", "--shell", "-h", "--").stdout == "--shell -h --\n"
    assert place.run("--", "echo", "--").stdout == "--\n"


def test_a_script_without_its_first_line_is_run(place: Place, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("exit 9\n")
    script.chmod(0o755)
    assert place.run(script).returncode == 9


def test_a_script_that_nothing_runs(place: Place, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("#!/no/such/program\n")
    script.chmod(0o755)
    done = place.run(script)
    said = f"vtpm run: What runs {script} is not there; see its first line\n"
    assert (done.returncode, done.stderr) == (127, said)


def test_the_current_folder_has_gone(place: Place, tmp_path: Path) -> None:
    gone = tmp_path / "gone"

    def go() -> None:
        gone.mkdir()
        os.chdir(gone)
        gone.rmdir()

    assert place.run("true", preexec_fn=go).returncode == 0
    said = "vtpm run: The current folder has gone; give the whole path of x\n"
    for option in "--state", "--save":
        done = place.run(option, "x", "true", preexec_fn=go)
        assert (done.returncode, done.stderr) == (125, said)


def test_a_disk_that_is_full(place: Place, tmp_path: Path) -> None:
    done = place.run("--trace", "/dev/full", "true")
    assert done.returncode == 125
    assert "No space left on device" in done.stderr
    with open("/dev/full", "w") as full:
        assert subprocess.run([*VTPM, "run", "false"], env=place.env, stderr=full).returncode == 1

    def nothing_more() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))

    done = place.run("true", preexec_fn=nothing_more)
    assert done.returncode == 125
    assert "Traceback" not in done.stderr
    assert "The emulator did not start" in done.stderr


# -- what the command is given --------------------------------------------------------------


FAPI: Final = "TSS2_FAPICONF"


def test_the_environment_is_the_callers_but_for_the_tpm(place: Place) -> None:
    few = {"PATH": place.env["PATH"], "XDG_RUNTIME_DIR": str(place.folder), "A b%%": "x\ny"}
    others = ("VTPM_DEVICE", "TPM2TOOLS_TCTI", "TCTI", "TPM_INTERFACE_TYPE", "TPM_DEVICE", FAPI)
    outer = {**few, **dict.fromkeys(others, "of another")}
    done = place.run("--managed", "env", "-0", env=outer)
    found = dict(item.split("=", 1) for item in done.stdout.split("\0") if item)
    set_by_us = {name for name in found if name not in few}
    assert {name: found[name] for name in few} == few
    assert set_by_us == {
        *("VTPM_NAME", "VTPM_PATH", "VTPM_RAW_PATH", "TPM2TOOLS_TCTI", "TPM2OPENSSL_TCTI"),
        *("TPM2_PKCS11_TCTI", "TPM2TSSENGINE_TCTI", "TCTI", FAPI),
    }
    assert found["VTPM_PATH"].startswith(f"{place.folder}/vtpm-")
    assert found["VTPM_PATH"] in found["TPM2TOOLS_TCTI"] == found["TCTI"]


@pytest.mark.parametrize("odd", [b"a,b", b"a\nb", b"a\xffb", b"a b$'c"])
def test_an_odd_folder_hinders_nobody(place: Place, tmp_path: Path, odd: bytes) -> None:
    """Neither a client of the TPM itself nor whoever looks for it."""
    folder = os.path.join(os.fsencode(place.folder), odd)
    os.mkdir(folder, 0o700)
    env = {**place.env, "XDG_RUNTIME_DIR": os.fsdecode(folder), "TMPDIR": os.fsdecode(folder)}
    name = f"odd-{os.getpid()}"
    try:
        script = 'tpm2_getrandom --hex 8 >$0 && exec "$@"'
        words = ["sh", "-c", script, str(tmp_path / "random"), *VTPM, "env", name]
        done = place.run("--raw", "--name", name, *words, env=env)
        assert done.returncode == 0, done.stderr
        assert f"VTPM_NAME={name}\n" in done.stdout
    finally:
        wait_until(lambda: not os.listdir(folder), "all is removed")
        os.rmdir(folder)


def test_a_tpm_1_2_sets_nothing_for_those_of_2_0(place: Place) -> None:
    outer = {**place.env, "TPM2TOOLS_TCTI": "of another", "TCTI": "of another"}
    done = place.run("--tpm1.2", "sh", "-c", "test -S $VTPM_PATH && env", env=outer)
    assert done.returncode == 0
    assert "TCTI" not in done.stdout


MASKS: Final = ("SigBlk", "SigIgn", "SigCgt")
LIBRARYS: Final = 3 << 31
"""Signals 32 and 33, which posix_spawn of glibc leaves ignored and no program sees."""


def test_files_and_signals_are_as_the_caller_left_them(place: Place) -> None:
    """The same as without us, and closed files, and others that are open."""
    script = "cat /proc/self/status; ls /proc/$$/fd; cat <&7"

    def found(*words: str) -> list[str]:
        read_end, write_end = os.pipe()
        os.write(write_end, b"given\n")
        os.close(write_end)
        # dash knows descriptors of one digit alone.
        shell = ["bash", "-c", f'exec "$@" 7<&{read_end} {read_end}<&-', "sh"]
        try:
            done = subprocess.run(
                [*shell, *words, "sh", "-c", script],
                env=place.env,
                pass_fds=(read_end,),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=True,
            )
        finally:
            os.close(read_end)
        status, groups, rest = done.stdout.partition("nonvoluntary_ctxt_switches:")
        assert groups
        masks = [line.split() for line in status.splitlines() if line[:6] in MASKS]
        signals = [f"{name} {int(mask, 16) & ~LIBRARYS:x}" for name, mask in masks]
        return [*signals, *rest.splitlines()[1:]]

    assert found(*VTPM, "run") == found()
    assert found()[-5:] == ["0", "1", "2", "7", "given"]
    closed = 'exec "$@" <&- >&- 2>&-'
    look = "for i in 0 1 2; do [ ! -e /proc/$$/fd/$i ] || exit $((i + 1)); done"
    words = ["sh", "-c", closed, "sh", *VTPM, "run", "sh", "-c", look]
    assert subprocess.run(words, env=place.env).returncode == 0


# -- tools ----------------------------------------------------------------------------------

CHAIN: Final = """
set -e
for i in 1 2 3 4 5; do tpm2_createprimary -Q -C o -c $1/p$i.ctx; done
tpm2_create -Q -C $1/p5.ctx -u $1/k.pub -r $1/k.priv
tpm2_load -Q -C $1/p5.ctx -u $1/k.pub -r $1/k.priv -c $1/k.ctx
echo hello >$1/text
tpm2_sign -Q -c $1/k.ctx -o $1/sig $1/text
tpm2_verifysignature -Q -c $1/k.ctx -m $1/text -s $1/sig
"""


@pytest.mark.parametrize("more", [(), ("--device",)])
def test_tools_flush_nothing(place: Place, tmp_path: Path, more: tuple[str, ...]) -> None:
    if more:
        needs_fuse()
    done = place.run(*more, "sh", "-c", CHAIN, "sh", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_raw_tpm_has_three_places(place: Place, tmp_path: Path) -> None:
    done = place.run("--raw", "sh", "-c", CHAIN, "sh", tmp_path)
    assert done.returncode != 0
    assert "0x902" in done.stderr, "out of memory for object contexts"


def test_a_manufactured_one_has_its_certificate(place: Place, tmp_path: Path) -> None:
    script = "tpm2_getcap handles-nv-index"
    done = place.run("--manufactured", "--save", tmp_path / "s", "sh", "-c", script)
    assert "0x1C00002" in done.stdout
    assert place.run("--from", tmp_path / "s", "sh", "-c", script).stdout == done.stdout
    assert (tmp_path / "s").stat().st_mode & 0o777 == 0o600


def test_a_state_is_kept(place: Place, tmp_path: Path) -> None:
    state = tmp_path / "state"
    define = "tpm2_nvdefine -Q -C o -s 4 0x1500016"
    assert place.run("--state", state, "sh", "-c", define).returncode == 0
    done = place.run("--state", state, "tpm2_getcap", "handles-nv-index")
    assert "0x1500016" in done.stdout


def test_a_trace_is_there_at_the_end(place: Place, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    assert place.run("--trace", trace, "tpm2_getrandom", "--hex", "8").returncode == 0
    assert "TPM2_GetRandom" in trace.read_text().splitlines()[-1]
    assert trace.stat().st_mode & 0o777 == 0o600
    assert "TPM2_Startup" in place.run("--trace", "-", "true").stderr


def test_a_shell_is_introduced(place: Place, tmp_path: Path) -> None:
    shell = tmp_path / "shell"
    shell.write_text("#!/bin/sh\necho $debian_chroot $VTPM_NAME\nexit 3\n")
    shell.chmod(0o755)
    done = place.run("--shell", "--name", "mine", env={**place.env, "SHELL": str(shell)})
    assert (done.returncode, done.stdout) == (3, "vtpm mine\n")
    assert "A TPM 2.0, mine, for this shell" in done.stderr
    assert "type exit or Ctrl-D" in done.stderr


def test_many_at_once(place: Place) -> None:
    words = [*VTPM, "run", "tpm2_getrandom", "--hex", "8"]
    many = [
        subprocess.Popen(words, env=place.env, stdout=subprocess.PIPE, text=True)
        for _ in range(AT_ONCE)
    ]
    found = {process.communicate()[0] for process in many}
    assert [process.returncode for process in many] == [0] * AT_ONCE
    assert len(found) == AT_ONCE


# -- a device -------------------------------------------------------------------------------


def test_a_device_goes_when_all_is_killed(place: Place) -> None:
    needs_fuse()
    with place.started("--device", "sh", "-c", "echo $$ $VTPM_DEVICE; exec cat") as process:
        command, device = first_line(process)
        assert os.path.dirname(device) in dict(mounts())
        with ends(int(command), emulator_of(process)):
            process.kill()
    place.wait_empty()
    assert os.path.dirname(device) not in dict(mounts())


TOO_LATE: Final = """#!/bin/sh
exec 9>"{ended}"
echo >&9
kill -9 $PPID
while read -r _ _ _ parent _ </proc/$$/stat && [ "$parent" = "$PPID" ]; do :; done
exec {setpriv} "$@"
"""
"""setpriv, where its parent is killed before the kernel is told whom to tell of that."""


def test_a_device_goes_whenever_it_is_killed(place: Place, tmp_path: Path) -> None:
    needs_fuse()
    ended, setpriv = tmp_path / "ended", tmp_path / "setpriv"
    os.mkfifo(ended)
    setpriv.write_text(TOO_LATE.format(ended=ended, setpriv=shutil.which("setpriv")))
    setpriv.chmod(0o755)
    reader = os.open(ended, os.O_RDONLY | os.O_NONBLOCK)
    begun: list[bool] = []

    def over() -> bool:
        """Whether nobody has the other end any more."""
        with contextlib.suppress(BlockingIOError):
            if not os.read(reader, 1):
                return bool(begun)
            begun.append(True)
        return False

    try:
        env = {**place.env, "PATH": f"{tmp_path}:{place.env['PATH']}"}
        assert place.run("--device", "true", env=env).returncode == -signal.SIGKILL
        wait_until(over, "the emulator has ended")
    finally:
        os.close(reader)


def test_without_fuse_it_says_so(place: Place, tmp_path: Path) -> None:
    """As on a machine without the package fuse3."""
    needs_fuse()
    for name in ("setpriv", "true"):
        found = shutil.which(name)
        assert found is not None
        (tmp_path / name).symlink_to(found)
    done = place.run("--device", "true", env={**place.env, "PATH": str(tmp_path)})
    assert done.returncode == 125
    assert "fusermount3 not found; install the package fuse3" in done.stderr


# -- sudden ends ----------------------------------------------------------------------------

WAITING: Final = ("sh", "-c", "echo $$ $VTPM_PATH; exec cat")


def test_all_go_with_it(place: Place) -> None:
    with place.started(*WAITING) as process:
        command, path = first_line(process)
        assert os.path.exists(path)
        with ends(int(command), emulator_of(process)):
            process.kill()


def test_a_command_that_comes_too_late_is_not_run() -> None:
    """As that of a vtpm run that is killed before the kernel knows whom to kill with it."""
    program = """
import os, subprocess
from vtpm_cuse.cli.vtpm.command import bound_to
for parent in os.getpid(), 1:
    done = subprocess.run(["echo", "runs"], preexec_fn=bound_to(parent, set()))
    print(done.returncode, flush=True)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "runs\n0\n125\n"


def test_what_is_typed_while_the_command_starts_is_not_lost() -> None:
    program = """
import os, signal, subprocess
from vtpm_cuse.cli.vtpm import command
attendant = command.Attendant().__enter__()
signal.signal(signal.SIGQUIT, signal.SIG_IGN)
bound_to = command.bound_to
def late(*given):
    def bind():
        for number in signal.SIGQUIT, signal.SIGINT:
            os.kill(os.getpid(), number)
        bound_to(*given)()
    return bind
command.bound_to = late
print(attendant.run(["echo", "runs"], dict(os.environ)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (f"{128 + signal.SIGINT}\n", "")


def test_all_go_with_the_command(place: Place) -> None:
    with place.started(*WAITING) as process:
        command, _ = first_line(process)
        with ends(emulator_of(process)):
            os.kill(int(command), signal.SIGKILL)
            assert process.wait(PATIENCE_SECONDS) == 137


@pytest.mark.parametrize(("more", "status"), [((), 0), (("--save",), 125)])
def test_the_tpms_end_is_told(
    place: Place, tmp_path: Path, more: tuple[str, ...], status: int
) -> None:
    saved = tmp_path / "saved"
    with place.started(*more, *([saved] if more else []), *WAITING) as process:
        first_line(process)
        emulator = emulator_of(process)
        with ends(emulator):
            os.kill(emulator, signal.SIGKILL)
        said = process.communicate(timeout=PATIENCE_SECONDS)[1]
    assert said == "vtpm run: The TPM ended before sh did, with signal 9\n"
    assert process.returncode == status
    assert not saved.exists()


# -- signals and terminals ------------------------------------------------------------------

AWAITING: Final = """
import signal, sys
expected = {int(sys.argv[1])}
signal.pthread_sigmask(signal.SIG_BLOCK, expected)
print("ready", flush=True)
signal.sigwait(expected)
sys.exit(5)
"""
"""A shell may sleep before it looks for a signal that has just come."""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_signals_are_passed_on(place: Place, number: signal.Signals) -> None:
    with place.started(sys.executable, "-I", "-c", AWAITING, str(number.value)) as process:
        assert first_line(process) == ["ready"]
        process.send_signal(number)
        assert process.wait(PATIENCE_SECONDS) == 5


def test_what_was_ignored_stays_so(place: Place) -> None:
    def ignore() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    script = "kill -HUP $$; kill -INT $$; echo on; read -r _; exit 4"
    with place.started("sh", "-c", script, preexec_fn=ignore) as process:
        assert first_line(process) == ["on"]
        process.send_signal(signal.SIGHUP)
        process.communicate("\n", timeout=PATIENCE_SECONDS)
    assert process.returncode == 4


INTERRUPTED: Final = """
import signal
signal.signal(signal.SIGINT, signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
print("ready", flush=True)
signal.sigwait({signal.SIGINT})
print("once", flush=True)
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
while True:
    signal.pause()
"""


def test_ctrl_c_is_the_commands(place: Place) -> None:
    """It decides; we stay until it has ended."""
    pid, terminal = pty.fork()
    if pid == 0:
        words = [*VTPM, "run", sys.executable, "-I", "-c", INTERRUPTED]
        os.execve(words[0], words, place.env)  # noqa: S606
    said = b""

    def read_until(text: bytes) -> None:
        nonlocal said
        while text not in said:
            said += os.read(terminal, 4096)

    try:
        read_until(b"ready")
        os.write(terminal, b"\x03")
        read_until(b"once")
        os.write(terminal, b"\x03")
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130
    finally:
        os.close(terminal)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_it_starts_leaves_nothing(place: Place, number: signal.Signals) -> None:
    """When its folder is there and its command is not."""
    with place.started("sh", "-c", "echo started; exec cat") as process:
        wait_until(lambda: any(place.folder.iterdir()), "it starts", process=process)
        process.send_signal(number)
        assert process.wait(PATIENCE_SECONDS) in {-number, 128 + number, 0}
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()


# -- vtpm env -------------------------------------------------------------------------------


def test_others_find_it_by_name(place: Place) -> None:
    with place.started("--name", "one", *WAITING) as process:
        _, path = first_line(process)
        assert f"VTPM_PATH={path}\n" in place.vtpm("env", "one").stdout
        found = json.loads(place.vtpm("env", "--json", "one").stdout)
        assert (found["name"], found["version"], found["pid"]) == ("one", "2.0", process.pid)
        assert place.vtpm("env", "--list", "one").stdout == f"one 2.0 {process.pid}\n"
        script = 'eval "$("$@" env --shell one)"; tpm2_getrandom --hex 8'
        shell = ["sh", "-c", script, "sh", *VTPM]
        done = subprocess.run(shell, env=place.env, capture_output=True, text=True, check=True)
        assert len(bytes.fromhex(done.stdout)) == 8
        again = place.run("--name", "one", "true")
        assert (again.returncode, again.stderr) == (
            125,
            "vtpm run: There is a TPM one already; choose another --name\n",
        )
    place.wait_empty()
    none = place.vtpm("env", "one")
    assert none.returncode == 1
    assert none.stderr == (
        "vtpm env: No TPM one of this user's runs here; start one with vtpm run\n"
    )


def test_two_of_them_have_to_be_named(place: Place) -> None:
    with place.started(*WAITING) as first, place.started("--name", "x", *WAITING) as second:
        first_line(first)
        first_line(second)
        done = place.vtpm("env")
        assert done.returncode == 1
        assert f"{first.pid} (process {first.pid})" in done.stderr
        assert f"x (process {second.pid})" in done.stderr
        assert place.vtpm("env", str(first.pid)).returncode == 0
