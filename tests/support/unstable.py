"""The folders of Debian unstable and of Debian 13 that kernel-helpers/unstable keeps."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
UNSTABLE: Final = ROOT / "kernel-helpers/unstable"
FOLDER: Final = (
    Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vtpm-cuse/unstable"
)
TRIXIE: Final = FOLDER.with_name("trixie")
REASON: Final = "needs root and kernel-helpers/unstable --prepare"
TRIXIE_REASON: Final = "needs root and kernel-helpers/unstable --suite trixie --prepare"


def is_ready() -> bool:
    """Whether this process may enter it at once: it has a Python for this checkout."""
    stamps = FOLDER.glob("var/lib/vtpm-cuse/venv-*/stamp")
    return os.geteuid() == 0 and any(stamp.read_text().startswith(f"{ROOT}\n") for stamp in stamps)


def has_trixie() -> bool:
    """Whether this process may enter that one at once."""
    return os.geteuid() == 0 and TRIXIE.is_dir()
