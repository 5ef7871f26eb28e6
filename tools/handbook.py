"""``./setup handbook [DIR]``: the handbook as static pages, in dist/handbook or DIR.

What the programs say and what the wire carries has pages made of source and tables.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Final

from tools.manual.messages import page as messages
from tools.manual.requests import rows as requests
from tools.steps import CACHE, TREE, run, run_main, say

SOURCE: Final = CACHE / "handbook"


def gather(folder: Path) -> None:
    """All papers of the checkout, with those that are made, in *folder*."""
    shutil.rmtree(folder, ignore_errors=True)
    for path in (*TREE.glob("*.md"), *TREE.glob("docs/**/*")):
        if path.suffix in {".md", ".png", ".py"}:
            place = folder / path.relative_to(TREE)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)
    handbook = folder / "docs/handbook"
    (handbook / "messages.md").write_text(messages(), encoding="utf-8")
    formats = handbook / "formats.md"
    formats.write_text(formats.read_text(encoding="utf-8").replace("{{REQUESTS}}", requests()))


def build(target: Path) -> int:
    """Writes the pages to *target*; the status is not 0 if one of them leads nowhere."""
    gather(SOURCE)
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet"]
    return run([*command, "--conf-dir", f"{SOURCE}/docs", str(SOURCE), str(target)])


def main() -> int:
    """The exit status."""
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "dist/handbook")
    status = build(target)
    if not status:
        say(f"the first page is {target}/docs/handbook/index.html")
    return status


if __name__ == "__main__":
    run_main(main)
