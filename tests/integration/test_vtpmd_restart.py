"""`vtpmd` that begins anew, as a program, while its TPMs are used."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from tests.support import commands as tpm
from tests.support.sockets import connect
from tests.support.vtpmd import begin_anew, running
from vtpm_cuse.client.manager import Manager

BROKEN: Final = "import os; os.execve = lambda *_: os.stat('/none')"


def test_it_begins_anew_with_its_clients_connected(tmp_path: Path) -> None:
    with running(tmp_path, "--idle", "3600") as daemon, Manager(str(daemon.path)) as manager:
        for name in ("awake", "asleep"):
            manager.create(name)
        tpms = {name: manager.start(name) for name in ("awake", "asleep")}
        with (
            connect(Path(tpms["awake"].sockets["data"])) as awake,
            connect(Path(tpms["asleep"].sockets["data"])) as asleep,
        ):
            for client in (awake, asleep):
                assert tpm.code_of(client.command(tpm.pcr_extend(10, b"1" * 32))) == 0
            extended = awake.command(tpm.pcr_read(10))
            manager.hibernate("asleep")
            begin_anew(daemon)
            assert asleep.command(tpm.pcr_read(10)) == extended
            with Manager(str(daemon.path)) as anew:
                assert anew.describe("awake").pid == tpms["awake"].pid
                assert tpm.code_of(awake.command(tpm.nv_define(tpm.NV_INDEX, 8))) == 0
                anew.hibernate("awake")
                assert awake.command(tpm.pcr_read(10)) == extended
            # Who is to end in the middle of this ends in order.
            begin_anew(daemon)
            assert daemon.end() == 0
            assert awake.ended()
        assert os.listdir(daemon.path.parent / "tpm") == []
        assert not daemon.path.exists()
        assert "Traceback" not in daemon.said


def test_it_goes_on_where_it_cannot_begin_anew(tmp_path: Path) -> None:
    words = ("--idle", "3600")
    with running(tmp_path, *words, before=BROKEN) as daemon:
        with Manager(str(daemon.path)) as manager:
            manager.create("one")
            found = manager.start("one")
        with connect(Path(found.sockets["data"])) as client:
            assert tpm.code_of(client.command(tpm.pcr_extend(10, b"1" * 32))) == 0
            begin_anew(daemon)
            with Manager(str(daemon.path)) as manager:
                assert manager.describe("one").pid == found.pid
            assert tpm.pcr_value(client.command(tpm.pcr_read(10))) != bytes(32)
            assert daemon.end() == 0
        assert "cannot begin anew" in daemon.said
