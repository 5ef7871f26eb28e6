"""The tree of TPMs without a mount: its texts, its numbers, and what a manager's refusal becomes."""

from __future__ import annotations

import ast
import errno
import json
import os
from pathlib import Path

import pytest

from tests.support.fake_fleet import FakeFleet, served
from tests.support.fleet import in_trio
from vtpm_cuse.fleet.manager.api import as_told
from vtpm_cuse.tree import contents
from vtpm_cuse.tree.source import Source
from vtpm_cuse.wire.manager import Note


def test_no_text_has_a_line_that_somebody_else_wrote() -> None:
    found = (
        FakeFleet()
        .add("one")
        ._replace(failure="a\nasleep\x1b[2J", labels=(("k\n", "v\nid 7"), ("l", "w")))
    )
    tpm = as_told(found)
    texts = {name: contents.known(tpm, name) for name in contents.files(tpm, "")}
    assert texts["failure"] == b"a\\u000aasleep\\u001b[2J\n"
    assert texts["labels"] == b"k\\u000a=v\\u000aid 7\nl=w\n"
    assert texts["state"] == b"stopped\n"
    assert [line.split()[0] for line in (texts["sockets"] or b"").splitlines()] == [
        *(b"data", b"control", b"managed")
    ]
    status = json.loads(texts["status"] or b"")
    assert (status["failure"], status["labels"]) == (found.failure, dict(found.labels))
    assert {name for name, text in texts.items() if text is None} == {*contents.ASKED, "log"}
    assert "device" not in texts
    device = tpm._replace(device="/dev/vtpmd-one", failure="")
    assert contents.known(device, "device") == b"/dev/vtpmd-one\n"
    assert contents.known(device, "failure") == b""
    notes = [Note(0.0, "a\nb"), Note(1.5, "c")]
    assert contents.log_text(notes) == b"1970-01-01T00:00:00Z a\\u000ab\n1970-01-01T00:00:01Z c\n"


def test_no_name_of_pyfuse3_is_called_that_debian_12_has_not() -> None:
    """3.2.1 has none of those for its integers."""
    source = Path(contents.__file__).with_name("mount.py").read_text(encoding="utf-8")
    called = [
        node.func.attr
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        if isinstance(node.func.value, ast.Name) and node.func.value.id == "pyfuse3"
    ]
    assert {"FUSEError", "readdir_reply"} < {*called}
    assert [name for name in called if name.endswith("T")] == []


def test_numbers_are_kept_as_long_as_the_kernel_knows_them() -> None:
    mount = pytest.importorskip("vtpm_cuse.tree.mount", reason="pyfuse3 is missing")
    numbers, place = mount._Numbers(), mount._Place("id", "state")
    first = numbers.look_up(place)
    assert (numbers.look_up(place), numbers.place(first)) == (first, place)
    numbers.forget(first, 1)
    assert numbers.place(first) == place
    numbers.forget(first, 1)
    assert numbers.look_up(place) not in {first, 1}
    numbers.forget(1, 5)
    assert numbers.place(1) == mount._Place()


@in_trio
async def test_a_refusal_is_an_error_of_a_system_call(tmp_path: Path) -> None:
    path = tmp_path / "manager.sock"
    fleet, source = FakeFleet(), Source(str(path))
    fleet.add("mine", os.geteuid())
    fleet.looks["caps"] = b"of one\n"

    async def error(name: str) -> int | None:
        try:
            await source.ask(lambda manager: manager.look(name, "caps"))
        except OSError as exc:
            return exc.errno
        return 0

    assert await error("mine") == errno.EIO  # no manager
    for _ in range(2):  # one, and the next
        path.unlink(missing_ok=True)
        async with served(fleet, path):
            assert await error("nix") == errno.ENOENT
            fleet.tpms["mine"] = fleet.tpms["mine"]._replace(state="asleep")
            assert await error("mine") == errno.EAGAIN
            fleet.tpms["mine"] = fleet.tpms["mine"]._replace(state="awake")
            assert await source.ask(lambda manager: manager.look("mine", "caps")) == b"of one\n"
            assert await source.ask(lambda manager: manager.look("mine", "ek.crt")) is None
    assert await error("mine") == errno.EIO
    source.close()
