"""TPMs as a manufacturer gives them out: with endorsement keys and certificates."""

from __future__ import annotations

import os
import subprocess
from typing import Final

from vtpm_cuse.client.child import Scratch, program_environment, program_words
from vtpm_cuse.errors import LabError, shown

_SETUP: Final = "vtpm_cuse.cli.setup.swtpm_setup"
_SETUP_SECONDS: Final = 600
_MESSAGES_MAX: Final = 1 << 14


def set_up(state: str, version: str, profile: str | None) -> None:
    """Makes the TPM in a folder; one that is there already is left alone.

    Its certificates are signed by a CA that nobody has the key of any more.

    Args:
        state: The folder.
        version: "2.0" or "1.2".
        profile: As `Tpm` has it.

    Raises:
        LabError: It cannot be made; with what the set-up said.
    """
    with Scratch() as folder:
        _configure(folder)
        words = ["--tpm-state", state, "--config", f"{folder}/swtpm_setup.conf", "--not-overwrite"]
        words += ["--create-ek-cert", "--create-platform-cert"]
        if version == "2.0":
            words += ["--tpm2", *profile_words(profile, name="--profile-name", text="--profile")]
        _run(words, folder)


def profile_words(profile: str | None, *, name: str, text: str) -> list[str]:
    """The option for a profile, *name* if it is by name, else *text*."""
    if profile is None:
        return []
    return [text if profile.lstrip().startswith("{") else name, profile]


def _configure(folder: str) -> None:
    files = {
        "swtpm_setup.conf": (
            "create_certs_tool = swtpm_localca\n"
            f"create_certs_tool_config = {folder}/swtpm-localca.conf\n"
            f"create_certs_tool_options = {folder}/swtpm-localca.options\n"
            "active_pcr_banks = sha256\n"
        ),
        "swtpm-localca.conf": (
            f"statedir = {folder}/ca\n"
            f"signingkey = {folder}/ca/signkey.pem\n"
            f"issuercert = {folder}/ca/issuercert.pem\n"
            f"certserial = {folder}/ca/certserial\n"
        ),
        "swtpm-localca.options": (
            "--platform-manufacturer vtpm\n--platform-version 1\n--platform-model lab\n"
        ),
    }
    for name, text in files.items():
        with open(os.path.join(folder, name), "x", encoding="utf-8") as file:
            file.write(text)


def _run(words: list[str], folder: str) -> None:
    try:
        done = subprocess.run(  # noqa: S603 - our own program
            [*program_words(_SETUP), *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=program_environment(),
            timeout=_SETUP_SECONDS,
            start_new_session=True,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise LabError(f"Could not set a TPM up: {exc}") from exc
    if done.returncode:
        said = shown(done.stdout[-_MESSAGES_MAX:].decode(errors="replace")).strip()
        raise LabError(f"A TPM could not be set up: status {done.returncode}", said)
