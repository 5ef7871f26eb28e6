"""``./setup run``: a TPM on the best device of this machine, to look at."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Final, NoReturn

from tools.steps import SETUP, TREE, as_root, become, can_be_root, fail, run_main, say

_PROGRAMS: Final = TREE / ".venv/bin"
_ROOTS_STATES: Final = "/var/lib/vtpm-cuse"
"""Where what runs as root keeps its state, each in the place for its name."""
_DEVICES: Final = {
    "cuse": ("CUSE", "/dev/cuse", "cuse"),
    "vtpm-proxy": ("vTPM proxy", "/dev/vtpmx", "tpm_vtpm_proxy"),
}


def _diagnosis(*, root: bool) -> dict[str, Any]:
    """What "swtpm doctor" says, which also judges for the kernel's devices."""
    command = [str(_PROGRAMS / "swtpm"), "doctor", "--json"]
    done = subprocess.run(
        as_root(command) if root else command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    try:
        found: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        fail(f"{' '.join(command)} failed with status {done.returncode}")
    return found


def _obstacle(interface: str) -> str:
    """What keeps root from using a device of the kernel's; its module is loaded if need be."""
    _, device, module = _DEVICES[interface]
    if not can_be_root():
        return f"{device}: needs root, or sudo without a password"
    found = _diagnosis(root=True)
    if found["findings"][device]["state"] == "loadable":
        with contextlib.suppress(OSError):
            load = as_root(["modprobe", "-q", module])
            subprocess.run(load, stderr=subprocess.DEVNULL, check=False)
        found = _diagnosis(root=True)
    return str(found["interfaces"][interface]["obstacle"])


class _Show:
    def __init__(self, name: str, once: list[str]) -> None:
        self._states = Path(
            os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state", "vtpm-cuse"
        )
        self._name = name or self._free_name()
        self._once = once
        self._why: list[str] = []  # what this machine does not offer, with the reasons

    def _free_name(self) -> str:
        with open("/proc/net/unix", encoding="utf-8", errors="replace") as file:
            sockets = file.read()
        return next(
            name
            for name in map("vtpm{}".format, itertools.count())
            if not os.path.exists(f"/dev/{name}")
            and not (self._states / f"{name}.mount/{name}").exists()
            and f"{_ROOTS_STATES}/{name}/control" not in sockets
        )

    def _offers(self, interface: str) -> bool:
        kind, obstacle = _DEVICES[interface][0], _obstacle(interface)
        if obstacle:
            self._why.append(f"no {kind} ({obstacle})")
        return not obstacle

    def _has_fuse(self) -> bool:
        obstacle = _diagnosis(root=False)["interfaces"]["fuse"]["obstacle"]
        if obstacle:
            self._why.append(f"no FUSE ({obstacle})")
        return not obstacle

    def _tell(self, device: str, state: str | Path) -> None:
        why = f"because this machine has {', '.join(self._why)}"
        say(f"device: {device}, {why if self._why else 'which this kernel has'}")
        say(f"its state is kept in {state}")

    def start(self) -> NoReturn:
        """Gives this process to what shows the TPM, so that Ctrl-C and SIGTERM are its own."""
        name, state = self._name, f"{_ROOTS_STATES}/{self._name}"
        demo, cuse = ["kernel-helpers/demo", *self._once], ["swtpm-cuse", "-n", name]
        if self._offers("cuse"):
            self._tell(f"/dev/{name} through CUSE", state)
            become(as_root([*demo, f"/dev/{name}", "--", *cuse]))
        if self._offers("vtpm-proxy"):
            # The kernel, too, takes the first that is free.
            free = next(n for n in itertools.count() if not os.path.exists(f"/dev/tpm{n}"))
            device, control = f"/dev/tpmrm{free}", f"{state}/control"
            self._tell(f"{device} through the kernel's vTPM proxy", state)
            server = ["swtpm", "chardev", "--vtpm-proxy", "--daemon", "-n", name]
            server += ["--ctrl", f"type=unixio,path={control}"]
            wait = ["kernel-helpers/tpm-device", "--timeout", "120", "--"]
            become(as_root([*demo, "--control", control, device, "--", *wait, *server]))
        self._start_below_home(demo, cuse)

    def _start_below_home(self, demo: list[str], cuse: list[str]) -> NoReturn:
        name, state = self._name, self._states / self._name
        before = os.umask(0o077)
        try:
            state.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            fail(f"{state}: {exc.strerror}")
        os.umask(before)
        tpm = ["--tpm2", "--tpmstate", f"dir={state}", "--flags", "startup-clear"]
        if self._has_fuse():
            mount = f"{state}.mount"
            self._tell(f"{mount}/{name}, a file in a FUSE mount", state)
            server = ["swtpm", "fuse", "-n", name, "--mount", mount, *tpm]
            become([*demo, f"{mount}/{name}", "--", *server])
        self._tell(f"/dev/{name} in the kernel lab", state)
        lab = [SETUP, "with-lab", "kernel-helpers/lab", "--timeout", "inf", "--scratch", str(state)]
        if os.isatty(0) and os.isatty(1) and not self._once:
            lab.append("--shell")
            demo = ["kernel-helpers/demo", "--shell"]
        become([*lab, "--", *demo, f"/dev/{name}", "--", *cuse, *tpm])


def main() -> None:
    """Shows the TPM; does not return."""
    words = sys.argv[1:]
    names = [word for word in words if word != "--once"]
    os.environ["PATH"] = f"{_PROGRAMS}:{os.environ['PATH']}"
    once = ["--once"] if "--once" in words else []
    _Show(names[-1] if names else "", once).start()


if __name__ == "__main__":
    run_main(main)
