"""A state key that is not in a file, for a TPM below another root or as another user."""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from tests.support import sockets as s
from tests.support.waiting import PATIENCE_SECONDS

if TYPE_CHECKING:
    from collections.abc import Iterator

KEY: Final = bytes(range(16))
NAME: Final = "vtpm:chroot"
USER: Final = 12345
_ENCRYPTED: Final = 1

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

_KEYCTL, _ADD_KEY, _JOIN, _SESSION = 250, 248, 1, -3  # of x86-64, and linux/keyctl.h
WITH_KEYRING: Final = (
    sys.executable,
    "-c",
    "import ctypes, sys; from vtpm_cuse.cli.swtpm import main\n"
    "call = ctypes.CDLL(None, use_errno=True).syscall\n"
    f"assert call({_KEYCTL}, {_JOIN}, None) != -1\n"
    f"name, key = {NAME.encode()!r}, {KEY.hex().encode()!r}\n"
    f"assert call({_ADD_KEY}, b'user', name, key, len(key), {_SESSION}) != -1\n"
    "sys.exit(main())",
)
"""`swtpm` in a session keyring of its own that has the key; no library was loaded for that."""


def needs_keyutils() -> None:
    try:
        ctypes.CDLL("libkeyutils.so.1")
    except OSError:
        pytest.skip("libkeyutils1 is missing")


@pytest.fixture
def root() -> Iterator[Path]:
    """A root folder with nothing in it but a state of the other user's, where all may go."""
    with tempfile.TemporaryDirectory(prefix="vtpm-root-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "state").mkdir()
        os.chown(folder / "state", USER, USER)
        yield folder


@contextmanager
def started(
    root: Path, *words: str, program: tuple[str, ...], env: dict[str, str]
) -> Iterator[None]:
    """The TPM in the background, until the end."""
    done = s.run_swtpm(
        *("--tpm2", "--daemon", *s.RUNNING, "--ctrl", "type=unixio,path=/state/ctrl"),
        *("--log", "file=/log", *words),
        program=program,
        env=env,
    )
    log = root / "log"
    assert (done.returncode, done.stderr) == (0, ""), log.exists() and log.read_text()
    try:
        yield
    finally:
        with s.connect(root / "state" / "ctrl") as client:
            assert client.control(s.SHUTDOWN) == s.u32(0)
            assert s.readable(client.socket, PATIENCE_SECONDS)


def check_encrypted(state: Path) -> None:
    assert (state / "tpm2-00.permall").read_bytes()[5] & _ENCRYPTED


@pytest.mark.parametrize("runas", [(), ("--runas", str(USER))], ids=["root", "another-user"])
def test_key_of_a_keyring_below_another_root(root: Path, runas: tuple[str, ...]) -> None:
    """Keyrings are the process's, whatever its root; the library that reads them is outside."""
    needs_keyutils()
    words = ("--chroot", str(root), "--tpmstate", "dir=/state", "--key", f"keyring={NAME}", *runas)
    with started(root, *words, program=WITH_KEYRING, env={}):
        check_encrypted(root / "state")


def test_key_of_a_keyring_as_another_user(root: Path) -> None:
    needs_keyutils()
    state = root / "state"
    done = s.run_swtpm(
        *("--tpm2", "--tpmstate", f"dir={state}", "--runas", str(USER), "--print-info", "1"),
        *("--key", f"keyring={NAME}"),
        program=WITH_KEYRING,
    )
    assert (done.returncode, done.stderr) == (0, "")
    with s.Server(
        root, *s.RUNNING, "--runas", str(USER), "--key", f"keyring={NAME}", program=WITH_KEYRING
    ) as server:
        assert server.request(s.GET_CONFIG, size=8) == s.u32(0, 1)
    check_encrypted(state)


@pytest.mark.parametrize("runas", [(), ("--runas", str(USER))], ids=["root", "another-user"])
def test_credential_below_the_new_root(root: Path, runas: tuple[str, ...]) -> None:
    """As all paths, that of the credentials is looked up below the new root."""
    (root / "credentials").mkdir()
    (root / "credentials" / "tpm").write_text(KEY.hex())
    words = ("--chroot", str(root), "--tpmstate", "dir=/state", "--key", "credential=tpm", *runas)
    with started(root, *words, program=s.OURS, env={"CREDENTIALS_DIRECTORY": "/credentials"}):
        check_encrypted(root / "state")


def test_credential_outside_of_the_new_root(root: Path, tmp_path: Path) -> None:
    """Where systemd puts it; one line says what is wrong, and no TPM without a key is made."""
    outside = tmp_path / "credentials"
    outside.mkdir()
    (outside / "tpm").write_text(KEY.hex())
    done = s.run_swtpm(
        *("--tpm2", "--chroot", root, "--tpmstate", "dir=/state", "--key", "credential=tpm"),
        *("--ctrl", "type=unixio,path=/state/ctrl", *s.RUNNING),
        env={"CREDENTIALS_DIRECTORY": str(outside)},
    )
    assert done.returncode == 1
    assert done.stderr == (
        f"swtpm: Unable to open file {outside}/tpm: No such file or directory; "
        "with --chroot, CREDENTIALS_DIRECTORY is looked for below the new root\n"
    )
    assert not list((root / "state").iterdir())
