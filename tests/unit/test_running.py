"""How `vtpm env` finds TPMs, and what it does with what somebody else has put there: nothing."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
from typing import TYPE_CHECKING, Any, Final

import pytest

from vtpm_cuse.cli.vtpm import vtpm_env
from vtpm_cuse.errors import LabError
from vtpm_cuse.lab import running
from vtpm_cuse.lab.running import Running, announce, is_name, parse_untrusted

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

ENV: Final = {"VTPM_PATH": "/x/tpm", "TPM2TOOLS_TCTI": "cmd:a b"}
GOOD: Final[dict[str, Any]] = {"name": "one", "version": "2.0", "pid": 7, "env": ENV}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only one in which it looks."""
    monkeypatch.setattr(running, "nest_places", lambda: [str(tmp_path), "/no/such"])
    return tmp_path


@pytest.fixture
def folder(place: Path) -> Path:
    """A TPM's."""
    made = place / "vtpm-0123456789abcdef"
    made.mkdir(mode=0o700)
    return made


def test_who_is_announced_is_found(folder: Path) -> None:
    fd = announce(str(folder), "one", "2.0", ENV)
    assert running.running() == [Running("one", "2.0", os.getpid(), ENV)]
    assert (folder / "env.json").stat().st_mode & 0o777 == 0o600
    with pytest.raises(LabError, match="Could not write"):
        announce(str(folder), "two", "2.0", ENV)
    os.close(fd)
    assert running.running() == [], "whoever announced it has gone"


def test_without_a_name_it_is_the_process(folder: Path) -> None:
    fd = announce(str(folder), "", "1.2", ENV)
    assert [one.name for one in running.running()] == [str(os.getpid())]
    os.close(fd)


def _open_to_others(folder: Path) -> None:
    folder.chmod(0o750)


def _file_open_to_others(folder: Path) -> None:
    (folder / "env.json").chmod(0o640)


def _of_another_user(folder: Path) -> None:
    if os.geteuid():
        pytest.skip("root only")
    os.chown(folder, 65534, 65534)


def _file_of_another_user(folder: Path) -> None:
    if os.geteuid():
        pytest.skip("root only")
    os.chown(folder / "env.json", 65534, 65534)


def _linked_file(folder: Path) -> None:
    (folder / "env.json").rename(folder / "other")
    (folder / "env.json").symlink_to("other")


def _linked_folder(folder: Path) -> None:
    other = folder.with_name("other")
    folder.rename(other)
    folder.symlink_to(other)


def _another_name(folder: Path) -> None:
    folder.rename(folder.with_name("vtpm-0123456789abcdeg"))


def _fifo(folder: Path) -> None:
    (folder / "env.json").unlink()
    os.mkfifo(folder / "env.json", 0o600)


@pytest.mark.parametrize(
    "spoil",
    [
        *(_open_to_others, _file_open_to_others, _of_another_user, _file_of_another_user),
        *(_linked_file, _linked_folder, _another_name, _fifo),
    ],
)
def test_what_is_not_this_users_alone_is_nothing(
    folder: Path, spoil: Callable[[Path], None]
) -> None:
    fd = announce(str(folder), "one", "2.0", ENV)
    spoil(folder)
    assert running.running() == []
    os.close(fd)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "../x"},
        {"name": "a\nb"},
        {"name": 5},
        {"version": "3"},
        {"pid": "7"},
        {"pid": True},
        {"env": None},
        {"env": [["VTPM_PATH", "x"]]},
        {"env": {"LD_PRELOAD": "/x"}},
        {"env": {"VTPM_PATH; x": "/x"}},
        {"env": {"VTPM_PATH": "a\nLD_PRELOAD=/x"}},
        {"env": {"VTPM_PATH": 5}},
        {"more": 1},
    ],
)
def test_an_announcement_that_nobody_wrote_is_none(change: dict[str, Any]) -> None:
    assert parse_untrusted(json.dumps(GOOD).encode()) == Running(**GOOD)
    assert parse_untrusted(json.dumps({**GOOD, **change}).encode()) is None


@pytest.mark.parametrize("data", [b"", b"[]", b"7", b"\xff", b"[" * 60000, b'{"name":'])
def test_no_json_is_none(data: bytes) -> None:
    assert parse_untrusted(data) is None


def test_no_more_is_read_than_it_may_have(folder: Path) -> None:
    path = folder / "env.json"
    path.write_text(" " * (1 << 20) + json.dumps(GOOD))
    path.chmod(0o600)
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert running.running() == []


@pytest.mark.parametrize("name", ["a", "0a", "a-b.c_d", "x" * 64])
def test_names(name: str) -> None:
    assert is_name(name)


@pytest.mark.parametrize("name", ["", "7", "-a", ".a", "a/b", "a b", "a\n", "x" * 65, "é"])
def test_no_names(name: str) -> None:
    assert not is_name(name)


def test_the_only_one_needs_no_name(
    folder: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert vtpm_env.main([], "vtpm env") == 1
    assert "No TPM of this user's runs here" in capsys.readouterr().err
    first = announce(str(folder), "one", "2.0", ENV)
    assert vtpm_env.main(["--shell"], "vtpm env") == 0
    text = capsys.readouterr().out
    assert text == "export VTPM_PATH=/x/tpm\nexport TPM2TOOLS_TCTI='cmd:a b'\n"
    other = place / "vtpm-0123456789abcdee"
    other.mkdir(mode=0o700)
    second = announce(str(other), "two", "1.2", ENV)
    assert vtpm_env.main([], "vtpm env") == 1
    assert "Several TPMs run: one (process" in capsys.readouterr().err
    assert vtpm_env.main(["two"], "vtpm env") == 0
    assert vtpm_env.main(["--list", "--json"], "vtpm env") == 0
    out = capsys.readouterr().out.splitlines()
    assert [one["name"] for one in json.loads(out[-1])] == ["one", "two"]
    os.close(first)
    os.close(second)


@pytest.mark.parametrize("value", ["a'b", "$(touch x)", "`x`", "a b;c", '"', "\\"])
def test_a_shell_takes_values_as_they_are(value: str) -> None:
    (line,) = vtpm_env._lines(Running("a", "2.0", 1, {"VTPM_PATH": value}), for_shell=True)
    words = ["sh", "-c", f'{line}; printf %s "$VTPM_PATH"']
    assert subprocess.run(words, check=True, capture_output=True, text=True).stdout == value
