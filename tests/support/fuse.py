"""`swtpm fuse` as a process, and somebody to run it who is not root."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

from tests.kernel.harness import OUR_IOCTL, PROGRAMS, ROOT, Done, Server, needs, run

if TYPE_CHECKING:
    from collections.abc import Iterator

SWTPM_FUSE: Final = (str(PROGRAMS / "swtpm"), "fuse")
CONNECTIONS: Final = Path("/sys/fs/fuse/connections")
_NOBODY: Final = 65534
_AS_NOBODY: Final = ("setpriv", f"--reuid={_NOBODY}", f"--regid={_NOBODY}", "--clear-groups")
_SEARCH: Final = ("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search")


def needs_fuse() -> None:
    needs(os.access("/dev/fuse", os.R_OK | os.W_OK), "/dev/fuse is missing or not permitted")
    needs(shutil.which("fusermount3") is not None, "fusermount3 is missing; install fuse3")


def mounts() -> list[tuple[str, str]]:
    """Where a vTPM is mounted, and the mount's device number."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    fields = [line.split() for line in lines if " - fuse.vtpm " in line]
    return [(field[4], field[2]) for field in fields]


class FuseServer(Server):
    """``swtpm fuse -n NAME`` in the background, mounted in its own folder, by whoever runs this."""

    program: ClassVar[tuple[str, ...]] = SWTPM_FUSE

    def __post_init__(self) -> None:
        super().__post_init__()
        self.more = ("--mount", str(self.mount), *self.more)

    @property
    def mount(self) -> Path:
        return self.folder / f"{self.name}.mount"

    def device_path(self) -> Path:
        return self.mount / self.name

    def waiting(self) -> int:
        (minor,) = (number.split(":")[1] for path, number in mounts() if path == str(self.mount))
        return int((CONNECTIONS / minor / "waiting").read_text())

    def shut_down(self) -> None:
        self.run(OUR_IOCTL, "-s", self.device)  # whoever runs this may not look into the mount

    def check_gone(self) -> None:
        assert str(self.mount) not in dict(mounts())


@dataclass(frozen=True)
class User:
    """Who is not root: a folder of their own, and how programs are run as them."""

    folder: Path
    prefix: tuple[str, ...]

    @property
    def env(self) -> dict[str, str]:
        """The folders that a login gives."""
        (self.folder / "run").mkdir(exist_ok=True)
        self.own(self.folder / "run")
        return {
            "HOME": str(self.folder),
            "XDG_RUNTIME_DIR": str(self.folder / "run"),
            "XDG_STATE_HOME": str(self.folder / "state"),
        }

    def own(self, path: Path) -> None:
        if self.prefix:
            os.chown(path, _NOBODY, _NOBODY)

    def run(self, *argv: str | Path, **settings: Any) -> Done:  # noqa: ANN401  as `run` takes them
        settings["env"] = {**self.env, **(settings.get("env") or {})}
        return run(*self.prefix, *argv, **settings)


@contextmanager
def ordinary_user() -> Iterator[User]:
    """Nobody, if the tests run as root, else who runs them."""
    folder = Path(tempfile.mkdtemp(prefix="vtpm-fuse-"))
    user = User(folder, _prefix())
    user.own(folder)
    try:
        yield user
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _prefix() -> tuple[str, ...]:
    if os.getuid() != 0:
        return ()
    # A checkout below a private home is out of reach for others, but not for this capability.
    look = (*_AS_NOBODY, "test", "-x", sys.executable, "-a", "-r", str(ROOT / "setup.cfg"))
    reachable = subprocess.run(look, check=False).returncode == 0
    return _AS_NOBODY if reachable else (*_AS_NOBODY, *_SEARCH)
