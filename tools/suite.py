"""``./setup test [ARGUMENTS...]``: checks and tests everything, or what the arguments name."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple
from xml.etree import ElementTree

from tools.steps import CACHE, Started, run, run_main, say, step

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_PYTHON: Final = ".venv/bin/python"
_RESULTS: Final = CACHE / "test"
_DEPLOYED: Final = CACHE / "deployed"
# Some two times what it takes: a busy machine is no failure, a hang is.
_SECONDS: Final = "4200"
_NOTHING_COLLECTED: Final = 5
_WHOLE_PROGRAMS: Final = "tests/integration"
"""Two thirds of the native tests, by the time they take."""
# Once more with the newer libtpms, libffi and Python: engine, state, and what the sandbox takes away.
_UNSTABLE: Final = (
    *("tests/unit", "tests/fuzz/test_wire.py", "tests/fuzz/test_device.py"),
    *(
        f"tests/integration/test_{name}.py"
        for name in (
            *("crash", "failed_store", "certificates_peer", "sandbox", "sandbox_start"),
            *("remains", "isolation", "below_another_root"),
        )
    ),
    "tests/differential",
)


_Section = tuple[str, Path, "Sequence[str]"]
"""Of pytest: its name, its report and its command."""


class Counts(NamedTuple):
    """How many tests passed, failed and were skipped."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0

    def __str__(self) -> str:
        return f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"


def counts_of(report: Path) -> Counts:
    """Those in a report of pytest; a test that failed in its clean-up as well is one test."""
    try:
        # Of our own making.
        cases = list(ElementTree.parse(report).iter("testcase"))  # noqa: S314
    except (OSError, ElementTree.ParseError):
        return Counts()
    bad = [any(case.find(tag) is not None for tag in ("failure", "error")) for case in cases]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return Counts(len(cases) - sum(bad) - skipped, sum(bad), skipped)


class Suite:
    """Sections, one after the other, and what came of them.

    Args:
        selected: Whether the caller chose some tests.
    """

    def __init__(self, *, selected: bool) -> None:
        self._selected = selected
        self._sections: list[str] = []
        self._counts: list[Counts] = []
        self._good = True

    def check(self, name: str, *command: str) -> None:
        """Runs what succeeds or does not."""
        say(f"{name} ...")
        begin = time.monotonic()
        good = run(command) == 0
        self._good &= good
        self._note(name, "ok" if good else "FAILED", begin)

    def tests(self, name: str, report: Path, command: Sequence[str]) -> None:
        """Runs pytest. Without a report, or with a bad end in spite of it, one test has failed."""
        say(f"{name} ...")
        begin = time.monotonic()
        report.unlink(missing_ok=True)
        self._count(name, report, run([*command, f"--junitxml={report}"]), begin)

    @contextlib.contextmanager
    def tests_beside(self, name: str, report: Path, command: Sequence[str]) -> Iterator[None]:
        """Runs pytest as `tests`, beside the block; what it says is shown at the end of both."""
        say(f"{name} beside the others ...")
        begin = time.monotonic()
        report.unlink(missing_ok=True)
        with report.with_suffix(".out").open("w+b") as said:
            with Started([*command, f"--junitxml={report}"], said) as started:
                yield
                say(f"waiting for the {name} ...")
                status = started.wait()
            said.seek(0)
            shutil.copyfileobj(said, sys.stdout.buffer)
            sys.stdout.flush()
        self._count(name, report, status, begin)

    def _count(self, name: str, report: Path, status: int, begin: float) -> None:
        note, counts = "", counts_of(report)
        nothing_chosen = status == _NOTHING_COLLECTED and self._selected
        if status and not counts.failed and not nothing_chosen:
            counts, note = counts._replace(failed=1), f" (ended with status {status})"
        self._counts.append(counts)
        self._good &= not counts.failed
        self._note(name, f"{counts}{note}", begin)

    def _note(self, name: str, result: str, begin: float) -> None:
        self._sections.append(f"{name:<16} {result:<40} {int(time.monotonic() - begin):4d} s")

    def end(self) -> int:
        """Says what came of it all; returns the exit status."""
        total = Counts(*map(sum, zip(*self._counts, strict=True))) if self._counts else Counts()
        print("", *self._sections, "", total, sep="\n")
        return 0 if self._good else 1


def _scripts(*endings: str) -> Iterator[str]:
    """The programs without a suffix whose first line ends in one of these."""
    for path in (Path("setup"), Path(".ci/run"), *sorted(Path("kernel-helpers").iterdir())):
        if path.is_file() and _interpreter(path).endswith(endings):
            yield str(path)


def _interpreter(path: Path) -> str:
    with path.open("rb") as file:
        line = file.readline().decode(errors="replace").strip()
    return line if line.startswith("#!") else ""


def _check_all(suite: Suite) -> None:
    pythons = [*_scripts("python3", "python3 -I"), "deploy/place"]
    strict = (_PYTHON, "-m", "mypy", "--strict")
    suite.check("ruff check", _PYTHON, "-m", "ruff", "check", ".", *pythons)
    suite.check("ruff format", _PYTHON, "-m", "ruff", "format", "--check", ".", *pythons)
    suite.check("mypy", *strict)
    suite.check("mypy, helpers", *strict, "--scripts-are-modules", *pythons)
    suite.check("handbook", _PYTHON, "-m", "tools.handbook", str(CACHE / "handbook-pages"))
    suite.check("shellcheck", "shellcheck", *_scripts("/sh", " sh", "bash"))


def _native_tests(words: Sequence[str], part: str = "native") -> _Section:
    # Python's own signal for Ctrl-C makes pytest say where a test hangs.
    command = ["timeout", "-s", "INT", "-k", "60", _SECONDS, _PYTHON, "-m", "pytest"]
    others = ("--ignore=tests/kernel", "--ignore=tests/differential")
    return f"{part} tests", _RESULTS / f"{part}.xml", [*command, *others, *words]


def _prepare_unstable() -> None:
    """The tests that need Debian unstable or Debian 13 skip without it."""
    if os.geteuid() == 0:
        for suite in ("unstable", "trixie"):
            command = ["kernel-helpers/unstable", "--suite", suite, "--prepare"]
            step(f"preparing a folder of Debian {suite}", command)
    else:
        what = "tests with its libtpms and swtpm are skipped"
        say(f"no folder of Debian unstable without root: {what}")


def _prepare_guests() -> None:
    """Kernels of other processors, for the tests that have virtual machines of those."""
    step("fetching kernels of other processors", [sys.executable, "-m", "tools.guests"])


def _unstable_tests(suite: Suite) -> None:
    """Engine and state once more, with the newer libtpms and Python."""
    if os.geteuid() == 0:
        command = ["kernel-helpers/unstable", "--", "python", "-m", "pytest", *_UNSTABLE]
        suite.tests("unstable tests", _RESULTS / "unstable.xml", command)


def _kernel_tests(words: Sequence[str]) -> _Section:
    lab = ["kernel-helpers/lab", "--timeout", _SECONDS, "--scratch", str(_RESULTS)]
    lab += ["--kernel-log", str(_RESULTS / "kernel.log")]
    lab += ["--env", "PYTEST_DISABLE_PLUGIN_AUTOLOAD=1", "--", _PYTHON, "-m", "pytest"]
    return "kernel tests", _RESULTS / "kernel.xml", [*lab, *words]


def _prepare_lab() -> None:
    """What its tests start there: the programs as they are deployed, and the kernel's own tests.

    And what compiling the modules takes here, it would take a dozen times there.
    """
    compiling = [_PYTHON, "-m", "compileall", "-q", "vtpm_cuse"]
    step("compiling the package", compiling)
    collecting = [_PYTHON, "-m", "pytest", "--quiet", "--collect-only", "tests/kernel"]
    step("compiling the tests of the kernel lab", collecting)
    fetch = [sys.executable, "-m", "tools.selftests"]
    step("fetching the kernel's own tests of its TPM devices", fetch)
    shutil.rmtree(_DEPLOYED, ignore_errors=True)
    step("building the programs", [sys.executable, "-m", "tools.programs", "build"])
    _DEPLOYED.mkdir()
    place = ["deploy/place", "--root", str(_DEPLOYED), str(CACHE / "deploy/venv")]
    step(f"deploying into {_DEPLOYED}", place)


def main() -> int:
    """The exit status."""
    options: list[str] = []
    native: list[str] = []
    kernel: list[str] = []
    for word in sys.argv[1:]:
        if word.startswith("-"):
            options.append(word)
        elif word == "tests/kernel" or word.startswith("tests/kernel/"):
            kernel.append(word)
        elif os.path.exists(word.partition("::")[0]):
            native.append(word)
        else:
            options.append(word)
    _prepare_unstable()
    _prepare_guests()
    _RESULTS.mkdir(parents=True, exist_ok=True)
    suite = Suite(selected=bool(sys.argv[1:]))
    if not sys.argv[1:]:
        _check_all(suite)
        _prepare_lab()
        # Three for two processors: tests of whole programs wait half of the time. Their folders are
        # their own: a pytest that begins takes the rights of others from the one it has by default.
        with (
            tempfile.TemporaryDirectory(prefix="vtpm-", ignore_cleanup_errors=True) as folder,
            suite.tests_beside(*_kernel_tests(["tests/kernel"])),
            suite.tests_beside(
                *_native_tests([_WHOLE_PROGRAMS, f"--basetemp={folder}/t"], "integration")
            ),
        ):
            suite.tests(*_native_tests([f"--ignore={_WHOLE_PROGRAMS}"]))
            _unstable_tests(suite)
        return suite.end()
    if native or not kernel:
        suite.tests(*_native_tests([*options, *native]))
    if kernel or not native:
        _prepare_lab()
        suite.tests(*_kernel_tests([*options, *(kernel or ["tests/kernel"])]))
    return suite.end()


if __name__ == "__main__":
    run_main(main)
