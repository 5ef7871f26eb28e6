"""Fixtures of pytest: a TPM for each test, as new, without the time that a new one takes.

Loaded by every run of pytest where this package is installed; so it imports nothing until a test wants
a TPM.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Final

import pytest

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from pluggy import Result

    from vtpm_cuse.lab import Tpm
    from vtpm_cuse.lab.lender import Kind, Lender

_TRACED: Final = 64
_LENT: Final[pytest.StashKey[list[Tpm]]] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options of the fixtures."""
    group = parser.getgroup("tpm", "private TPMs")
    group.addoption("--tpm-profile", metavar="PROFILE", help="profile of TPMs 2.0: name or JSON")
    group.addoption(
        "--tpm-trace",
        metavar="COUNT",
        type=int,
        default=_TRACED,
        help="commands that are shown where a test with a TPM fails (default: %(default)s; 0: none)",
    )


@pytest.fixture(scope="session")
def _vtpm_lender(pytestconfig: pytest.Config) -> Iterator[Lender]:
    from vtpm_cuse.lab.lender import Lender

    profile, trace = pytestconfig.getoption("--tpm-profile"), pytestconfig.getoption("--tpm-trace")
    lender = Lender(profile=profile, trace=max(0, trace))
    yield lender
    lender.close()


def _lend(request: pytest.FixtureRequest, lender: Lender, kind: Kind) -> Tpm:
    tpm = lender.lend(kind)
    request.node.stash.setdefault(_LENT, []).append(tpm)
    return tpm


@pytest.fixture
def tpm(request: pytest.FixtureRequest, _vtpm_lender: Lender) -> Tpm:
    """A TPM 2.0 that is on, and that nobody has used."""
    from vtpm_cuse.lab.lender import Kind

    return _lend(request, _vtpm_lender, Kind())


@pytest.fixture
def manufactured_tpm(request: pytest.FixtureRequest, _vtpm_lender: Lender) -> Tpm:
    """A TPM 2.0 with endorsement keys and certificates."""
    from vtpm_cuse.lab.lender import Kind

    return _lend(request, _vtpm_lender, Kind(manufactured=True))


@pytest.fixture
def tpm12(request: pytest.FixtureRequest, _vtpm_lender: Lender) -> Tpm:
    """A TPM 1.2 that is on, and that nobody has used."""
    from vtpm_cuse.lab.lender import Kind

    return _lend(request, _vtpm_lender, Kind("1.2"))


# Not "wrapper", which Debian 12's pytest does not know: none of its tests would run.
@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, Result[pytest.TestReport], None]:
    """Adds what the TPMs of a test that failed were asked last."""
    report = (yield).get_result()
    if report.failed:
        for tpm in item.stash.get(_LENT, []):
            _add_trace(report, tpm)


def _add_trace(report: pytest.TestReport, tpm: Tpm) -> None:
    from vtpm_cuse.lab import LabError
    from vtpm_cuse.lab.record import traced_lines

    with suppress(LabError):  # the test has ended it
        if lines := traced_lines(tpm.exchanges()):
            title = f"the last commands of the TPM {tpm.version}"
            report.sections.append((title, "\n".join(lines)))
