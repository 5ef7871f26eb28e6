"""action.yml: its part that starts a TPM, run as a runner of GitHub runs it; both as scripts."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import textwrap
from pathlib import Path
from typing import Final

import pytest

from tests.support.private import runtime_folder
from tests.support.sockets import TREE
from tests.support.waiting import PATIENCE_SECONDS
from vtpm_cuse.client.child import program_words

ACTION: Final = (TREE / "action.yml").read_text(encoding="utf-8")
PARTS: Final = [
    textwrap.dedent(part) for part in re.findall(r"      run: \|\n((?: {8}.*\n|\n)+)", ACTION)
]
VTPM: Final = program_words("vtpm_cuse.cli.vtpm.vtpm")


def test_the_parts_are_there() -> None:
    assert [part.splitlines()[0] for part in PARTS] == ["# install", "# start"]
    for part in PARTS:
        subprocess.run(
            ["shellcheck", "-S", "warning", "-s", "bash", "-"],
            input=f"set -eo pipefail\n{part}",
            text=True,
            check=True,
        )


@pytest.fixture
def job(tmp_path: Path) -> dict[str, str]:
    """The environment of a step, with the program where the first part puts it."""
    programs = tmp_path / "action/.venv/bin"
    programs.mkdir(parents=True)
    program = programs / "vtpm"
    program.write_text(f'#!/bin/sh\nexec {shlex.join(VTPM)} "$@"\n')
    program.chmod(0o755)
    (tmp_path / "env").touch()
    return {
        **os.environ,
        "GITHUB_ACTION_PATH": str(tmp_path / "action"),
        "GITHUB_ENV": str(tmp_path / "env"),
        "RUNNER_TEMP": str(tmp_path),
        "VTPM_JOB_NAME": "job",
    }


def step(job: dict[str, str], options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", PARTS[1]],
        env={**job, "VTPM_OPTIONS": options},
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )


@pytest.mark.parametrize("options", ["", "--name=mine --raw"])
def test_later_steps_have_a_tpm(job: dict[str, str], options: str) -> None:
    with runtime_folder() as runtime:
        job["XDG_RUNTIME_DIR"] = str(runtime)
        if options:
            job["VTPM_JOB_NAME"] = "mine"
        assert step(job, options).returncode == 0
        lines = Path(job["GITHUB_ENV"]).read_text().splitlines()
        env = {**job, **dict(line.split("=", 1) for line in lines)}
        try:
            tool = ["tpm2_getrandom", "--hex", "8"]
            subprocess.run(tool, env=env, check=True, capture_output=True)
        finally:
            name = env["VTPM_NAME"]
            found = subprocess.run(
                [*VTPM, "env", "--json", name], env=env, check=True, capture_output=True
            )
            os.kill(json.loads(found.stdout)["pid"], signal.SIGKILL)


def test_a_step_fails_with_the_reason(job: dict[str, str]) -> None:
    with runtime_folder() as runtime:
        done = step({**job, "XDG_RUNTIME_DIR": str(runtime)}, "--profile no-such")
    assert done.returncode == 1
    assert "The emulator did not start" in done.stderr
    assert not Path(job["GITHUB_ENV"]).read_text()
