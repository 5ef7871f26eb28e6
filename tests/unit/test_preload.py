"""What is imported before nothing can be imported any more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Final

PACKAGE: Final = Path(__file__).parents[2] / "vtpm_cuse"
OTHER_PROGRAMS: Final = {"ca", "cli", "lab", "manufacture", "tree"}


def loaded_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=PACKAGE.parent
    )
    return set(run.stdout.split())


def test_every_module_of_a_service_is_imported() -> None:
    """Also of a package whose name begins as that of another program does."""
    wanted = {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        for path in PACKAGE.rglob("*.py")
        if path.relative_to(PACKAGE).parts[0] not in OTHER_PROGRAMS and path.stem != "_build"
    }
    loaded = loaded_after("from vtpm_cuse.service.confine.preload import import_all; import_all()")
    assert {"vtpm_cuse.client.ioctl", "vtpm_cuse.service.cuse"} <= wanted
    assert not wanted - loaded
    assert not {"vtpm_cuse.tree.mount", "pyfuse3"} & loaded  # a library that need not be there


def test_every_module_of_a_set_up_is_imported() -> None:
    """Who sets a TPM up as another user need not be able to read where this is installed."""
    wanted = {
        f"vtpm_cuse.{room}.{path.stem}"
        for room in ("ca", "manufacture")
        for path in (PACKAGE / room).glob("[a-z]*.py")
    }
    assert {"vtpm_cuse.manufacture.target", "vtpm_cuse.ca.localca"} <= wanted
    place = "vtpm_cuse.service.confine.preload"
    assert not wanted - loaded_after(f"from {place} import import_set_up; import_set_up()")


def test_nothing_is_found_afterwards() -> None:
    """Not even in a package that is loaded: below another root, somebody else's file would be."""
    code = (
        "from vtpm_cuse.service.confine.preload import import_all\n"
        "import_all()\n"
        "for name in ('vtpm_cuse.cli.swtpm_bios', 'encodings.cp037', 'tarfile'):\n"
        "    try:\n"
        "        __import__(name)\n"
        "    except ImportError:\n"
        "        continue\n"
        "    raise SystemExit(name)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, cwd=PACKAGE.parent
    )
    assert (run.returncode, run.stderr) == (0, b"")
