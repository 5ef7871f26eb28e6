"""The TPM that is set up: the engine in this process, or an emulator that the user named."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import tempfile
from typing import TYPE_CHECKING, Any, Final

from vtpm_cuse.client.connect import receive
from vtpm_cuse.config import VtpmConfig
from vtpm_cuse.errors import (
    AnswerError,
    TpmUnavailable,
    UsageError,
    VtpmError,
    WireError,
)
from vtpm_cuse.programs import start_program
from vtpm_cuse.storage.base import load_all
from vtpm_cuse.storage.locations import parse
from vtpm_cuse.storage.stores import open_store
from vtpm_cuse.wire.layout import BIG
from vtpm_cuse.wire.tpm import TPM_HEADER_SIZE, TpmHeader, TpmRc, TpmSu

if TYPE_CHECKING:
    from vtpm_cuse.config import KeySource, ProfileConfig
    from vtpm_cuse.manufacture.config import SetupConfig
    from vtpm_cuse.storage.base import StateStore

ANSWER_SECONDS: Final = 60.0
"""How long a TPM in another process may take to answer."""
_RESPONSE_MAX: Final = 1 << 16


class EngineTpm:
    """The engine in this process, on state in memory.

    Attributes:
        blobs: The state, header and all, as it would be stored now.

    Raises:
        VtpmError: The key cannot be read, the profile does not fit, or the state cannot be used.
    """

    def __init__(self, config: SetupConfig, blobs: dict[str, bytes]) -> None:
        from vtpm_cuse.service.compose import make_vtpm_in_memory

        self._canceled = False
        self.blobs = dict(blobs)
        tpm2 = self.tpm2 = config.plan.tpm2
        self._vtpm, self._store = make_vtpm_in_memory(
            VtpmConfig(tpm2=tpm2, profile=config.profile, key=config.key), self.blobs
        )
        self._kind = TpmSu.TPM_SU_CLEAR if tpm2 else TpmSu.TPM_ST_CLEAR

    def start(self) -> None:
        """Powers the TPM on. Raises UsageError; the reason is in the log."""
        try:
            self._vtpm.start()
        except TpmUnavailable as exc:
            version = "2" if self._vtpm.tpm2 else "1.2"
            raise UsageError(f"Could not start the TPM {version}.") from exc
        self._vtpm.startup(self._kind)

    def process(self, command: bytes) -> bytes:
        """One command, one response. Raises KeyboardInterrupt after `cancel`."""
        answer = self._vtpm.process(command)
        if self._canceled:
            raise KeyboardInterrupt
        return answer

    def info(self, flags: int) -> str:
        """JSON text."""
        return self._vtpm.info(flags)

    def cancel(self) -> int:
        """See `SetupTpm`. The running command is awaited: libtpms 0.9 can crash after a cancel."""
        self._canceled = True
        return TpmRc.TPM_SUCCESS

    def finish(self) -> dict[str, bytes]:
        """See `SetupTpm`."""
        self._vtpm.stop()
        return dict(self.blobs)

    def take(self, blobs: dict[str, bytes], changed: set[str]) -> None:
        """Has these as its state, while it is off. Raises StorageError: One *changed* is none."""
        self.blobs.clear()
        self.blobs.update(blobs)
        for name in changed:
            self._store.load(name)

    def close(self) -> None:
        """See `SetupTpm`. A TPM in memory that nobody wants needs no orderly end."""
        if not self._canceled:
            self._vtpm.close()


class ChildTpm:
    """An emulator as the C suite's, started as the user said, on a copy of the state.

    It gets the state directory as URI, the data channel as the end of a socket pair and the
    control channel as another, as the C suite's swtpm_setup does it.
    """

    def __init__(self, config: SetupConfig, blobs: dict[str, bytes]) -> None:
        self._config = config
        self.tpm2 = config.plan.tpm2
        self._blobs = blobs
        # Beside the state: confined emulators may write there, and perhaps nowhere else.
        where = parse(config.uri).folder_to_make or None
        self._directory = tempfile.mkdtemp(prefix=".swtpm_setup.", dir=where)
        self._closing = contextlib.ExitStack()
        self._closing.callback(shutil.rmtree, self._directory, ignore_errors=True)
        self._process: subprocess.Popen[bytes] | None = None
        self._canceled = False

    def start(self) -> None:
        """Starts the emulator. Raises VtpmError."""
        from vtpm_cuse.client.channel import SocketControl

        store = self._open_store()
        for name, blob in self._blobs.items():
            store.store(name, blob)
        store.close()
        self._data, data_end = self._socket_pair()
        control, control_end = self._socket_pair()
        words = [*self._config.command, *self._words(data_end.fileno(), control_end.fileno())]
        fds = [data_end.fileno(), control_end.fileno(), *self._key_fds()]
        if self._config.profile is not None:
            fd = _text_fd(self._config.profile.text)
            self._closing.callback(os.close, fd)
            words += ["--profile", _profile_words(self._config.profile, fd)]
            fds.append(fd)
        output = subprocess.DEVNULL if self._config.logfile else None
        try:
            self._process = start_program(
                words, stdin=subprocess.DEVNULL, stdout=output, stderr=output, pass_fds=fds
            )
        except OSError as exc:
            raise UsageError(f"Could not start swtpm '{words[0]}': {exc.strerror}") from exc
        data_end.close()
        control_end.close()
        self._control = SocketControl(control.dup)
        try:
            self._control.capability()  # answered when it is up
        except (OSError, VtpmError) as exc:
            version = "2" if self._config.plan.tpm2 else "1.2"
            raise UsageError(
                f"swtpm process terminated unexpectedly.\nCould not start the TPM {version}."
            ) from exc

    def process(self, command: bytes) -> bytes:
        """One command, one response. Raises VtpmError; KeyboardInterrupt after `cancel`."""
        if self._canceled:  # perhaps before there was a process to end
            raise KeyboardInterrupt
        try:
            self._data.sendall(command)
            response = receive(self._data, TPM_HEADER_SIZE)
            size = TpmHeader.unpack_untrusted(response, BIG).size
            if not TPM_HEADER_SIZE <= size <= _RESPONSE_MAX:
                raise WireError("Response", TPM_HEADER_SIZE, size)
            return response + receive(self._data, size - TPM_HEADER_SIZE)
        except EOFError as exc:
            raise UsageError(f"Could not talk to swtpm: {exc}") from exc
        except OSError as exc:
            raise UsageError(f"Could not talk to swtpm: {exc.strerror or exc}") from exc

    def info(self, flags: int) -> str:
        """JSON text. Raises VtpmError."""
        try:
            return self._control.info(flags)
        except OSError as exc:
            raise UsageError(f"Could not talk to swtpm: {exc.strerror or exc}") from exc
        except AnswerError:
            return "{}"  # an old emulator knows fewer flags

    def cancel(self) -> int:
        """See `SetupTpm`."""
        self._canceled = True
        if self._process is not None:
            self._process.terminate()
        return TpmRc.TPM_SUCCESS

    def finish(self) -> dict[str, bytes]:
        """See `SetupTpm`."""
        self._end_process()
        store = self._open_store()
        found = load_all(store)
        store.close()
        return found

    def close(self) -> None:
        """See `SetupTpm`."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._closing.close()

    # -- helpers --------------------------------------------------------------------------

    def _end_process(self) -> None:
        if self._process is None:
            return
        with contextlib.suppress(OSError, VtpmError):
            self._control.shutdown()
        try:
            self._process.wait(ANSWER_SECONDS)
        except subprocess.TimeoutExpired:
            raise UsageError("swtpm did not end after it was asked to.") from None

    def _open_store(self) -> StateStore:
        return open_store(f"dir://{self._directory}", tpm2=self._config.plan.tpm2, lock=False)

    def _socket_pair(self) -> tuple[socket.socket, socket.socket]:
        ours, theirs = socket.socketpair()
        self._closing.callback(ours.close)
        self._closing.callback(theirs.close)
        ours.settimeout(ANSWER_SECONDS)
        return ours, theirs

    def _words(self, data_fd: int, control_fd: int) -> list[str]:
        config = self._config
        words = ["--flags", "not-need-init,startup-clear"]
        words += ["--tpmstate", f"backend-uri=dir://{self._directory}"]
        if config.plan.tpm2:
            words.append("--tpm2")
        if config.key is not None:
            words += ["--key", _key_words(config.key)]
        if config.logfile is not None:
            words += ["--log", f"file={config.logfile}"]
        words += ["--server", f"type=tcp,fd={data_fd}"]
        return [*words, "--ctrl", f"type=unixio,clientfd={control_fd}"]

    def _key_fds(self) -> list[int]:
        key = self._config.key
        return [] if key is None else [fd for fd in (key.fd, key.pwdfd) if fd is not None]


def _key_words(key: KeySource) -> str:
    """The suboptions of ``--key``; the same source counts as in `storage.keys.read_key`."""
    if key.file is not None:
        source = f"file={key.file}"
    elif key.fd is not None:
        source = f"fd={key.fd}"
    elif key.pwdfile is not None:
        source = f"pwdfile={key.pwdfile}"
    else:
        source = f"pwdfd={key.pwdfd}"
    return f"{source},mode={key.mode}"


def _profile_words(profile: ProfileConfig, fd: int) -> str:
    words = f"fd={fd}"
    return (
        f"{words},remove-disabled={profile.remove_disabled}" if profile.remove_disabled else words
    )


def _text_fd(text: str) -> int:
    fd = os.memfd_create("profile")
    os.write(fd, os.fsencode(text))
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


# Any: JSON of another program.
def ask_json(words: tuple[str, ...]) -> dict[str, Any]:
    """What an emulator says about itself. Raises UsageError when it says nothing of the kind."""
    try:
        with start_program(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            try:
                output, errors = process.communicate(timeout=ANSWER_SECONDS)
            except BaseException:
                process.kill()
                raise
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise UsageError(f"Could not start swtpm '{words[0]}': {exc}") from exc
    try:
        answer = json.loads(output)
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict):
        said = errors.decode(errors="replace").strip()
        raise UsageError(f"{words[0]} exit with status {process.returncode}: {said}")
    return answer
