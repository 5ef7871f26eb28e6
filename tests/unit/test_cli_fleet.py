"""The commands of ``vtpm`` that ask the manager, as a shell sees them."""

from __future__ import annotations

import base64
import getpass
import io
import json
import logging
import os
import pty
import shlex
import stat
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import pytest
import trio

from tests.support.fake_fleet import OTHER_USER, FakeFleet, served
from tests.support.waiting import PATIENCE_SECONDS, wait_until
from vtpm_cuse.cli import vtpmd
from vtpm_cuse.cli.emulator import swtpm_fuse
from vtpm_cuse.cli.emulator.settings import fuse_config
from vtpm_cuse.cli.words.commandline import CommandLine
from vtpm_cuse.client.manager import default_path
from vtpm_cuse.config import KeySource
from vtpm_cuse.errors import FleetError
from vtpm_cuse.fleet.base import Bundle, Event, Spec

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.programs import Run


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeFleet]:
    """One whose manager VTPM_MANAGER names."""
    fleet, path = FakeFleet(), tmp_path / "manager.sock"
    monkeypatch.setenv("VTPM_MANAGER", str(path))
    ready = threading.Event()
    end = trio.CancelScope()

    async def main() -> None:
        with end:
            async with served(fleet, path):
                fleet.token = trio.lowlevel.current_trio_token()
                ready.set()
                await trio.sleep_forever()

    thread = threading.Thread(target=trio.run, args=(main,))
    thread.start()
    try:
        assert ready.wait(PATIENCE_SECONDS)
        yield fleet
    finally:
        fleet.token.run_sync_soon(end.cancel)
        thread.join()


def test_from_create_to_rm(run: Run, fleet: FakeFleet) -> None:
    assert run("create", "web1", "--label", "vm=7", "--label", "note=a=b", "--profile", "null") == (
        0,
        "web1: stopped\n",
        "",
    )
    more = ("--interface", "cuse", "--cdi", "--rm")
    assert run("create", "--owner", str(OTHER_USER), *more, "web2")[0] == 0
    assert fleet.specs == [
        Spec("web1", os.geteuid(), "null", labels=(("vm", "7"), ("note", "a=b"))),
        Spec("web2", OTHER_USER, interface="cuse", cdi="remove"),
    ]
    for words, offer in ((["--off"], "off"), ([], "keep"), (["--rm"], "remove")):
        assert run("cdi", *words, "web2") == (0, "web2: stopped\n", "")
        assert fleet.tpms["web2"].cdi == offer
    assert "offered as  vtpm-cuse.org/vtpm=web2, and deleted" in run("show", "web2")[1]
    for verb, state in {
        "start": "asleep",
        "wake": "awake",
        "hibernate": "asleep",
        "reset": "awake",
        "stop": "stopped",
    }.items():
        assert run(verb, "web1") == (0, f"web1: {state}\n", "")
        status, out, err = run(verb, "--json", fleet.tpms["web1"].id)
        assert (status, err, json.loads(out)["state"]) == (0, "", state)
    assert run("snapshot", "web1", "then") == (0, "web1: stopped\n", "")
    assert run("restore", "web1", "then") == (0, "web1: stopped\n", "")
    assert run("clone", "web1", "web3") == (0, "web3: stopped\n", "")
    assert fleet.asked[-3:] == [
        ("snapshot", fleet.tpms["web1"].id, "then"),
        ("restore", "web1", "then"),
        ("clone", "web1", "web3", "new"),
    ]
    assert run("rm", "web1") == (0, "", "")
    status, out, err = run("rm", "--force", "--json", "web2")
    assert (status, err, json.loads(out)["name"]) == (0, "", "web2")
    assert fleet.asked[-2:] == [("remove", "web1", False), ("remove", "web2", True)]
    assert set(fleet.tpms) == {"web3"}


def test_what_is_made_with_it(
    run: Run, fleet: FakeFleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    key = "file=web1.key,format=binary,mode=aes-256-cbc"
    assert run("create", "--manufactured", "--key", key, "web1")[0] == 0
    assert run("create", "--key", "credential=tpm", "web2")[0] == 0
    file = KeySource(str(tmp_path / "web1.key"), mode="aes-256-cbc", format="binary")
    assert fleet.specs == [
        Spec("web1", os.geteuid(), manufactured=True, key=file),
        Spec("web2", os.geteuid(), key=KeySource(credential="tpm")),
    ]
    for wrong in ("mode=aes-cbc", "file=a,credential=b", "file=a,fd=3", "fd=99999", "remove=1"):
        assert run("create", "--key", wrong, "web3")[0] == 1
    assert len(fleet.specs) == 2


def test_a_key_that_is_kept_nowhere_is_given_each_time(
    run: Run, fleet: FakeFleet, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """It is read here, with the rights of who asks, and is in no message."""
    caplog.set_level(logging.DEBUG)
    secret, path = os.urandom(32), tmp_path / "web1.vtpm"

    def given() -> str:
        reads, writes = os.pipe()
        os.write(writes, secret)
        os.close(writes)
        return f"fd={reads},format=binary,mode=aes-256-cbc"

    assert run("create", "--key", given(), "web1") == (0, "web1: stopped\n", "")
    assert run("start", "--key", given(), "web1")[0] == 0
    fleet.add("web2", os.geteuid())
    assert run("export", "web2", str(path))[0] == run("rm", "web2")[0] == 0
    assert run("import", "--key", given(), str(path))[0] == 0
    assert fleet.secrets == [secret] * 3
    assert {spec.key for spec in fleet.specs} == {KeySource(mode="aes-256-cbc")}
    assert "Start of 'web1'" in caplog.text
    assert secret.hex() not in caplog.text
    assert base64.b64encode(secret).decode() not in caplog.text
    short = given().replace("mode=aes-256-cbc", "mode=rot13")
    assert run("start", "--key", short, "web1")[0] == 1
    assert len(fleet.secrets) == 3


def test_a_tpm_goes_through_a_file(
    run: Run, fleet: FakeFleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tpm = fleet.add("web1", os.geteuid(), vm="7")
    path = tmp_path / "web1.vtpm"
    assert run("export", "web1", str(path)) == (0, "", "")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    text = path.read_text()
    assert run("export", "web1", "-") == (0, text, "")
    status, _, said = run("export", "web1", str(path))
    assert (status, "File exists" in said, path.read_text()) == (1, True, text)
    for source in (str(path), "-"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        assert run("import", "--key", "credential=tpm", source, "web2") == (
            *(0, "web2: stopped\n", ""),
        )
        spec = Spec("web2", os.geteuid(), labels=(("vm", "7"),), key=KeySource(credential="tpm"))
        assert fleet.bundles.pop() == Bundle(tpm.id, spec, fleet.state)
        assert run("rm", "web2")[0] == 0
    status, _, said = run("import", str(path))
    assert (status, said) == (1, "vtpm import: web1: there is one already; choose another name\n")


@pytest.mark.parametrize(
    ("words", "limits"),
    [
        ([], {}),
        (["--quota", "tpms=0"], {"tpms": 0}),
        (["--quota", "mib=3,tpms=5"], {"tpms": 5, "bytes": 3 << 20}),
    ],
)
def test_what_a_user_may_have(words: list[str], limits: dict[str, int]) -> None:
    assert vtpmd._limits(CommandLine(vtpmd.PROGRAM, words)) == limits


def test_logs(run: Run, fleet: FakeFleet, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet.add("web1")
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    assert run("logs", "web1") == (0, "1970-01-01 00:00:00 web1 was \\u001b[2Jmade\n", "")
    assert json.loads(run("logs", "--json", "web1")[1]) == [
        {"time": 0.0, "text": "web1 was \x1b[2Jmade"}
    ]


@pytest.mark.parametrize("text", ["", "[]", "{}", "[" * 100_000, '{"format": 7}', "\0"])
def test_what_is_no_archive_is_not_sent(
    run: Run, fleet: FakeFleet, tmp_path: Path, text: str
) -> None:
    path = tmp_path / "web1.vtpm"
    path.write_text(text)
    status, out, said = run("import", str(path))
    assert (status, out) == (1, "")
    assert said.startswith(f"vtpm import: {path} is no archive of a TPM: ")
    assert fleet.bundles == []


def test_what_machines_and_containers_are_given(run: Run, fleet: FakeFleet) -> None:
    fleet.add("one")
    found = fleet.add("two")._replace(interface="cuse", sockets={})
    fleet.tpms["two"] = found._replace(device="/dev/a,'b", managed_device="/dev/c d")
    fleet.tpms["off"] = found._replace(name="off")
    fleet.tpms["own"] = fleet.tpms["two"]._replace(name="own", interface="fuse")
    fleet.tpms["named"] = fleet.tpms["two"]._replace(name="named", cdi="keep")

    def given(*words: str) -> str:
        status, out, err = run("attach", *words)
        return out if status == 0 else err

    control = "/run/vtpm/one/control"
    assert shlex.split(given("one")) == [
        *("-chardev", f"socket,id=chrtpm,path={control}"),
        *("-tpmdev", "emulator,id=tpm0,chardev=chrtpm", "-device", "tpm-crb,tpmdev=tpm0"),
    ]
    assert shlex.split(given("two")) == [
        *("-tpmdev", "passthrough,id=tpm0,path=/dev/a,,'b,cancel-path=/dev/null"),
        *("-device", "tpm-tis,tpmdev=tpm0"),
    ]
    for name, model, inside in (
        ("one", "tpm-crb", {"type": "unix", "mode": "connect", "path": control}),
        ("two", "tpm-tis", {"path": "/dev/a,'b"}),
    ):
        element = ElementTree.fromstring(given("--to", "libvirt", name))  # noqa: S314  ours
        assert (element.tag, element.get("model")) == ("tpm", model)
        assert element[0][0].attrib == inside
    devices = ["/dev/a,'b:/dev/tpm0:rw", "/dev/c d:/dev/tpmrm0:rw"]
    for name, option in (("two", "--device"), ("own", "--volume")):
        words = shlex.split(given("--to", "podman", name))
        assert words == [option, devices[0], option, devices[1]]
    assert given("--to", "podman", "named") == "--device vtpm-cuse.org/vtpm=named\n"
    assert "one is no device" in given("--to", "podman", "one")
    assert "type 'vtpm start off' first" in given("off")
    assert "is none of qemu, libvirt, podman" in given("--to", "xen", "one")


def test_ls_and_show(run: Run, fleet: FakeFleet) -> None:
    assert run("ls") == (0, "NAME  STATE  OWNER  PID  COMMANDS  WAKES  USED\n", "")
    assert run("ls", "--json") == (0, "[]\n", "")
    assert run("ls", "--names") == (0, "", "")
    fleet.add("web1", os.geteuid(), vm="7")
    fleet.tpms["web2"] = fleet.add("web2")._replace(
        state="failed", failure="crash\x1b[2J", pid=17, last_used=0.0, commands=5, wakes=2
    )
    status, out, err = run("ls")
    head, first, second = out.splitlines()
    assert (status, err, head.split()[0]) == (0, "", "NAME")
    assert first.split() == ["web1", "stopped", getpass.getuser(), "-", "0", "0", "never"]
    assert second.split()[:6] == ["web2", "failed", str(OTHER_USER), "17", "5", "2"]
    assert run("ls", "--names") == (0, "web1\nweb2\n", "")
    listed = json.loads(run("ls", "--json")[1])
    assert [one["name"] for one in listed] == ["web1", "web2"]
    assert json.loads(run("show", "--json", "web2")[1]) == listed[1]
    assert listed[1].pop("id")
    assert listed[1] == {
        "name": "web2",
        "owner": OTHER_USER,
        "state": "failed",
        "interface": "socket",
        "sockets": {kind: f"/run/vtpm/web2/{kind}" for kind in ("data", "control", "managed")},
        "generation": 0,
        "counters": {"commands": 5, "wakes": 2, "sleeps": 0, "failures": 0},
        "labels": {},
        "failure": "crash\x1b[2J",
        "encrypted": False,
        "cdi": "off",
        "lastUsed": 0.0,
        "pid": 17,
    }
    said = [row.split(None, 1) for row in run("show", "web1")[1].splitlines()]
    assert ["managed", "/run/vtpm/web1/managed"] in said
    assert ["label", "vm=7"] in said
    assert "crash\\u001b[2J" in run("show", "web2")[1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["start", "web9"], "web9: there is none; 'vtpm ls' lists those that there are"),
        (["rm", "web9"], "web9: there is none; 'vtpm ls' lists those that there are"),
        (["create", "web1"], "web1: there is one already; choose another name"),
        (["start"], "Name one TPM"),
        (["show", "web1", "web2"], "Name one TPM"),
        (["snapshot", "web1"], "Name the TPM and the snapshot"),
        (["clone", "--identity", "x", "a", "b"], "'x' of --identity is none of new, same"),
        (["export", "web1"], "Name the TPM and the file"),
        (["import"], "Name the file, and perhaps what the TPM is to be called"),
        (["clone", "web1"], "Name the TPM and what the new one is to be called"),
        (["create", "b", "--rm"], "--rm is for a TPM that containers are offered, with --cdi"),
        (["cdi", "--rm", "--off", "b"], "--rm and --off are two different wishes"),
        (["create", "b", "--label", "x"], "'x' is no label; write it as KEY=VALUE"),
        (["create", "b", "--owner", "no-such-user"], "User 'no-such-user' does not exist."),
        (["create", "b", "--owner", "9" * 5000], f"User '{'9' * 5000}' does not exist."),
        (["top", "--interval", "0"], "'0' of --interval is no number from 1 to 1000000"),
    ],
)
def test_what_cannot_be_done(run: Run, fleet: FakeFleet, words: list[str], said: str) -> None:
    fleet.add("web1")
    assert run(*words) == (1, "", f"vtpm {words[0]}: {said}\n")
    assert fleet.asked == fleet.specs == []


def test_without_a_manager_the_next_command_is_named(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "nobody.sock"
    status, out, err = run("ls", "--socket", str(path))
    assert (status, out) == (1, "")
    start = "vtpmd --user" if os.geteuid() else "vtpmd"
    assert err == (
        f"vtpm ls: No manager answers at {path} (No such file or directory); "
        f"start one with '{start}'\n"
    )


def test_which_manager(
    run: Run, fleet: FakeFleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = os.environ["VTPM_MANAGER"]
    assert default_path() == path
    monkeypatch.setenv("VTPM_MANAGER", str(tmp_path / "nobody.sock"))
    assert run("ls", "--socket", path)[0] == 0
    monkeypatch.delenv("VTPM_MANAGER")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    own = tmp_path / "vtpmd" / "manager.sock"
    assert default_path() == "/run/vtpm/manager.sock"
    own.parent.mkdir()
    own.touch()
    assert default_path() == str(own)
    monkeypatch.setattr(os, "geteuid", lambda: OTHER_USER)  # the variable is left of another user
    assert default_path() == "/run/vtpm/manager.sock"


def test_a_users_manager_is_where_clients_look_and_no_tpm_is_mounted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A TPM that is a file covers its folder, which has to be empty before."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("VTPM_MANAGER", raising=False)
    own = Path(vtpmd._run_folder(CommandLine(vtpmd.PROGRAM, ["--user"])))
    mount = Path(fuse_config(CommandLine(swtpm_fuse.PROGRAM, ["-n", "vtpm0"])).mount)
    assert own not in {mount, *mount.parents}
    assert mount not in own.parents
    own.mkdir()
    (own / "manager.sock").touch()
    assert default_path() == str(own / "manager.sock")


def test_env_knows_a_tpm_of_the_managers(run: Run, fleet: FakeFleet) -> None:
    fleet.tpms["web1"] = fleet.add("web1")._replace(state="asleep")
    fleet.add("web2")
    status, out, err = run("env", "--json", "web1")
    assert (status, err) == (0, "")
    env = json.loads(out)["env"]
    assert env["VTPM_PATH"] == "/run/vtpm/web1/managed"
    assert env["VTPM_RAW_PATH"] == "/run/vtpm/web1/data"
    assert env["TPM2TOOLS_TCTI"].startswith("cmd:")
    assert env["TPM2TOOLS_TCTI"].endswith(" /run/vtpm/web1/managed")
    assert f"VTPM_PATH={env['VTPM_PATH']}\n" in run("env", "web1")[1]
    device = fleet.tpms["web1"]._replace(interface="cuse", sockets={}, device="/dev/raw")
    fleet.tpms["web1"] = device._replace(managed_device="/dev/many")
    env = json.loads(run("env", "--json", "web1")[1])["env"]
    assert (env["VTPM_PATH"], env["VTPM_RAW_PATH"]) == ("/dev/many", "/dev/raw")
    assert env["TPM2TOOLS_TCTI"] == "device:/dev/many"
    rows = [line.split() for line in run("show", "web1")[1].splitlines()]
    assert ["device", "/dev/raw"] in rows
    assert ["managed", "device", "/dev/many"] in rows
    assert run("env", "web2") == (
        1,
        "",
        "vtpm env: web2 is stopped; type 'vtpm start web2' first\n",
    )
    assert run("env", "web9")[2].startswith("vtpm env: No TPM web9 of this user's runs here; ")
    status, _, err = run("env", "--socket", "/no/such/place", "web1")
    assert (status, err.startswith("vtpm env: No manager answers at /no/such/place")) == (1, True)


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_watch_prints_each_event_at_once(
    fleet: FakeFleet, run: Run, capfd: pytest.CaptureFixture[str], options: list[str]
) -> None:
    tpm = fleet.add("web1")

    def happen() -> None:
        wait_until(lambda: bool(fleet.watchers), "the watch")
        fleet.token.run_sync_soon(fleet.tell, Event("changed", tpm._replace(failure="crash")))
        fleet.token.run_sync_soon(fleet.end_watches)

    teller = threading.Thread(target=happen)
    teller.start()
    status, out, err = run("watch", *options)
    teller.join()
    assert (status, err) == (
        1,
        "vtpm watch: The manager does not go on with it; start vtpm watch again\n",
    )
    (line,) = out.splitlines()
    if options:
        assert json.loads(line)["kind"] == "changed"
        assert json.loads(line)["tpm"]["failure"] == "crash"
    else:
        assert line.split()[1:] == ["changed", "web1", "crash"]


def test_top_has_the_busiest_first(
    run: Run, fleet: FakeFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[int] = []
    monkeypatch.setattr("time.sleep", slept.append)
    fleet.add("idle")
    fleet.tpms["busy"] = fleet.add("busy")
    looks = iter((0, 600))

    def look() -> None:
        fleet.tpms["busy"] = fleet.tpms["busy"]._replace(commands=next(looks))

    fleet.before_list = look
    status, out, err = run("top", "--interval", "1", "--count", "2")
    assert (status, err, slept) == (0, "", [1])
    first, second, end = out.split("\n\n")
    assert end == ""
    assert first.splitlines()[1].split()[-1] == "0.0"
    assert [row.split()[0] for row in second.splitlines()] == ["NAME", "busy", "idle"]
    assert float(second.splitlines()[1].split()[-1]) > 0
    fleet.before_list = None
    status, out, err = run("top", "--count", "1", "--json")
    assert [one["name"] for one in json.loads(out)] == ["busy", "idle"]


def test_top_on_a_terminal_begins_at_its_top(
    run: Run, fleet: FakeFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LINES", "2")
    monkeypatch.setenv("COLUMNS", "21")
    for name in ("a", "b"):
        fleet.add(name)
    ours, theirs = pty.openpty()
    with os.fdopen(ours, "rb", 0) as shown, os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        assert run("top", "--count", "1")[0] == 0
        assert shown.read(1000) == b"\x1b[H\x1b[JNAME  STATE    OWNER\r\n"


def test_a_refusal_of_another_kind_is_said_as_it_is(run: Run, fleet: FakeFleet) -> None:
    fleet.add("web1")
    fleet.trouble = FleetError("Busy", "web1", "it is off; start it with 'vtpm start web1'")
    assert run("wake", "web1") == (
        1,
        "",
        "vtpm wake: web1: it is off; start it with 'vtpm start web1'\n",
    )
    fleet.trouble = OSError(28, "No space left on device")
    assert run("wake", "web1")[2] == "vtpm wake: [Errno 28] No space left on device\n"


def test_metrics_of_what_the_manager_lists(run: Run, fleet: FakeFleet) -> None:
    fleet.add("web1", os.geteuid())
    status, text, said = run("metrics")
    assert (status, said) == (0, "")
    assert f'vtpm_state{{tpm="web1",owner="{os.geteuid()}",state="stopped"}} 1\n' in text
    assert text.endswith("\n# EOF\n")
