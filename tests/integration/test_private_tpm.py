"""Private TPMs: what they do, what their clients see, and that nothing of them is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import pytest

from tests.support import commands as tpm
from tests.support import managed
from tests.support.private import children
from tests.support.sockets import TREE, connect, environment
from tests.support.waiting import PATIENCE_SECONDS, wait_until
from vtpm_cuse.errors import TpmError, WireError
from vtpm_cuse.lab import LabError, Snapshot, Tpm
from vtpm_cuse.lab.lender import Kind, Lender

ZEROS: Final = bytes(32)
EXTEND: Final = tpm.pcr_extend(16, b"m" * 32)

pytestmark = pytest.mark.usefixtures("runtime")


def ends(pid: int) -> bool:
    """Whether it has ended."""
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True


# -- what it does -------------------------------------------------------------------------


def test_it_answers_and_is_gone_in_the_end(runtime: Path) -> None:
    with Tpm() as lab:
        assert not ends(lab.pid)
        assert lab.pcr(16) == ZEROS
        assert lab.pcr(0, "sha1") == bytes(20)
        assert Path(lab.path).parent.stat().st_mode & 0o777 == 0o700
        for path in (lab.path, lab.raw_path):
            assert Path(path).is_socket()
            assert Path(path).stat().st_mode & 0o077 == 0
        pid = lab.pid
    assert not lab.alive
    assert ends(pid)
    assert list(runtime.iterdir()) == []
    lab.close()


def test_rewind_takes_back_everything() -> None:
    with Tpm() as lab:
        assert tpm.code_of(lab.command(tpm.nv_define(tpm.NV_INDEX, 8))) == 0
        lab.command(EXTEND)
        before, snapshot = lab.pcr(16), lab.snapshot()
        assert before != ZEROS
        lab.command(EXTEND)
        random = lab.command(tpm.get_random(16))
        assert tpm.code_of(lab.command(tpm.nv_write(tpm.NV_INDEX, b"12345678"))) == 0
        assert lab.pcr(16) != before
        for _ in range(2):
            lab.rewind(snapshot)
            assert lab.pcr(16) == before
            assert tpm.code_of(lab.command(tpm.nv_read(tpm.NV_INDEX, 8))) == 0x14A  # unwritten
            lab.command(EXTEND)
            assert lab.command(tpm.get_random(16)) == random  # the same TPM at the same moment


def test_another_tpm_begins_from_a_snapshot(tmp_path: Path) -> None:
    with Tpm() as lab:
        lab.command(EXTEND)
        lab.snapshot().save(tmp_path / "snapshot")
        with Tpm(snapshot=Snapshot.load(tmp_path / "snapshot")) as other:
            assert other.pcr(16) == lab.pcr(16) != ZEROS


def test_a_power_cycle_keeps_what_a_tpm_keeps() -> None:
    with Tpm() as lab:
        lab.command(tpm.nv_define(tpm.NV_INDEX, 8))
        lab.command(tpm.nv_write(tpm.NV_INDEX, b"12345678"))
        lab.command(EXTEND)
        lab.rewind(lab.snapshot())  # whose volatile state is not to come back
        for again in (lab.power_cycle, lab.reset):
            lab.command(EXTEND)
            again()
            assert lab.pcr(16) == ZEROS
            assert tpm.nv_data(lab.command(tpm.nv_read(tpm.NV_INDEX, 8))) == b"12345678"


def test_a_client_finds_a_tpm_that_was_reset() -> None:
    with Tpm() as lab, connect(Path(lab.path)) as client:
        snapshot = lab.snapshot()
        update = managed.sequence_update(
            managed.handle_of(client.command(managed.sequence_start())), b"-"
        )
        assert tpm.code_of(client.command(update)) == 0
        assert lab.clients == 1
        lab.rewind(snapshot)
        assert tpm.code_of(client.command(update)) != 0
        assert tpm.code_of(client.command(managed.sequence_start())) == 0


def test_a_state_in_a_folder_stays(tmp_path: Path) -> None:
    state = tmp_path / "not there" / "state"
    with Tpm(state=state) as lab:
        lab.command(tpm.nv_define(tpm.NV_INDEX, 8))
        assert state.stat().st_mode & 0o077 == 0
        with pytest.raises(LabError, match="lock"):
            Tpm(state=state).start()
    with Tpm(state=state) as lab:
        assert tpm.code_of(lab.command(tpm.nv_define(tpm.NV_INDEX, 8))) == 0x14C  # is defined


def test_a_tpm12() -> None:
    with Tpm(version="1.2") as lab:
        assert lab.path == lab.raw_path
        assert "TPM2TOOLS_TCTI" not in lab.env
        snapshot = lab.snapshot()
        assert lab.pcr(3) == bytes(20)
        lab.command(tpm.tpm12_pcr_extend(3, b"m" * 20))
        assert lab.pcr(3) != bytes(20)
        lab.rewind(snapshot)
        assert lab.pcr(3) == bytes(20)
        lab.command(tpm.tpm12_pcr_extend(3, b"m" * 20))
        lab.command(tpm.TPM12_SAVE_STATE)
        lab.rewind(lab.snapshot())
        lab.power_cycle()
        assert lab.pcr(3) == bytes(20)
        with Tpm() as other, pytest.raises(LabError, match="another version"):
            other.rewind(snapshot)


def test_the_same_manufactured_tpm_gives_other_random_numbers() -> None:
    certificate = tpm.tpm2(0x169, bytes.fromhex("01c00002"))  # NV_ReadPublic
    with Tpm(manufactured=True) as lab, Tpm(manufactured=True) as other:
        found = lab.command(certificate)
        assert tpm.code_of(found) == 0
        assert other.command(certificate) == found
        assert lab.command(tpm.get_random(16)) != other.command(tpm.get_random(16))
        other.power_cycle()
        assert other.command(certificate) == found


def test_a_manufactured_one_in_a_folder_is_left_alone(tmp_path: Path) -> None:
    for number in range(2):
        with Tpm(version="1.2", manufactured=True, state=tmp_path / "state") as lab:
            read = lab.command(tpm.tpm12_nv_read(0x1000F000, 5))  # the certificate of its key
            assert tpm.code_of(read) == 0
            if number == 0:
                lab.command(tpm.tpm12_nv_define(0x1234, 8))
            else:
                assert tpm.code_of(lab.command(tpm.tpm12_nv_write(0x1234, b"12345678"))) == 0


# -- what is done to it -------------------------------------------------------------------


def test_a_lockout_is_one_until_it_is_lifted() -> None:
    with Tpm() as lab:
        lab.lockout()
        lab.lockout()
        lift = tpm.tpm2(
            0x139, bytes.fromhex("4000000a 00000009 40000009 0000 00 0000"), sessions=True
        )
        assert tpm.code_of(lab.command(lift)) == 0


def test_the_clock_goes_forward() -> None:
    def clock() -> int:
        return int.from_bytes(lab.command(tpm.TPM2_READ_CLOCK)[18:26], "big")

    with Tpm() as lab:
        before = clock()
        lab.clock_step(10**9)
        assert clock() >= before + 10**9
        with pytest.raises(LabError, match="forward"):
            lab.clock_step(0)
        with pytest.raises(TpmError, match="ClockSet"):
            lab.clock_step(2**64 - 2**47)
        with pytest.raises(LabError, match="so far"):
            lab.clock_step(2**64)


def test_faults_reach_every_client() -> None:
    with Tpm(faults=True) as lab:
        for path in (lab.path, lab.raw_path):
            with connect(Path(path)) as client:
                lab.fail_next(0x922)
                assert tpm.code_of(client.command(tpm.get_random(8))) == 0x922
                assert tpm.code_of(client.command(tpm.get_random(8))) == 0
                lab.lose_next_response()
                client.send(EXTEND)
                assert client.ended()
        assert lab.pcr(16) != ZEROS  # it was executed
        lab.lose_next_response()
        with pytest.raises(LabError, match="did not answer"):
            lab.pcr(16)
        lab.latency(0.01)
        begun = time.monotonic()
        assert lab.pcr(16) != ZEROS
        assert time.monotonic() - begun >= 0.01
        lab.fail_next(0x101)
        lab.rewind(lab.snapshot())  # and no fault is left
        lab.pcr(16)
        with pytest.raises(LabError, match="seconds later"):
            lab.latency(-1)


def test_a_prefix_passes_the_relay() -> None:
    command = tpm.get_random(8)
    prefix = bytes.fromhex("0000000800") + len(command).to_bytes(4, "big")
    with Tpm(faults=True) as lab, connect(Path(lab.raw_path)) as client:
        for code in (0, 0x922):
            if code:
                lab.fail_next(code)
            client.send(prefix + command)
            size = int.from_bytes(client.exactly(4), "big")
            assert tpm.code_of(client.exactly(size)) == code
            assert client.exactly(4) == bytes(4)
        for piece in command:  # it may come in pieces
            client.send(bytes([piece]))
        assert tpm.code_of(client.response()) == 0


def test_a_relay_that_was_killed_is_told_and_replaced() -> None:
    lender = Lender()
    try:
        lent = lender.lend(Kind())
        (relay,) = [pid for pid, words in children(os.getpid()).items() if "lab.relay" in words]
        os.kill(relay, signal.SIGKILL)
        with pytest.raises(LabError, match="relay for faults"):
            lent.fail_next(1)
        with pytest.raises(LabError, match="did not answer"):
            lent.pcr(0)
        assert lender.lend(Kind()).pcr(0) == ZEROS
    finally:
        lender.close()


def test_faults_that_nobody_asked_for() -> None:
    with Tpm() as lab, pytest.raises(LabError, match="faults=True"):
        lab.fail_next(1)


def test_the_last_commands_of_all_clients() -> None:
    with Tpm(trace=3) as lab:
        with connect(Path(lab.raw_path)) as client:
            answers = [client.command(tpm.get_random(size)) for size in range(1, 6)]
        found = lab.exchanges()
        assert [one.response for one in found] == answers[2:]
        assert [one.command for one in found] == [tpm.get_random(size) for size in (3, 4, 5)]
        lab.rewind(lab.snapshot())
        assert lab.exchanges() == []
        lab.command(EXTEND)
        os.kill(lab.pid, signal.SIGKILL)
        assert lab.exchanges()[-1].command == EXTEND  # behind what the resource manager asks
    with Tpm() as lab:
        lab.command(EXTEND)
        assert lab.exchanges() == []


def test_a_trace_holds_up_nobody() -> None:
    """However much there is to be kept, and whoever does not look."""
    with Tpm(trace=1) as lab, connect(Path(lab.raw_path)) as client:
        for _ in range(200):
            client.send(tpm.get_random(48) * 50)
            for _ in range(50):
                client.response()
        assert len(lab.exchanges()) == 1


# -- bad input ----------------------------------------------------------------------------


def test_what_is_no_command() -> None:
    with Tpm() as lab:
        short, long = tpm.get_random(8)[:-1], tpm.get_random(8) + b"-"
        for bad in (b"", b"\x80", short, long, b"\x80\x01" + b"\0" * 8, b"\xff" * 5000):
            with pytest.raises(WireError):
                lab.command(bad)
        with pytest.raises(TpmError, match="PCR_Read"):
            lab.pcr(0, "sm3_256")
        assert lab.pcr(0) == ZEROS


def test_a_snapshot_that_no_tpm_takes() -> None:
    with Tpm() as lab:
        good = lab.snapshot()
        short = good.permanent[:-9]
        for bad in (Snapshot(b"nonsense"), Snapshot(short), Snapshot(good.permanent, b"nonsense")):
            with pytest.raises(LabError):
                lab.rewind(bad)
        lab.rewind(good)
        assert lab.pcr(16) == ZEROS
    with pytest.raises(LabError, match="could not begin"):
        Tpm(snapshot=Snapshot(b"nonsense")).start()


def test_what_the_emulator_says_is_told(tmp_path: Path) -> None:
    with pytest.raises(LabError, match=r"did not start[^$]*profile"):
        Tpm(profile="of nobody").start()
    (tmp_path / "file").touch()
    with pytest.raises(LabError, match=r"Could not make .*/file"):
        Tpm(state=tmp_path / "file").start()
    state = tmp_path / "state"
    state.mkdir()
    (state / "tpm2-00.permall").write_bytes(b"not a state")
    with pytest.raises(LabError, match=r"permall") as info:
        Tpm(state=state).start()
    assert info.value.said


def test_an_emulator_that_was_killed() -> None:
    with Tpm() as lab:
        snapshot = lab.snapshot()
        os.kill(lab.pid, signal.SIGKILL)
        wait_until(lambda: not lab.alive, "it has ended")
        for ask in (lambda: lab.pcr(0), lab.snapshot, lambda: lab.rewind(snapshot), lab.reset):
            with pytest.raises(LabError):
                ask()
    with Tpm() as lab:
        lab.pcr(0)
        os.kill(lab.pid, signal.SIGKILL)
        with pytest.raises(LabError, match="signal 9"):
            lab.pcr(0)


def test_it_is_started_once() -> None:
    with Tpm() as lab:
        with pytest.raises(LabError, match="already"):
            lab.start()
        assert lab.pcr(16) == ZEROS
    with lab:
        assert lab.pcr(16) == ZEROS


# -- surroundings -------------------------------------------------------------------------

USE: Final = """
import os, signal, sys
from vtpm_cuse.lab import LabError, Tpm
tpm = Tpm(**eval(os.environ.get("ARGUMENTS", "{}"))).start()
def say(*words):
    with open(os.environ["SAYS"], "a") as file:
        print(*words, file=file, flush=True)
def use():
    return tpm.pcr(0) == bytes(32)
"""


class Script:
    """A program that has a TPM."""

    def __init__(self, folder: Path, code: str, *words: str, **variables: str) -> None:
        self.says = folder / "says"
        self.says.touch()
        env = {**environment(), "SAYS": str(self.says), **variables}
        words = words or (sys.executable,)
        self.process = subprocess.Popen(
            [*words, "-c", USE + code],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            cwd=TREE,
            env=env,
            start_new_session=True,
        )

    def said(self, count: int) -> list[str]:
        """So many words, once they are there."""
        wait_until(lambda: self._whole() >= count, "it says so", process=self.process)
        return self.says.read_text().split()

    def _whole(self) -> int:
        return len(self.says.read_text().rpartition("\n")[0].split())

    def ended(self) -> list[str]:
        """All that it said; it has ended by itself."""
        assert self.process.wait(PATIENCE_SECONDS) == 0
        return self.says.read_text().split()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdin is not None
        self.process.stdin.close()


@pytest.mark.parametrize("arguments", ["{}", "dict(faults=True, trace=9)"])
@pytest.mark.parametrize("whom", ["parent", "emulator", "both"])
def test_kill_9_leaves_nothing(whom: str, arguments: str, tmp_path: Path, runtime: Path) -> None:
    code = "say(tpm.pid)\nsys.stdin.read()"
    script = Script(tmp_path, code, ARGUMENTS=arguments)
    try:
        (number,) = map(int, script.said(1))
        assert len(list(runtime.iterdir())) == 1
        if whom != "parent":
            os.kill(number, signal.SIGKILL)
        if whom != "emulator":
            script.process.kill()
    finally:
        script.close()
    wait_until(lambda: ends(number), "the emulator has ended")


def test_kill_9_in_a_set_up_leaves_no_key(tmp_path: Path, runtime: Path) -> None:
    code = "tpm.close()\nsay('begins')\nTpm(manufactured=True).start()\nsys.stdin.read()"
    script = Script(tmp_path, code)
    try:
        script.said(1)
        wait_until(lambda: bool(list(runtime.rglob("swtpm_setup.conf"))), "a folder is made")
    finally:
        script.close()


def test_a_copy_of_the_process_neither_ends_nor_uses_nor_keeps_it(tmp_path: Path) -> None:
    code = """
say(tpm.pid)
if os.fork() == 0:  # one that knows nothing of a TPM
    say("lives")
    sys.stdin.read()
    os._exit(0)
child = os.fork()
if child == 0:
    try:
        tpm.pcr(0)
    except LabError as exc:
        say("belongs" in str(exc))
    say(tpm.alive)
    tpm.close()
    os._exit(0)
os.waitpid(child, 0)
say(use())
sys.stdin.read()
"""
    script = Script(tmp_path, code)
    try:
        number, *said = script.said(5)
        assert sorted(said) == ["False", "True", "True", "lives"]
        script.process.kill()  # and the other copy lives on
        wait_until(lambda: ends(int(number)), "the emulator has ended")
    finally:
        script.close()


def test_a_copy_that_is_made_in_the_middle_of_something_does_not_hang(tmp_path: Path) -> None:
    code = """
import threading
over = threading.Event()
def work():
    while not over.is_set():
        tpm.rewind(snapshot)
snapshot = tpm.snapshot()
worker = threading.Thread(target=work)
worker.start()
for _ in range(10):
    if os.fork() == 0:
        for ask in tpm.snapshot, tpm.reset, tpm.lockout, lambda: tpm.pcr(0), lambda: tpm.clients:
            try:
                ask()
            except LabError:
                continue
            os._exit(1)
        tpm.close()
        os._exit(0)
    say(os.wait()[1])
over.set()
worker.join()
say(use())
"""
    script = Script(tmp_path, code)
    try:
        assert script.ended() == ["0"] * 10 + ["True"]
    finally:
        script.close()


def test_what_is_typed_at_a_terminal_reaches_the_program_alone(tmp_path: Path) -> None:
    code = """
signal.signal(signal.SIGINT, lambda *_: say("interrupted", use()))
say(tpm.pid)
sys.stdin.read()
"""
    script = Script(tmp_path, code)
    try:
        (number,) = map(int, script.said(1))
        assert os.getsid(number) != os.getsid(script.process.pid)
        os.killpg(script.process.pid, signal.SIGINT)
        assert script.said(3)[1:] == ["interrupted", "True"]
    finally:
        script.close()


SURROUNDINGS: Final = {
    "closed standard files": ('exec "$@" <&- >&- 2>&-', ""),
    "no standard output": ('exec "$@" >&-', ""),
    "SIGCHLD ignored": ('exec "$@"', "signal.signal(signal.SIGCHLD, signal.SIG_IGN)"),
    "SIGCHLD ignored by the caller": ("trap '' CHLD INT TERM HUP; exec \"$@\"", ""),
    "another folder": ('exec "$@"', "os.chdir('/')"),
    "a folder that is gone": ('d=$(mktemp -d) && cd "$d" && rmdir "$d" && exec "$@"', ""),
    "no mode bits": ('umask 0777; exec "$@"', ""),
    "no PATH": ('PATH=/nowhere exec "$@"', ""),
    "settings of Python": ('PYTHONSTARTUP=/x PYTHONOPTIMIZE=2 exec "$@"', ""),
    "a service manager": ('NOTIFY_SOCKET=/nowhere LISTEN_FDS=1 LISTEN_PID=$$ exec "$@"', ""),
    "a state's place": ('TPM_PATH=/nowhere exec "$@"', ""),
    "few descriptors": ('ulimit -n 40; exec "$@"', ""),
}


@pytest.mark.parametrize("kind", SURROUNDINGS)
def test_surroundings(kind: str, tmp_path: Path) -> None:
    shell, code = SURROUNDINGS[kind]
    words = ("/bin/sh", "-c", shell, "sh", sys.executable)
    code += "\nsay(use())\ntpm.power_cycle()\nsay(use())\ntpm.close()\n"
    script = Script(tmp_path, code, *words)
    try:
        assert script.ended() == ["True"] * 2
    finally:
        script.close()


def test_too_few_descriptors_are_said_and_none_is_lost(tmp_path: Path) -> None:
    code = """
import resource
tpm.close()
found = set()
for most in range(3, 40):
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, 1000))
    try:
        tpm.start()
        tpm.close()
    except LabError as exc:
        found.add(most)
        assert "oo many open files" in str(exc) or exc.said, exc
resource.setrlimit(resource.RLIMIT_NOFILE, (1000, 1000))
say(4 in found, 39 in found, len(os.listdir("/proc/self/fd")) < 9)
"""
    script = Script(tmp_path, code)
    try:
        assert script.ended() == ["True", "False", "True"]
    finally:
        script.close()


def test_a_long_path_for_sockets_is_not_used(
    monkeypatch: pytest.MonkeyPatch, runtime: Path
) -> None:
    long = runtime / ("long" * 25)
    long.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(long))
    with Tpm() as lab:
        assert str(long) not in lab.path
        assert lab.pcr(0) == ZEROS
    long.rmdir()


def test_many_at_once() -> None:
    with ThreadPoolExecutor(12) as pool:
        labs = list(pool.map(lambda _: Tpm().start(), range(12)))
        try:
            assert list(pool.map(lambda lab: lab.pcr(16), labs)) == [ZEROS] * 12
            assert len({lab.command(tpm.get_random(16)) for lab in labs}) == 12
        finally:
            list(pool.map(Tpm.close, labs))


def test_threads_take_turns() -> None:
    def work(number: int) -> bool:
        for _ in range(20):
            if number % 2:
                lab.rewind(snapshot)
            elif tpm.code_of(lab.command(tpm.get_random(number))):
                return False
        return True

    with Tpm(trace=4) as lab, ThreadPoolExecutor(6) as pool:
        snapshot = lab.snapshot()
        assert all(pool.map(work, range(6)))
