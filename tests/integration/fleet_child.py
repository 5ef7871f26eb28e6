"""One life of a manager with one TPM, which is made if it is missing: ``fleet_child.py FOLDER IDLE``.

Says where that listens, and which processes there are, as JSON; then it goes on until it is killed.
"""

from __future__ import annotations

import json
import os
import sys

import trio

from vtpm_cuse.fleet.base import Spec
from vtpm_cuse.fleet.manager.manager import Settings, managed


async def main(folder: str, idle: float) -> None:
    async with managed(Settings(f"{folder}/state", f"{folder}/run", idle=idle)) as manager:
        if not await manager.list():
            await manager.create(Spec("one", os.geteuid()))
        found = await manager.start("one")
        told = {"socket": found.sockets["data"], "worker": found.pid}
        sys.stdout.write(json.dumps(told) + "\n")
        sys.stdout.flush()
        await trio.sleep_forever()


if __name__ == "__main__":
    trio.run(main, sys.argv[1], float(sys.argv[2]))
