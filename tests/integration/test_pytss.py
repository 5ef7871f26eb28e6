"""tpm2-pytss, the Python bindings of tpm2-tss: its own suite on our TPMs, and our example with it."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import venv
from typing import TYPE_CHECKING, Any, Final

import pytest

from tests.kernel.harness import needs, servers
from tests.support.fuse import FuseServer, needs_fuse
from tests.support.private import runtime_folder
from tests.support.sockets import TREE
from tests.support.wheel import built_wheel
from vtpm_cuse.client.child import program_words

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    Words = Sequence[str | Path]

VERSION: Final = "3.0.0"
SHA256: Final = "c193cf1908b482f93c4aa464132920fe3a37d4b9d802e267974ff2dfe37d4433"
BESIDE: Final = (
    *("asn1crypto", "cffi", "cryptography", "packaging", "pkgconfig", "pycparser", "pytest"),
    *("pytest-xdist", "pyyaml", "setuptools", "setuptools_scm", "wheel"),
)
"""What it needs, to be built as well."""
FOLDER: Final = TREE / f".cache/pytss/{VERSION}-{sys.version_info[0]}.{sys.version_info[1]}"
SECONDS: Final = 600
PASSED: Final = 560
"""At least; 568 and, on the TPM itself, 570 where it was tried. What it skips are algorithms and newer libraries."""

pytestmark = pytest.mark.timeout(2 * SECONDS)

RAW_ALONE: Final = {
    # They look for TPM_RC_COMMAND_CODE as a TPM says it, and a resource manager says that it says so.
    "test_esapi.py::TestEsys::test_field_upgrade_data": "0xb0143",
    "test_esapi.py::TestEsys::test_field_upgrade_start": "0xb0143",
    "test_esapi.py::TestEsys::test_firmware_read": "0xb0143",
    # libtpms has no PCRs with a password; they skip it for swtpm, which they know by its TCTI.
    "test_esapi.py::TestEsys::test_pcr_set_auth_value": "0x124",
    # The TCTI cmd has none of it.
    "test_tcti.py::TestTCTI::test_cancel": "tcti: not implemented",
    "test_tcti.py::TestTCTI::test_custom_pytcti_cancel": "tcti: not implemented",
    "test_tcti.py::TestTCTI::test_custom_pytcti_set_locality": "tcti: not implemented",
    "test_tcti.py::TestTCTI::test_make_sticky": "tcti: not implemented",
    "test_tcti.py::TestTCTI::test_set_locality": "tcti: not implemented",
}
"""What passes on the TPM itself, and why not on its resource manager, through the TCTI cmd."""


def call(*words: str | Path, **more: Any) -> str:  # noqa: ANN401 - as subprocess has them
    done: subprocess.CompletedProcess[str] = subprocess.run(
        words,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
        **more,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-20000:]
    return done.stdout


def pip(folder: Path) -> Words:
    return (folder / "bin/python", "-m", "pip", "-q", "--disable-pip-version-check")


@pytest.fixture(scope="module")
def suite() -> Path:
    """Its folder; a wheel and an environment with all it needs are beside it, made once."""
    for program in ("gcc", "pkg-config"):
        needs(shutil.which(program) is not None, f"{program} is missing")
    source, stamp = FOLDER / f"tpm2_pytss-{VERSION}", FOLDER / "made"
    if stamp.exists():
        return source
    shutil.rmtree(FOLDER, ignore_errors=True)
    venv.create(FOLDER / "venv", with_pip=True)
    own = pip(FOLDER / "venv")
    call(*own, "install", *BESIDE)
    plain = ("--no-deps", "--no-build-isolation")
    call(*own, "download", *plain, "--no-binary", ":all:", "-d", FOLDER, f"tpm2-pytss=={VERSION}")
    (archive,) = FOLDER.glob("*.tar.gz")
    assert hashlib.sha256(archive.read_bytes()).hexdigest() == SHA256
    call(*own, "wheel", *plain, "--wheel-dir", FOLDER, archive)
    call(*own, "install", "--no-deps", *FOLDER.glob("*.whl"))
    call("tar", "-xf", archive, "-C", FOLDER)
    shutil.rmtree(source / "src")  # what is installed is tested
    stamp.touch()
    return source


@pytest.fixture(scope="module")
def clean(suite: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with our wheel, and with what both packages ask for."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder / "venv", with_pip=True)
    wheels = (built_wheel(folder), *FOLDER.glob("*.whl"))
    call(*pip(folder / "venv"), "install", *wheels, "pytest", "pytest-xdist")
    return folder / "venv"


def passed(folder: Path, words: Words, more: Sequence[str], env: Mapping[str, str] = {}) -> int:
    """Runs pytest there, with nothing of its settings here; how many tests passed."""
    others = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    tests = ("-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", *more)
    said = call(*words, *tests, cwd=folder, env={**others, **env})
    counts = re.search(r"(\d+) passed", said)
    assert counts is not None
    return int(counts[1])


def suite_passed(
    suite: Path,
    words: Words,
    folder: Path,
    *,
    deselected: Iterable[str] = RAW_ALONE,
    env: Mapping[str, str] = {},
) -> int:
    shutil.copy(TREE / "tests/support/pytss_simulator.py", folder)
    unwanted = [f"--deselect=test/{name}" for name in deselected]
    env = {"PYTHONPATH": str(folder), "HOME": str(folder), **env}
    return passed(
        suite, words, ["-c", "pyproject.toml", "-p", "pytss_simulator", *unwanted, "test"], env
    )


@pytest.mark.parametrize("which", ["--managed", "--raw"])
def test_its_suite_passes_below_vtpm_run(which: str, suite: Path, tmp_path: Path) -> None:
    run = (*program_words("vtpm_cuse.cli.vtpm.vtpm"), "run", which)
    words: Words = (*run, FOLDER / "venv/bin/python")
    deselected = RAW_ALONE if which == "--managed" else ()
    assert suite_passed(suite, words, tmp_path, deselected=deselected) >= PASSED


def test_its_suite_passes_on_the_managed_file(suite: Path, tmp_path: Path) -> None:
    """Each of its contexts is an open of the file, several in one process."""
    needs_fuse()
    for make in servers(tmp_path, FuseServer):
        device = make("vtpm0").start().device
        tcti = f"device:{device.with_name('vtpmrm0')}"
        env = {"PYTSS_DEVICE": str(device), "TPM2TOOLS_TCTI": tcti}
        words: Words = [FOLDER / "venv/bin/python"]
        assert suite_passed(suite, words, tmp_path, env=env) >= PASSED


def test_its_suite_passes_with_the_fixture(suite: Path, clean: Path, tmp_path: Path) -> None:
    assert suite_passed(suite, [clean / "bin/python"], tmp_path) >= PASSED


def test_the_example_passes_its_tests(clean: Path, tmp_path: Path) -> None:
    """As its users would have it: the package is a wheel, and no checkout is near."""
    shutil.copytree(TREE / "examples/seal", tmp_path / "seal")
    with runtime_folder() as runtime:
        env = {"XDG_RUNTIME_DIR": str(runtime)}
        assert passed(tmp_path / "seal", [clean / "bin/python"], [], env) == 4
