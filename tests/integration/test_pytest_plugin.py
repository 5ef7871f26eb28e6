"""The plugin of pytest: each test finds its TPM as new, whatever the one before did to it."""

from __future__ import annotations

import inspect
import os
from configparser import ConfigParser
from typing import TYPE_CHECKING, Final

import pytest

from tests.support import commands as tpm
from tests.support.private import runtime_folder
from tests.support.sockets import TREE
from vtpm_cuse.lab import pytest_plugin

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytest_plugins = ["pytester"]

PLUGIN: Final = "vtpm_cuse.lab.pytest_plugin"
COMMANDS: Final = f"""
import os, signal, socket
import pytest

RANDOM = bytes.fromhex("{tpm.get_random(8).hex()}")
EXTEND = bytes.fromhex("{tpm.pcr_extend(16, b"m" * 32).hex()}")

@pytest.fixture(autouse=True)
def check_that_it_is_new(tpm):
    assert tpm.pcr(16) == bytes(32)
    assert tpm.exchanges()[-1].response[6:10] == bytes(4)
    assert tpm.command(EXTEND)[6:10] == bytes(4)
    assert tpm.pcr(16) != bytes(32)
"""
HOSTILE: Final = """
kept = []

def connected(path):
    made = socket.socket(socket.AF_UNIX)
    made.settimeout(60)
    made.connect(path)
    made.sendall(RANDOM)
    assert len(made.recv(100)) == 20
    return made

def test_kills_the_emulator(tpm):
    os.kill(tpm.pid, signal.SIGKILL)

def test_ends_it(tpm):
    tpm.close()

def test_powers_it_off(tpm):
    tpm.power_cycle()
    with tpm._emulator.control() as control:
        control.stop()

def test_leaves_a_connection_to_the_tpm_itself(tpm):
    kept.append(connected(tpm.raw_path))

def test_leaves_a_connection_to_the_manager(tpm):
    kept.append(connected(tpm.path))

def test_connects_and_goes(tpm):
    for path in (tpm.path, tpm.raw_path):
        connected(path).close()

def test_forks(tpm):
    if os.fork() == 0:
        tpm.close()
        os._exit(0)
    os.wait()

def test_leaves_a_copy_behind(tpm):
    read_end, write_end = os.pipe()
    if os.fork() == 0:
        os.close(write_end)
        os.read(read_end, 1)
        os._exit(0)
    os.close(read_end)
    kept.append(write_end)

def test_changes_the_folder(tpm, tmp_path):
    os.chdir(tmp_path)
    tmp_path.rmdir()

def test_changes_the_environment(tpm):
    os.environ["XDG_RUNTIME_DIR"] = "/nowhere"
    os.environ["TMPDIR"] = "/nowhere"

def test_closes_what_is_not_its_own(tpm, manufactured_tpm, tpm12):
    os.closerange(3, 256)

def test_the_last_one(tpm, manufactured_tpm, tpm12):
    tpm.fail_next(0x922)
    assert tpm12.pcr(0) == bytes(20)

def test_no_fault_is_left(tpm):
    assert tpm.pcr(0) == bytes(32)
"""


@pytest.fixture(autouse=True)
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the sockets are; in the end there are none, nor a process."""
    with runtime_folder() as folder:
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
        monkeypatch.setenv("PYTHONPATH", str(TREE))
        monkeypatch.setenv(
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1"
        )  # installed or not: it is this one
        yield folder


def run(pytester: pytest.Pytester, code: str, *words: str) -> pytest.RunResult:
    pytester.makepyfile(code)
    return pytester.runpytest_subprocess("-p", PLUGIN, "-p", "no:cacheprovider", *words)


def test_the_plugin_is_installed_with_the_package() -> None:
    config = ConfigParser()
    config.read(TREE / "setup.cfg")
    assert config["options.entry_points"]["pytest11"].split() == ["vtpm_lab", "=", PLUGIN]


def test_debian_12s_pytest_knows_its_hooks() -> None:
    """With pluggy 1.0; it loads what is installed, so that else none of its runs would begin."""
    hooks = [vars(hook) for hook in vars(pytest_plugin).values() if inspect.isfunction(hook)]
    options = [found["pytest_impl"] for found in hooks if "pytest_impl" in found]
    assert options
    assert not any(found.get("wrapper") for found in options)


def test_no_test_hurts_the_next_one(pytester: pytest.Pytester) -> None:
    count = HOSTILE.count("def test_")
    run(pytester, COMMANDS + HOSTILE, "--capture=no").assert_outcomes(passed=count)


def test_without_a_fixture_nothing_is_imported(pytester: pytest.Pytester) -> None:
    code = """
import sys
def test_nothing():
    ours = {name for name in sys.modules if name.startswith("vtpm_cuse")}
    assert ours == {"vtpm_cuse", "vtpm_cuse.lab", "vtpm_cuse.lab.pytest_plugin"}
    assert not {"trio", "cffi", "cryptography"} & set(sys.modules)
"""
    run(pytester, code).assert_outcomes(passed=1)


def test_a_failure_shows_the_last_commands(pytester: pytest.Pytester) -> None:
    code = f"""
def test_fails(tpm):
    tpm.pcr(5)
    assert not tpm.command(bytes.fromhex("{tpm.nv_read(tpm.NV_INDEX, 8).hex()}"))

def test_has_an_error_after_its_end(tpm):
    tpm.close()
    assert False

def test_passes(tpm):
    tpm.pcr(5)
"""
    done = run(pytester, code)
    done.assert_outcomes(passed=1, failed=2)
    done.stdout.fnmatch_lines(
        [
            "*the last commands of the TPM 2.0*",
            "*TPM2_PCR_Read(*TPM_RC_SUCCESS*",
            "*TPM2_NV_Read(*TPM_RC_HANDLE*",
        ]
    )
    assert done.stdout.str().count("the last commands") == 1
    done = run(pytester, code, "--tpm-trace=1", "-k", "fails")
    assert "PCR_Read" not in done.stdout.str().partition("the last commands")[2]
    done = run(pytester, code, "--tpm-trace=0", "-k", "fails")
    assert "the last commands" not in done.stdout.str()


def test_a_tpm_that_cannot_be_had_is_an_error_with_its_reason(pytester: pytest.Pytester) -> None:
    done = run(pytester, "def test_it(tpm): pass", "--tpm-profile=of-nobody")
    done.assert_outcomes(errors=1)
    done.stdout.fnmatch_lines(["*LabError: The emulator did not start*"])


def test_a_manufactured_one_has_a_certificate(pytester: pytest.Pytester) -> None:
    code = """
READ_PUBLIC = bytes.fromhex("80010000000e0000016901c00002")
def test_it(manufactured_tpm):
    assert manufactured_tpm.command(READ_PUBLIC)[6:10] == bytes(4)
"""
    run(pytester, code).assert_outcomes(passed=1)


def test_hundreds_of_tests_in_several_processes(pytester: pytest.Pytester, runtime: Path) -> None:
    pytest.importorskip("xdist")
    code = """
@pytest.mark.parametrize("number", range(500))
def test_it(tpm, number, request):
    if number % 100 == 0:
        os.kill(tpm.pid, signal.SIGKILL)
"""
    done = run(pytester, COMMANDS + code, "-p", "xdist.plugin", "-n", "2", "-q")
    done.assert_outcomes(passed=500)
    assert os.listdir(runtime) == []
