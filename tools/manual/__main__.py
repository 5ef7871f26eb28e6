"""Writes the man pages, completions and C header of a checkout, or checks that they are up to date."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tools.manual import header
from tools.manual.completions import completions
from tools.manual.pages import links, pages

_TOPS = ("man", "completions", "include")


def main() -> int:
    """Writes to, or compares with, the folders man/, completions/ and include/."""
    parser = argparse.ArgumentParser(prog="python -m tools.manual", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if a file is old")
    parser.add_argument("folder", type=Path, nargs="?", default=Path.cwd(), help="the checkout (.)")
    options = parser.parse_args()
    wanted = {options.folder / path: text for path, text in files().items()}
    there = {p for top in _TOPS for p in (options.folder / top).rglob("*.*")}
    stale = sorted(
        {path for path in there if not path.is_dir() and path not in wanted}
        | {path for path, content in wanted.items() if _content(path) != content}
    )
    for path in stale:
        sys.stdout.write(f"{'old' if options.check else 'written'}: {path}\n")
        if not options.check:
            _replace(path, wanted.get(path))
    return 1 if stale and options.check else 0


def files() -> dict[str, str]:
    """Every generated file, by its path in the checkout; a symbolic link is "-> target"."""
    return {
        **{f"man/{path}": text for path, text in pages().items()},
        **{f"man/{path}": f"-> {target}" for path, target in links().items()},
        **{f"completions/{path}": text for path, text in completions().items()},
        header.PATH: header.header(),
    }


def _content(path: Path) -> str | None:
    if path.is_symlink():
        return f"-> {path.readlink()}"
    return path.read_text() if path.exists() else None


def _replace(path: Path, content: str | None) -> None:
    path.unlink(missing_ok=True)
    if content is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if content.startswith("-> "):
        path.symlink_to(content.removeprefix("-> "))
    else:
        path.write_text(content)


if __name__ == "__main__":
    sys.exit(main())
