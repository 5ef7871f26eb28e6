"""What monitoring is told of many TPMs, read by Prometheus' own parsers."""

from __future__ import annotations

import logging
import os
import re
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
import trio
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families as read_older

from tests.support.fake_fleet import OTHER_USER, FakeFleet
from tests.support.fleet import in_trio
from tests.support.waiting import PATIENCE_SECONDS
from vtpm_cuse.fleet.manager import exporter
from vtpm_cuse.fleet.manager.api import as_told
from vtpm_cuse.wire.metrics import Histogram, text

if TYPE_CHECKING:
    from collections.abc import Iterable

    from prometheus_client import Metric

    from vtpm_cuse.wire.manager import Tpm

DASHBOARD: Final = Path(__file__).parents[2] / "deploy/grafana.json"


def read(text: str, *, openmetrics: bool = True) -> list[Metric]:
    """What a parser finds."""
    parser = read_openmetrics if openmetrics else read_older
    return list(parser(text))


def samples(families: Iterable[Metric]) -> dict[tuple[str, ...], float]:
    """By the name and the values of the labels."""
    return {
        (one.name, *one.labels.values()): one.value for family in families for one in family.samples
    }


@pytest.fixture
def tpms() -> list[Tpm]:
    fake = FakeFleet()
    fake.add("idle")
    busy = fake.add("web-1.a")._replace(state="failed", commands=7, wakes=3, sleeps=2, failures=1)
    return [as_told(tpm) for tpm in (fake.tpms["idle"], busy)]


@pytest.fixture
def wakes() -> Histogram:
    found = Histogram()
    for seconds in (0.0004, 0.002, 0.003, 60.0):
        found.observe(seconds)
    return found


def test_prometheus_reads_both_formats_alike(tpms: list[Tpm], wakes: Histogram) -> None:
    families = read(text(tpms, wakes))
    older = read(text(tpms, wakes, openmetrics=False), openmetrics=False)
    assert [(one.name, one.type) for one in families] == [(one.name, one.type) for one in older]
    found = samples(families)
    assert found == samples(older)
    who = ("web-1.a", str(OTHER_USER))
    assert found["vtpm_tpms", "failed"] == found["vtpm_tpms", "stopped"] == 1
    assert found["vtpm_tpms", "awake"] == 0
    assert found["vtpm_state", *who, "failed"] == 1
    counted = [found[f"vtpm_{name}_total", *who] for name in ("commands", "wakes", "sleeps")]
    assert (*counted, found["vtpm_failures_total", *who]) == (7, 3, 2, 1)
    bounds = [found["vtpm_wake_seconds_bucket", bound] for bound in ("0.001", "0.002", "0.005")]
    assert bounds == [1, 2, 3]
    assert found["vtpm_wake_seconds_bucket", "5.0"] == 3
    assert found["vtpm_wake_seconds_bucket", "+Inf"] == found["vtpm_wake_seconds_count",] == 4


def test_a_name_cannot_be_more_than_a_label(tpms: list[Tpm]) -> None:
    """Whatever a manager says: a terminal or a collector reads it."""
    odd = text([tpms[0]._replace(name='a"} 1\n# \x1b[2J\\')])
    assert "\x1b" not in odd
    assert len(odd.splitlines()) == len(text(tpms[:1]).splitlines())


def test_the_dashboard_asks_for_what_there_is(tpms: list[Tpm], wakes: Histogram) -> None:
    asked = set(re.findall(r"vtpm_\w+", DASHBOARD.read_text()))
    known = {name for name, *_ in samples(read(text(tpms, wakes)))}
    assert asked
    assert asked <= known


async def some_text() -> str:
    return "some 1\n# EOF\n"


@pytest.mark.parametrize(
    ("request_line", "status", "body"),
    [
        (b"GET /metrics HTTP/1.1", b"200 OK", b"some 1\n# EOF\n"),
        (b"GET /?x=y HTTP/1.0", b"200 OK", b"some 1\n# EOF\n"),
        (b"HEAD / HTTP/1.1", b"200 OK", b""),
        (b"GET /manager.sock HTTP/1.1", b"404 Not Found", b""),
        (b"POST /metrics HTTP/1.1", b"400 Bad Request", b""),
        (b"\xff" * 9000, b"400 Bad Request", b""),
        (b"", b"400 Bad Request", b""),
    ],
)
@in_trio
async def test_what_is_answered_by_http(request_line: bytes, status: bytes, body: bytes) -> None:
    answer = await exporter.answer_untrusted(request_line + b"\r\n\r\n", some_text)
    head, _, found = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 " + status + b"\r\n")
    length = b"13" if status == b"200 OK" else b"0"
    assert (b"\r\nContent-Length: " + length + b"\r\n" in head, found) == (True, body)


@in_trio
async def test_who_says_nothing_keeps_nobody_from_an_answer(tmp_path: Path) -> None:
    path = str(tmp_path / "metrics")
    listener = trio.socket.socket(socket.AF_UNIX)
    await listener.bind(path)
    listener.listen()
    with trio.fail_after(PATIENCE_SECONDS):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(exporter.serve, some_text, trio.SocketListener(listener))
            async with await trio.open_unix_socket(path), await trio.open_unix_socket(path) as asks:
                await asks.send_all(b"GET / HTTP/1.1\r\n")
                await asks.send_all(b"Host: localhost\r\n\r\n")
                answer = b"".join([part async for part in asks])  # up to the end of the connection
            nursery.cancel_scope.cancel()
    assert answer.endswith(b"some 1\n# EOF\n")


@in_trio
async def test_a_file_is_written_again_and_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where that was not possible before."""
    monkeypatch.setattr(exporter, "_FILE_SECONDS", 0.01)
    monkeypatch.setattr(logging.getLogger("vtpm_cuse"), "propagate", True)
    folder = tmp_path / "collected"
    path = folder / "vtpm.prom"
    said: list[str] = []

    async def text() -> str:
        if len(said) == 1:
            folder.mkdir()
        if len(said) == 3:
            scope.cancel()
            await trio.sleep_forever()
        said.append(f"{len(said)}\n")
        return said[-1]

    with trio.fail_after(PATIENCE_SECONDS), trio.CancelScope() as scope:
        await exporter.keep_file(text, str(path))
    assert [record.getMessage().startswith(str(path)) for record in caplog.records] == [True]
    assert path.read_text() == said[-1]
    assert os.listdir(folder) == [path.name]
