"""Our Debian packages, and systems of their own to install them in."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tools.package import copy_tracked
from vtpm_cuse import __version__

if TYPE_CHECKING:
    from typing import BinaryIO

ROOT: Final = Path(__file__).parents[2]
PACKAGES: Final = ("python3-vtpm-cuse", "vtpm-cuse", "vtpm-cuse-swtpm")
EARLIER: Final = "0.0.1"
# Of the system alone: no Python or tool of a user's.
SYSTEM: Final = {
    "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LC_ALL": "C.UTF-8",
    "DEBIAN_FRONTEND": "noninteractive",
}
# A system of its own over another, whose files it only reads; all that changes is in "upper". It
# has no network.
ENTER: Final = """
mount --make-rprivate /
mount -t overlay -o "lowerdir=$3,upperdir=$1/upper,workdir=$1/work" overlay "$1/system"
cd "$1/system"
mount -t proc proc proc
mount --rbind /dev dev
mount -t tmpfs tmpfs run
mount -t tmpfs tmpfs tmp
mount --bind "$2" mnt
mkdir tmp/old
pivot_root . tmp/old
umount -l /tmp/old
rmdir /tmp/old
shift 3
exec /bin/sh -ec "$@"
"""
# Where the package manager and what it starts note what they did.
NOTES: Final = (
    "var/lib/dpkg/",
    "var/lib/apt/",
    "var/cache/",
    "var/log/",
    "var/lib/systemd/",
    "etc/dpkg",
)
USERS: Final = ("etc/passwd", "etc/group", "etc/shadow", "etc/gshadow", "etc/.pwd.lock")


UNSAFE: Final = "etc/dpkg/dpkg.cfg.d/unsafe"


def is_new(name: str) -> bool:
    """Whether the system below has nothing of that name."""
    return not Path("/", name).exists()


class System:
    """A Debian with the packages of *below*, Debian's swtpm among them, and with ours beside it."""

    def __init__(self, folder: Path, debs: Path, below: Path = Path("/")) -> None:
        self._folder = folder
        self._debs = debs
        self._below = below
        for name in ("upper", "work", "system"):
            (folder / name).mkdir()
        # No disk is waited for: what a power cut would leave is thrown away all the same.
        settings = folder / "upper" / UNSAFE
        settings.parent.mkdir(parents=True)
        settings.write_text("force-unsafe-io\n")

    def run(self, script: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """A script of sh in there, that ends at the first error."""
        return subprocess.run(
            self._entering(script),
            env={**SYSTEM, **variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )

    def start(self, script: str, log: BinaryIO) -> subprocess.Popen[bytes]:
        """A script that goes on, with all that it starts, until it is killed."""
        return subprocess.Popen(
            self._entering(script), env=SYSTEM, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )

    def _entering(self, script: str) -> list[str]:
        alone = ("unshare", "--mount", "--pid", "--cgroup", "--net", "--fork", "--kill-child")
        places = (self._folder, self._debs, self._below)
        return [*alone, "sh", "-ec", ENTER, "sh", *map(str, places), script]

    def say(self, script: str, **variables: str) -> str:
        """What a script prints that succeeds."""
        done = self.run(script, **variables)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def install(self, *names: str) -> str:
        """Installs packages as a user does; nothing is fetched."""
        files = " ".join(f"/mnt/{name}_{__version__}_all.deb" for name in names)
        return self.say(f"apt-get install -y --no-install-recommends {files}")

    def changed(self) -> set[str]:
        """Files and links that are new or other than in the system below, and new folders."""
        upper = self._folder / "upper"
        names = set()
        for path in upper.rglob("*"):
            name = str(path.relative_to(upper))
            folder = path.is_dir() and not path.is_symlink()
            # What is gone is a device there.
            if is_new(name) if folder else path.is_file() or path.is_symlink():
                names.add(name)
        return {name for name in names if not name.startswith((*NOTES, *USERS))}


def build(folder: Path) -> None:
    """Makes the packages in *folder*, as somebody who is not one of its makers would."""
    copy_tracked(folder / "tree")
    done = subprocess.run(
        ["dpkg-buildpackage", "-b", "-us", "-uc"],
        cwd=folder / "tree",
        env={**SYSTEM, "HOME": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def earlier(debs: Path, names: tuple[str, ...]) -> None:
    """Makes an earlier version of some packages below them, as earlier/*NAME*.deb."""
    for name in names:
        tree = debs / "earlier" / name
        tree.parent.mkdir(exist_ok=True)
        _run("dpkg-deb", "-R", debs / f"{name}_{__version__}_all.deb", tree)
        for path in (
            tree / "DEBIAN/control",
            *tree.glob("usr/lib/python3/*/vtpm_cuse/__init__.py"),
        ):
            path.write_text(path.read_text().replace(__version__, EARLIER))
        _run("dpkg-deb", "-Znone", "-b", tree, f"{tree}.deb")


def _run(*words: str | Path) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
