"""One stream of commands for our resource manager and tpm2-abrmd: answers differ where we say so."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.test_managed_sockets import Managed
from tests.kernel.harness import ROOT, needs
from tests.support import sockets as s
from tests.support.manager_differences import ABRMD, KERNEL, steps_of
from tests.support.manager_peers import Ours, abrmd, has_abrmd
from tests.support.manager_stream import answers, differing


def test_tpm2_abrmd(tmp_path: Path) -> None:
    needs(has_abrmd(), "tpm2-abrmd, its library or dbus-daemon is missing")
    with (
        Managed(tmp_path / "ours", *s.RUNNING) as server,
        Ours(server.managed_address, server.process) as peer,
    ):
        ours = answers(peer)
    with s.Server(tmp_path / "theirs", *s.RUNNING) as raw:
        assert isinstance(raw.data_address, Path)
        with abrmd(tmp_path / "bus", raw.data_address) as other:
            theirs = answers(other)
    assert differing(ours, theirs) == steps_of(ABRMD)


@pytest.mark.parametrize("place", sorted({*ABRMD, *KERNEL}))
def test_each_difference_has_its_row(place: str) -> None:
    assert f"| {place} |" in (ROOT / "docs/differences.md").read_text()
