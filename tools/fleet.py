"""``./setup run --fleet NUMBER``: many TPMs of one manager, used by tools, to look at."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from typing import TYPE_CHECKING, Final

from tools.steps import CACHE, TREE, fail, run_main, say
from vtpm_cuse.client.manager import VARIABLE, Manager
from vtpm_cuse.errors import FrontendError, VtpmError
from vtpm_cuse.lab.tpm import tcti_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vtpm_cuse.wire.manager import Tpm

_PROGRAMS: Final = TREE / ".venv/bin"
_LOG: Final = CACHE / "fleet.log"
_USED: Final = 10
_SHOWN_LINES: Final = 20
_MOST: Final = 1000
"""Of one owner's, whose files the manager may have open."""
_PAUSE_SECONDS: Final = 0.05


def _connected(daemon: subprocess.Popen[bytes]) -> Manager:
    while True:
        try:
            return Manager()
        except FrontendError:
            if daemon.poll() is not None:
                fail(f"vtpmd has ended with status {daemon.returncode}: see {_LOG}")
            time.sleep(_PAUSE_SECONDS)


def _use(tpms: Sequence[Tpm]) -> None:
    """Each by tpm2-tools, as a client of its resource manager."""
    for tpm in tpms:
        tcti = tcti_of(tpm.sockets["managed"])
        done = subprocess.run(
            ["tpm2_getrandom", "-T", tcti, "--hex", "8"],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            fail(f"tpm2_getrandom of {tpm.name}: {done.stderr.strip()}")
        print(f"{tpm.name}: 8 random bytes: {done.stdout.strip()}")


def _show(manager: Manager, count: int) -> None:
    begin = time.monotonic()
    names = [f"tpm{number:04}" for number in range(1, count + 1)]
    for name in names:
        manager.create(name)
    tpms = [manager.start(name) for name in names]
    took = time.monotonic() - begin
    say(f"{count} TPMs made and switched on: {1000 * took / count:.0f} ms each")
    _use(tpms[:_USED])
    for tpm in tpms[_USED // 2 :]:
        manager.hibernate(tpm.name)
    command = (_PROGRAMS / "vtpm", "ls")
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    shown = done.stdout.splitlines()
    print(*shown[:_SHOWN_LINES], sep="\n")
    if len(shown) > _SHOWN_LINES:
        print(f"... and {len(shown) - _SHOWN_LINES} more")


def main() -> None:
    """Shows them, and ends all of them in order."""
    count = int(sys.argv[1])
    CACHE.mkdir(exist_ok=True)
    if not 0 < count <= _MOST:
        fail(f"--fleet takes 1 to {_MOST} TPMs")
    with tempfile.TemporaryDirectory(prefix="vtpm-fleet-") as folder, open(_LOG, "wb") as log:
        os.environ[VARIABLE] = f"{folder}/run/manager.sock"
        daemon = subprocess.Popen(
            [
                *(_PROGRAMS / "vtpmd", "--idle", "60"),
                *("--state", f"{folder}/state", "--run", f"{folder}/run"),
            ],
            stdin=subprocess.DEVNULL,
            stderr=log,
            process_group=0,
        )
        try:
            with _connected(daemon) as manager:
                _show(manager, count)
        except (VtpmError, OSError, subprocess.CalledProcessError) as exc:
            fail(str(exc))
        finally:
            daemon.terminate()
            status = daemon.wait()
        if status:
            fail(f"vtpmd has ended with status {status}: see {_LOG}")
    say("all of them have ended, in order, and nothing is left")


if __name__ == "__main__":
    run_main(main)
