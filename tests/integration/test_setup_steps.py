"""What ./setup runs ends with it, and is counted as its last line says."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.waiting import PATIENCE_SECONDS, wait_until
from tools.suite import Counts, Suite, counts_of

if TYPE_CHECKING:
    from collections.abc import Iterator

TREE = Path(__file__).parents[2]


def started(main: str) -> subprocess.Popen[str]:
    """A program of tools/ with that in its main function."""
    code = f"from tools import steps\nsteps.run_main(lambda: {main})\n"
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=TREE,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def child(request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    """One that runs a shell script, which has told that it is there."""
    script = f"{request.param}; echo $$; while :; do sleep 0.1; done"
    with started(f"steps.run(['sh', '-c', {script!r}])") as process:
        try:
            yield process
        finally:
            process.kill()


def is_gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize("child", ["trap 'echo bye; exit 3' INT TERM"], indirect=True)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_passed_on_once_and_waited_for(
    number: signal.Signals, child: subprocess.Popen[str]
) -> None:
    assert child.stdout is not None
    pid = int(child.stdout.readline())
    child.send_signal(number)
    out, said = child.communicate(timeout=PATIENCE_SECONDS)
    said = said.removeprefix("Terminated\n")  # of the shell's sleep, says the shell
    assert (out, said) == ("bye\n", f"setup: ended by {number.name}\n")
    assert child.returncode == 128 + number
    assert is_gone(pid)


@pytest.mark.parametrize("child", ["trap 'echo no' INT TERM"], indirect=True)
def test_a_second_signal_ends_what_does_not_end(child: subprocess.Popen[str]) -> None:
    assert child.stdout is not None
    pid = int(child.stdout.readline())
    child.send_signal(signal.SIGINT)
    assert child.stdout.readline() == "no\n"
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=PATIENCE_SECONDS)
    assert (said, child.returncode) == ("setup: ended by SIGINT\n", 130)
    wait_until(lambda: is_gone(pid), "its end")


def test_a_step_that_fails_shows_what_it_said() -> None:
    process = started("steps.step('trying', ['sh', '-c', 'echo the reason; exit 4'])")
    out, said = process.communicate(timeout=PATIENCE_SECONDS)
    assert (process.returncode, out) == (1, "")
    assert said.startswith("setup: trying ...\n")
    assert "\nthe reason\nsetup: trying failed; all that was said is in .cache/setup.log\n" in said


def test_a_program_that_is_missing_is_named() -> None:
    out, said = (process := started("steps.run(['/none/such'])")).communicate(
        timeout=PATIENCE_SECONDS
    )
    assert (process.returncode, out) == (127, "")
    assert said == "setup: /none/such: No such file or directory\n"


@pytest.mark.parametrize("words", [["--nonsense"], ["--root"], ["DIR"], ["--uninstall=1"]])
def test_deploy_does_not_guess_what_was_meant(words: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tools.programs", "deploy", "/", *words],
        cwd=TREE,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: ./setup COMMAND\n")


REPORT = """<testsuites><testsuite>
<testcase name="a"/><testcase name="b"/>
<testcase name="c"><skipped/></testcase>
<testcase name="d"><failure/><error/></testcase>
<testcase name="e"><error/></testcase>
</testsuite></testsuites>"""


def test_a_test_that_fails_in_its_clean_up_too_is_one_test(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(REPORT)
    assert counts_of(report) == Counts(2, 2, 1)
    report.write_text(REPORT[:40])
    assert counts_of(report) == Counts()
    assert counts_of(tmp_path / "none") == Counts()


def suite_of(folder: Path, *statuses: int, selected: bool = False, good: str = "") -> list[str]:
    """The lines at the end, and the exit status, of runs that end with these statuses."""
    (folder / "good.xml").write_text(good or "<testcase name='a'/>")
    code = f"from tools.suite import *\nsuite = Suite(selected={selected})\n"
    for status in statuses:
        script = f"cp {folder}/good.xml ${{0#--junitxml=}}; exit {status}"
        code += f"suite.tests('some tests', Path({str(folder / 'r.xml')!r}), "
        code += f"['sh', '-c', {script!r}])\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}print(suite.end())\n"],
        cwd=TREE,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def test_the_last_line_counts_all_sections(tmp_path: Path) -> None:
    blank, first, second, blank_too, total, status = suite_of(tmp_path, 0, 0)
    assert blank == blank_too == ""
    assert first.startswith("some tests       1 passed, 0 failed, 0 skipped  ")
    assert first == second
    assert (total, status) == ("2 passed, 0 failed, 0 skipped", "0")


def test_a_bad_end_in_spite_of_a_good_report_counts(tmp_path: Path) -> None:
    lines = suite_of(tmp_path, 3)
    assert "1 passed, 1 failed, 0 skipped (ended with status 3)" in lines[1]
    assert lines[-2:] == ["1 passed, 1 failed, 0 skipped", "1"]


def test_parts_beside_each_other_are_all_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each waits for the two others to have begun."""
    names = ("one", "two", "three")

    def part(name: str) -> tuple[str, Path, list[str]]:
        others = " && ".join(f"[ -e {tmp_path / other} ]" for other in names)
        begin = f"touch {tmp_path / name}; until {others}; do sleep 0.01; done"
        end = f"echo \"<testcase name='{name}'/>\" >${{0#--junitxml=}}"
        script = f"{begin}; {end}; exit {int(name == 'two')}"
        return name, tmp_path / f"{name}.xml", ["timeout", "60", "sh", "-c", script]

    suite = Suite(selected=False)
    with suite.tests_beside(*part("one")), suite.tests_beside(*part("two")):
        suite.tests(*part("three"))
    assert suite.end() == 1
    assert capsys.readouterr().out.splitlines()[-1] == "3 passed, 1 failed, 0 skipped"


@pytest.mark.parametrize(("selected", "status"), [(True, "0"), (False, "1")])
def test_nothing_chosen_is_no_failure_of_who_chooses(
    selected: bool, status: str, tmp_path: Path
) -> None:
    lines = suite_of(tmp_path, 5, selected=selected, good="<testsuites/>")
    assert lines[-1] == status


def test_a_failed_check_fails_the_suite() -> None:
    suite = Suite(selected=False)
    suite.check("true", "true")
    assert suite.end() == 0
    suite.check("false", "false")
    assert suite.end() == 1
