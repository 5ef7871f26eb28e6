"""Where no thread and no process can be had: one line, and nothing appears."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tests.kernel.harness import PROGRAMS
from tests.support.fuse import User, needs_fuse, ordinary_user

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def user() -> Iterator[User]:
    with ordinary_user() as user:
        yield user


@pytest.mark.parametrize(
    ("words", "missing"),
    [
        ("socket --ctrl type=unixio,path=c", "thread"),
        ("socket --ctrl type=unixio,path=c --daemon", "other process"),
        ("chardev --chardev /dev/zero --ctrl type=unixio,path=c", "thread"),
        ("fuse -n x --mount m --foreground", "other process"),
        ("fuse -n x --mount m", "other process"),
    ],
)
def test_no_thread_and_no_process(words: str, missing: str, user: User) -> None:
    if "fuse" in words:
        needs_fuse()
    (user.folder / "state").mkdir()
    user.own(user.folder / "state")
    swtpm, state = str(PROGRAMS / "swtpm"), f"dir={user.folder / 'state'}"
    done = user.run(
        *("bash", "-c", 'cd "$1"; shift; ulimit -u 1; exec "$@"', "bash", user.folder, swtpm),
        *(*words.split(), "--tpm2", "--tpmstate", state, "--flags", "startup-clear"),
        status=1,
    )
    hint = "raise the limit: 'ulimit -u', or TasksMax= of a unit"
    assert done.stderr == f"swtpm: Error: No {missing} can be started; {hint}\n"
    assert set(os.listdir(user.folder)) <= {"state", "run"}
    assert not os.listdir(user.folder / "state")
