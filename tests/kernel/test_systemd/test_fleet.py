"""The manager of many TPMs as a service: who starts it, its reload, deaths, restart and end."""

from __future__ import annotations

import importlib.util
import json
import os
import pwd
import re
import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.kernel.harness import exchange, opened, wait_until
from tests.kernel.test_systemd.conftest import VENV
from tests.support.commands import code_of, pcr_extend, pcr_read
from tests.support.sockets import listens

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.kernel.systemd import Systemd

SETTINGS = Path("/etc/vtpm-cuse")
TREE = "/run/vtpm-tree"


def test_the_manager_of_many_is_started_by_who_asks(systemd: Systemd) -> None:
    """Its TPMs are served by an account that owns nothing, and are there after a restart.

    A reload has it begin anew, with them.
    """
    (SETTINGS / "vtpmd.env").write_text("VTPMD_OPTIONS=--log level=1 --idle 600\n")
    systemd.systemctl("start", "vtpmd.socket")
    try:
        systemd.call("vtpm", "create", "one")
        for _ in range(2):
            told = json.loads(systemd.call("vtpm", "start", "one", "--json").stdout)
            tcti = ("-T", f"swtpm:path={told['sockets']['data']}")
            done = systemd.call("tpm2_getrandom", *tcti, "--hex", "4")
            assert len(done.stdout.strip()) == 8
            status = systemd.call("cat", f"/proc/{told['pid']}/status").stdout
            worker = pwd.getpwnam("vtpmd").pw_uid
            assert re.findall(r"^Uid:\t(\d+)", status, re.MULTILINE) == [str(worker)]
            systemd.systemctl("reload", "vtpmd.service")
            found = json.loads(systemd.call("vtpm", "show", "one", "--json").stdout)
            assert (found["state"], found["pid"]) == ("awake", told["pid"])
            systemd.systemctl("stop", "vtpmd.service")
    finally:
        systemd.systemctl("stop", "vtpmd.socket", "vtpmd.service")
    systemd.call("journalctl", "--sync")
    said = systemd.call("journalctl", "--no-pager", "-t", "vtpmd").stdout
    assert "TPMs are in /var/lib/vtpm" in said


def test_tpms_of_the_manager_outlive_it(systemd: Systemd) -> None:
    """Who has a device open sees neither a death nor a restart; behind a stop it is gone."""
    systemd.systemctl("start", "vtpmd.socket")
    kill = ("kill", "--kill-whom=main", "--signal=KILL")
    try:
        systemd.call("vtpm", "create", "two", "--interface", "cuse", "--cdi")
        systemd.call("vtpm", "start", "two")
        offered = [*Path("/run/cdi").iterdir()]
        assert len(offered) == 2
        with opened(Path("/dev/vtpmd-two")) as fd:
            assert code_of(exchange(fd, pcr_extend(10, b"1" * 32))) == 0
            extended = exchange(fd, pcr_read(10))
            for words in (kill, kill, ("restart",)):
                before = systemd.show("vtpmd", "MainPID")
                systemd.systemctl(*words, "vtpmd.service")
                assert exchange(fd, pcr_read(10)) == extended
                systemd.call("vtpm", "hibernate", "two")
                assert systemd.show("vtpmd", "MainPID") not in {before, "0"}
                assert all(path.exists() for path in offered)
            systemd.systemctl("stop", "vtpmd.service")
            wait_until(lambda: not os.path.exists("/dev/vtpmd-two"), "the end of the device")
            assert not any(path.exists() for path in offered)
    finally:
        systemd.systemctl("stop", "vtpmd.socket", "vtpmd.service")


def test_the_folder_of_all_tpms(systemd: Systemd) -> None:
    """Each user sees his own in it; its end unmounts it."""
    spec = importlib.util.find_spec("pyfuse3")
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).parent
    shutil.copytree(source, next(VENV.glob("lib/python3*/site-packages")) / source.name)
    user = pwd.getpwnam("tss")
    as_user = ("setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups")
    systemd.systemctl("start", "vtpm-tree.service")
    try:
        systemd.call("vtpm", "create", "three", "--owner", "tss")
        systemd.call("vtpm", "create", "four")
        assert systemd.call(*as_user, "cat", f"{TREE}/three/state").stdout == "stopped\n"
        systemd.call(*as_user, "cat", f"{TREE}/four/state", status=1)
        assert {"three", "four"} <= set(systemd.call("ls", TREE).stdout.split())
        systemd.systemctl("stop", "vtpm-tree.service")
        assert systemd.show("vtpm-tree", "Result") == "success"
        assert systemd.call("findmnt", TREE, status=1).stdout == ""
    finally:
        systemd.systemctl("stop", "vtpm-tree.service", "vtpmd.socket", "vtpmd.service")


@pytest.fixture
def user(systemd: Systemd) -> Iterator[pwd.struct_passwd]:
    """Who is there without a session of his (he lingers), until that is over."""
    login = Path("/etc/systemd/logind.conf.d/lab.conf")
    login.parent.mkdir(exist_ok=True)
    login.write_text("[Login]\nUserStopDelaySec=0\n")
    systemd.call("useradd", "--create-home", "vtpm-lab")
    found = pwd.getpwnam("vtpm-lab")
    systemd.systemctl("start", "dbus.socket", "systemd-logind.service")
    yield found
    systemd.call("loginctl", "disable-linger", found.pw_name, status=None)
    systemd.systemctl("stop", f"user@{found.pw_uid}.service", "systemd-logind.service", "dbus")
    systemd.call("userdel", "--remove", found.pw_name)


def test_a_users_own_manager(systemd: Systemd, user: pwd.struct_passwd) -> None:
    """By his units: started by who asks, it serves files of his, and ends when he is gone."""
    run_folder = f"/run/user/{user.pw_uid}"
    ids = (f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups")
    as_user = ("setpriv", *ids, "env", f"HOME={user.pw_dir}", f"XDG_RUNTIME_DIR={run_folder}")

    def vtpm(*words: str) -> dict[str, Any]:
        done = systemd.call(*as_user, "vtpm", *words, "--json")
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    systemd.call("loginctl", "enable-linger", user.pw_name)
    bus = Path(run_folder, "systemd/private")
    wait_until(partial(listens, bus), "the user's systemd", process=systemd.process)
    systemd.call(*as_user, "systemctl", "--user", "start", "vtpmd.socket")
    vtpm("create", "his", "--interface", "fuse")
    device = vtpm("start", "his")["managedDevice"]
    assert device.startswith(run_folder)
    tool = ("-T", f"device:{device}")
    systemd.call(*as_user, "tpm2_pcrextend", *tool, "10:sha256=" + "77" * 32)
    extended = systemd.call(*as_user, "tpm2_pcrread", *tool, "sha256:10").stdout
    systemd.call(*as_user, "systemctl", "--user", "reload", "vtpmd.service")
    assert vtpm("hibernate", "his")["state"] == "asleep"
    assert systemd.call(*as_user, "tpm2_pcrread", *tool, "sha256:10").stdout == extended
    systemd.call("loginctl", "disable-linger", user.pw_name)
    wait_until(
        lambda: systemd.call("pgrep", "--uid", user.pw_name, status=None).stdout == "",
        "the end of all that is his",
    )
    wait_until(
        lambda: run_folder not in systemd.call("cat", "/proc/self/mounts").stdout,
        "the end of all mounts there",
    )
    assert Path(user.pw_dir, ".local/state/vtpm/his/state/tpm2-00.permall").stat().st_size > 0
