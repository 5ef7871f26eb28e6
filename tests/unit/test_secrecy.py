"""Keys out of core dumps and swap, and from systemd and the kernel; in processes of their own."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import in_child
from tests.support.waiting import PATIENCE_SECONDS
from vtpm_cuse.config import KeySource, VtpmConfig
from vtpm_cuse.errors import UsageError
from vtpm_cuse.service.compose import make_vtpm
from vtpm_cuse.service.confine import secrecy
from vtpm_cuse.storage.keys import read_key

PR_GET_DUMPABLE, PR_SET_DUMPABLE = 3, 4
KEY = bytes(range(16))


def dumpable() -> int:
    return int(ctypes.CDLL(None).prctl(PR_GET_DUMPABLE, 0, 0, 0, 0))


def show_process() -> None:
    """A program that was called in this process may have hidden it."""
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)


def locked_kib() -> int:
    return int(Path("/proc/self/status").read_text().partition("VmLck:")[2].split()[0])


@in_child
def test_hidden_process_leaves_no_core() -> None:
    os.chdir("/")
    resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    show_process()
    assert dumpable() == 1
    secrecy.hide_process()
    assert dumpable() == 0
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGQUIT, signal.SIG_DFL)  # a shell may have switched it off
        os.kill(os.getpid(), signal.SIGQUIT)
    assert not os.WCOREDUMP(os.waitpid(child, 0)[1])


@in_child
def test_secret_is_locked_into_memory() -> None:
    assert locked_kib() == 0
    assert secrecy.keep_from_swap(bytes(range(32)))
    assert locked_kib() >= 4


@in_child
def test_no_memory_may_be_locked() -> None:
    """An ordinary user without a limit to speak of: the TPM works all the same."""
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
    if os.geteuid() == 0:
        os.setuid(65534)
    assert not secrecy.keep_from_swap(bytes(range(32)))


@pytest.mark.parametrize("migration", [False, True])
def test_process_with_a_key_is_hidden(tmp_path: Path, migration: bool) -> None:
    path = tmp_path / "key"
    path.write_text(KEY.hex())
    source = KeySource(file=str(path))

    @in_child
    def check() -> None:
        show_process()
        make_vtpm(VtpmConfig(tpm2=True))
        assert dumpable() == 1
        key, migration_key = (None, source) if migration else (source, None)
        make_vtpm(VtpmConfig(tpm2=True, key=key, migration_key=migration_key))
        assert dumpable() == 0
        assert locked_kib() >= 4

    check()


@in_child
def test_process_is_hidden_before_the_key_is_read() -> None:
    with pytest.raises(UsageError):
        make_vtpm(VtpmConfig(tpm2=True, key=KeySource(file="/nonexistent")))
    assert dumpable() == 0


# -- credentials --------------------------------------------------------------------------


def test_credential(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    (tmp_path / "hex").write_text(KEY.hex() + "\n")
    (tmp_path / "binary").write_bytes(KEY)
    assert read_key(KeySource(credential="hex")).secret == KEY
    assert read_key(KeySource(credential="binary", format="binary")).secret == KEY
    with pytest.raises(UsageError, match=r"Unable to open file .*/absent: No such file"):
        read_key(KeySource(credential="absent"))


@pytest.mark.parametrize("name", ["../key", "/etc/passwd", "..", ".", "a/b"])
def test_credential_is_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    folder = tmp_path / "credentials"
    folder.mkdir()
    (tmp_path / "key").write_text(KEY.hex())
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(folder))
    with pytest.raises(UsageError, match="cannot be the name of a credential"):
        read_key(KeySource(credential=name))


def test_no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    with pytest.raises(UsageError, match="LoadCredential=tpm:"):
        read_key(KeySource(credential="tpm"))


# -- the kernel's keyring -----------------------------------------------------------------


def add_key(description: str, payload: bytes) -> None:
    """Into a session keyring that ends with this process."""
    library = ctypes.CDLL("libkeyutils.so.1", use_errno=True)
    assert library.keyctl_join_session_keyring(None) != -1, os.strerror(ctypes.get_errno())
    where = ctypes.c_int32(-3)  # KEY_SPEC_SESSION_KEYRING
    added = library.add_key(b"user", description.encode(), payload, len(payload), where)
    assert added != -1, os.strerror(ctypes.get_errno())


@in_child
def test_keyring() -> None:
    add_key("vtpm:test", KEY.hex().encode())
    assert read_key(KeySource(keyring="vtpm:test")).secret == KEY
    add_key("vtpm:test", bytes(range(32)))
    source = KeySource(keyring="vtpm:test", format="binary", mode="aes-256-cbc")
    assert read_key(source).secret == bytes(range(32))


@in_child
def test_keyring_that_has_no_such_key() -> None:
    add_key("vtpm:other", KEY)
    with pytest.raises(UsageError, match=r"'vtpm:test' .* Required key not available; add it"):
        read_key(KeySource(keyring="vtpm:test"))


@in_child
def test_long_key_in_a_keyring() -> None:
    add_key("vtpm:test", b"0" * 5000)
    with pytest.raises(UsageError, match="longer than 4096 bytes"):
        read_key(KeySource(keyring="vtpm:test"))


def test_file_comes_before_credential_and_keyring(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text(KEY.hex())
    source = KeySource(file=str(path), credential="x", keyring="x", pwdfile="/nonexistent")
    assert read_key(source).secret == KEY


# -- the whole program --------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--key", "--migration-key"])
def test_key_is_neither_in_the_log_nor_in_the_arguments(tmp_path: Path, option: str) -> None:
    """The words name where the key is; ten lines say what the program did with it."""
    (tmp_path / "tpm").write_text(KEY.hex())
    code = "import sys; from vtpm_cuse.cli.swtpm import main; sys.exit(main())"
    words = ["socket", "--tpm2", "--tpmstate", f"dir={tmp_path}", "--print-info", "1"]
    words += [option, "credential=tpm", "--log", f"file={tmp_path}/log,level=9"]
    run = subprocess.run(
        [sys.executable, "-c", code, *words],
        env={**os.environ, "CREDENTIALS_DIRECTORY": str(tmp_path)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
        timeout=PATIENCE_SECONDS,
    )
    said = run.stdout + run.stderr + (tmp_path / "log").read_text()
    assert "TPMSpecification" in said
    assert KEY.hex() not in said.lower()
    encrypted = (tmp_path / "tpm2-00.permall").read_bytes()[5] & 1
    assert bool(encrypted) is (option == "--key")
