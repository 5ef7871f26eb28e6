"""Private TPMs in event loops, and what the programs and libraries of others make of them."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
from pathlib import Path
from typing import Final

import pytest
import trio

from tests.support.private import processes_below
from tests.support.waiting import PATIENCE_SECONDS, wait_until
from vtpm_cuse.lab import Tpm

ZEROS: Final = bytes(32)

pytestmark = pytest.mark.usefixtures("runtime")


# -- event loops --------------------------------------------------------------------------


def test_under_trio() -> None:
    async def main() -> None:
        async with Tpm() as lab:
            assert await trio.to_thread.run_sync(lab.pcr, 16) == ZEROS
            assert lab.pcr(16) == ZEROS
        assert not lab.alive

    trio.run(main)


def test_under_asyncio() -> None:
    async def main() -> None:
        async with Tpm() as lab:
            assert await asyncio.to_thread(lab.pcr, 16) == ZEROS
            assert lab.pcr(16) == ZEROS
        assert not lab.alive

    asyncio.run(main())


def test_cancelled_while_it_starts(runtime: Path) -> None:
    """Both loops wait for what they have begun, and end it."""

    async def under_trio() -> None:
        with trio.move_on_after(0.001):
            async with Tpm():
                await trio.sleep_forever()

    async def under_asyncio() -> None:
        async def enter() -> None:
            async with Tpm():
                await asyncio.Event().wait()

        task = asyncio.create_task(enter())
        await asyncio.to_thread(wait_until, lambda: bool(os.listdir(runtime)), "it starts")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    trio.run(under_trio)
    assert processes_below(runtime) == []
    asyncio.run(under_asyncio())
    assert processes_below(runtime) == []


# -- other stacks -------------------------------------------------------------------------


def run_tool(folder: Path, env: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words,
        env={**os.environ, **env},
        cwd=folder,
        check=False,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )


def test_fapi_has_keys_beside_the_tpm(tmp_path: Path, runtime: Path) -> None:
    """Its tools, which find neither the machine's TPM nor the keys of whoever runs them."""
    with Tpm() as lab:
        home = {"HOME": str(tmp_path)}
        for name, *words in (
            ("tss2_provision",),
            ("tss2_createkey", "--path=HS/SRK/key", "--type=sign", "--authValue="),
            ("tss2_list",),
        ):
            done = run_tool(tmp_path, {**lab.env, **home}, name, *words)
            assert done.returncode == 0, done.stderr
        assert "/HS/SRK/key" in done.stdout
        assert list(Path(lab.folder).rglob("*key*"))
    assert list(tmp_path.iterdir()) == []


def test_tpm2_tools_need_not_flush(tmp_path: Path) -> None:
    """Each has a connection of its own; what it saved, the next one loads."""
    with Tpm(faults=True) as lab:
        for number in range(4):
            make = ("tpm2_createprimary", "-Q", "-G", "ecc", "-c", f"{number}.ctx")
            assert run_tool(tmp_path, lab.env, *make).returncode == 0
        key = ("-u", "pub", "-r", "priv")
        for name, *words in (
            ("tpm2_create", "-G", "ecc", "-C", "3.ctx", *key),
            ("tpm2_load", "-C", "3.ctx", *key, "-c", "key.ctx"),
            ("tpm2_readpublic", "-c", "key.ctx"),
        ):
            done = run_tool(tmp_path, lab.env, name, "-Q", *words)
            assert done.returncode == 0, done.stderr
        lab.fail_next(0x101)
        assert run_tool(tmp_path, lab.env, "tpm2_getrandom", "-Q", "4").returncode != 0


def test_the_tpm_itself_is_there_for_tpm2_tools_too(tmp_path: Path) -> None:
    with Tpm() as lab:
        env = {"TPM2TOOLS_TCTI": lab.raw_tcti}
        found = []
        for _ in range(4):
            done = run_tool(tmp_path, env, "tpm2_createprimary", "-Q", "-G", "ecc", "-c", "x.ctx")
            found.append((done.returncode, "0x902" in done.stderr))
        assert found == [(0, False)] * 3 + [(1, True)]  # nobody makes room


def test_where_nobody_is_the_relay_of_the_tcti_says_so(tmp_path: Path) -> None:
    with Tpm() as lab:
        words = lab.tcti.partition(":")[2]
    done = subprocess.run(
        ["/bin/sh", "-c", words], check=False, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 1
    assert "No such file" in done.stderr


def test_a_connection_that_is_left_is_known() -> None:
    with Tpm() as lab:
        lab.pcr(0)
        assert lab.clients == 0
        with socket.socket(socket.AF_UNIX) as left:
            left.connect(lab.raw_path)
            assert lab.clients == 1
