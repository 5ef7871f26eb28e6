"""An address that means something on one link alone, which `ifname` names."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Final

import pytest

from tests.kernel.harness import PATIENCE, needs
from tests.support.sockets import OURS, RUNNING, environment

if TYPE_CHECKING:
    from pathlib import Path

ADDRESS: Final = "fe80::1"
PORT: Final = "2321"  # in a network of its own
NETWORK: Final = f'ip link set lo up && ip addr add {ADDRESS}/64 dev lo nodad && exec "$@"'
CLIENT: Final = f"""
import socket, subprocess, sys
from tests.support.commands import code_of, get_random
from tests.support.waiting import wait_until

def connected():
    made = socket.socket(socket.AF_INET6)
    if made.connect_ex(("{ADDRESS}", {PORT}, 0, socket.if_nametoindex("lo"))) == 0:
        there.append(made)
    else:
        made.close()
    return bool(there)

there = []
with subprocess.Popen(sys.argv[1:]) as server:
    wait_until(lambda: connected() or server.poll() is not None, "the server listens")
    if there:
        there[0].sendall(get_random(8))
        print(code_of(there[0].recv(100)))
        server.terminate()
sys.exit(server.returncode)
"""


@pytest.mark.parametrize(("name", "status", "said"), [("lo", 0, "0\n"), ("none", 1, "")])
def test_a_server_on_one_link(name: str, status: int, said: str, tmp_path: Path) -> None:
    needs(os.geteuid() == 0, "a network of its own needs root")
    needs(shutil.which("ip") is not None, "ip is missing")
    where = f"type=tcp,port={PORT},bindaddr={ADDRESS},ifname={name}"
    server = (*OURS, "socket", "--tpm2", "--tpmstate", f"dir={tmp_path}", "--server", where)
    words = ("unshare", "--net", "sh", "-c", NETWORK, "sh", sys.executable, "-c", CLIENT)
    done = subprocess.run(
        [*words, *server, *RUNNING],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert (done.returncode, done.stdout) == (status, said), done.stderr
