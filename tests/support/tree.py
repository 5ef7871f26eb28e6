"""Folders whose changes are noted, and what a power cut may leave of them.

Programs work on a real folder through the module ``os``. Beside it stands what is on the medium: a
flushed file has its bytes there, a flushed folder the names that it had then. Of the rest, any number
of the first changes are there, or all but one of them; files have the bytes that were flushed, or all.
A rename happens or does not, as in any file system with a journal.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    import pytest

Node = dict[str, Any] | int
"""A folder by its names, or the number of a file."""

_NAMES: Final = {"mkdir", "rename", "replace", "link", "unlink", "rmdir"}
_CONTENTS: Final = {"write", "pwrite", "ftruncate", "posix_fallocate"}
_FLUSHES: Final = {"fsync", "fdatasync"}


class PowerCut(BaseException):
    """No handler for errors may see this."""


@dataclass
class File:
    """Bytes as programs see them, and as they are on the medium."""

    seen: bytes = b""
    flushed: bytes = b""


@dataclass
class Change:
    """Of a name: what makes or removes it, in which folders (by inode), and whether it is flushed."""

    apply: Callable[[Node], None]
    paths: list[str]
    folders: frozenset[int]
    flushed: bool = False


@dataclass
class Tree:
    """Everything below *root*, which is there.

    Attributes:
        steps: How many changes and flushes there have been.
        fault: The number of the step that fails.
        fails: What it fails with.
        at_step: Called before each step.
    """

    root: str
    steps: int = 0
    fault: int | None = None
    fails: OSError = field(default_factory=OSError)
    at_step: Callable[[], object] = lambda: None
    _files: dict[int, File] = field(default_factory=dict)
    _changes: list[Change] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._begin = self._found(self.root)

    def _found(self, path: str) -> Node:
        if os.path.isdir(path):
            return {name: self._found(os.path.join(path, name)) for name in os.listdir(path)}
        with open(path, "rb") as file:
            data = file.read()
        number = os.stat(path).st_ino
        self._files[number] = File(data, data)
        return number

    # -- what programs do ---------------------------------------------------------------------

    def watch(self, patch: pytest.MonkeyPatch) -> None:
        """From now on, everything is noted."""
        for name in (*_NAMES, *_CONTENTS, *_FLUSHES, "open"):
            patch.setattr(os, name, self._noting(name, getattr(os, name)))

    def _noting(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            if (paths := self._paths(name, args, kwargs)) is None:
                return call(*args, **kwargs)
            if name == "open" and (not args[1] & os.O_CREAT or os.path.lexists(paths[0])):
                return call(*args, **kwargs)
            self.at_step()
            self.steps += 1
            if self.steps - 1 == self.fault:
                raise self.fails
            folders = frozenset(os.stat(os.path.dirname(path)).st_ino for path in paths)
            result = call(*args, **kwargs)
            self._note(name, paths, folders, args[0])
            return result

        return noted

    def _paths(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str] | None:
        """Those that are meant; None where they are not in here."""
        if name in {"rename", "replace", "link"}:
            found = [(args[0], kwargs.get("src_dir_fd")), (args[1], kwargs.get("dst_dir_fd"))]
        elif name in _CONTENTS | _FLUSHES:
            found = [(f"/proc/self/fd/{args[0]}", None)]
        else:
            found = [(args[0], kwargs.get("dir_fd"))]
        paths = [self._path(path, folder) for path, folder in found]
        return paths if all(path.startswith(self.root) for path in paths) else None

    @staticmethod
    def _path(path: Any, folder: int | None) -> str:  # noqa: ANN401
        if isinstance(path, int):
            return ""
        text = os.fsdecode(path)
        if text.startswith("/proc/self/fd/"):
            return os.readlink(text)
        base = os.getcwd() if folder is None else os.readlink(f"/proc/self/fd/{folder}")
        return os.path.join(base, text)

    def _note(self, name: str, paths: list[str], folders: frozenset[int], first: object) -> None:
        if name in _FLUSHES:
            number = os.fstat(first).st_ino  # type: ignore[arg-type]
            if (file := self._files.get(number)) is not None:
                file.flushed = file.seen
            for change in self._changes:
                if number in change.folders:
                    self._flush(change)
            return
        if name in _CONTENTS:
            with open(f"/proc/self/fd/{first}", "rb") as opened:
                self._files[os.fstat(opened.fileno()).st_ino].seen = opened.read()
            return
        parts = [os.path.relpath(path, self.root).split("/") for path in paths]
        new: Node = {}
        if name == "open":
            new = os.stat(paths[0]).st_ino
            self._files[new] = File()
        self._changes.append(Change(lambda tree: _changed(tree, name, parts, new), paths, folders))

    def _flush(self, change: Change) -> None:
        """Also what has made that which is moved: a name on the medium means something there."""
        change.flushed = True
        for other in self._changes if len(change.paths) > 1 else ():
            other.flushed |= f"{change.paths[0]}/".startswith(f"{other.paths[-1]}/")

    # -- what is left of it ------------------------------------------------------------------

    def after_power_cut(self) -> Iterator[dict[str, bytes | None]]:
        """All that there may be then: files by their paths, and folders, which have no bytes."""
        for changes in self._outcomes():
            tree = _copy(self._begin)
            for change in changes:
                change.apply(tree)
            for is_flushed in (True, False):
                yield dict(self._listed(tree, "", is_flushed=is_flushed))

    def _outcomes(self) -> Iterator[list[Change]]:
        """The flushed ones, and some of the others, in their order."""
        others = [change for change in self._changes if not change.flushed]
        for count in range(len(others) + 1):
            yield self._with(others[:count])
        for left_out in range(len(others)):
            yield self._with(others[:left_out] + others[left_out + 1 :])

    def _with(self, some: Iterable[Change]) -> list[Change]:
        there = set(map(id, some))
        return [change for change in self._changes if change.flushed or id(change) in there]

    def _listed(
        self, tree: Node, path: str, *, is_flushed: bool
    ) -> Iterator[tuple[str, bytes | None]]:
        if isinstance(tree, int):
            file = self._files[tree]
            yield path, file.flushed if is_flushed else file.seen
            return
        yield path, None
        for name, one in tree.items():
            yield from self._listed(one, os.path.join(path, name), is_flushed=is_flushed)


def _copy(tree: Node) -> Node:
    return tree if isinstance(tree, int) else {name: _copy(one) for name, one in tree.items()}


def _changed(tree: Node, name: str, paths: list[list[str]], new: Node) -> None:
    """Where a folder on the way is missing, so is all that would be in it."""
    folders: list[Any] = [tree] * len(paths)
    for number, (*above, _) in enumerate(paths):
        for part in above:
            folders[number] = folders[number].get(part, {})
    names = [path[-1] for path in paths]
    match name:
        case "mkdir" | "open":
            folders[0][names[0]] = _copy(new)
        case "unlink" | "rmdir":
            folders[0].pop(names[0], None)
        case "link" if names[0] in folders[0]:
            folders[1][names[1]] = folders[0][names[0]]
        case "rename" | "replace" if names[0] in folders[0]:
            folders[1][names[1]] = folders[0].pop(names[0])


def written(files: dict[str, bytes | None], folder: str) -> None:
    """Makes all of that in *folder*."""
    for path, data in files.items():
        place = os.path.join(folder, path)
        if data is None:
            os.makedirs(place, exist_ok=True)
        else:
            with open(place, "wb") as file:
                file.write(data)
