"""The form of benchmark figures, and what is made of them."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench import all as bench_all
from bench.report import Report, Row, finish, read

ROOT = Path(__file__).parents[2]
FACTS = {"processor": "2 x Some CPU", "kernel": "6.1", "python": "3.11", "peer": "swtpm 0.7"}


def report() -> Report:
    found = Report("sockets", "Unix socket", notes=["A note."])
    found.add("GetRandom, p50", "µs", 5.0, 4.0, limit=1.3)
    found.add("memory, Pss", "MiB", 30.0, 4.0, limit=2)
    found.add("PCR_Read, p99", "µs", 2.0, 4.0)
    found.add("start to first answer", "ms", 12345.0, limit=100)
    found.add("rate", "1/s", 50.0, 100.0)
    return found


def test_ratio_and_limit() -> None:
    assert Row("x", "µs", 5.0, 4.0, 1.3).ratio == 1.25
    assert [row.missed for row in report().rows] == [False, True, False, True, False]
    assert Row("x", "µs", 5.0, 4.0, 1.2).missed
    assert Row("x", "µs", 5.0, 0.0, 1.2).missed  # nothing to compare with is no success
    assert Row("x", "µs", 5.0).ratio is None


def test_json_there_and_back() -> None:
    found = read(json.dumps(report().as_json()))
    assert (found.name, found.title, found.rows, found.notes) == (
        *("sockets", "Unix socket", report().rows, ["A note."]),
    )
    machine = report().as_json()["machine"]
    assert set(machine) == {"processor", "kernel", "python", "peer"}
    with pytest.raises(KeyError):
        read("{}")


def test_markdown() -> None:
    text = report().markdown()
    assert "| GetRandom, p50 | µs | 5 | 4 | 1.25 |" in text
    assert "| start to first answer | ms | 12,345 |  |  (limit missed) |" in text
    assert text.endswith("\nA note.\n")


def test_finish(capsys: pytest.CaptureFixture[str]) -> None:
    def options(**given: bool) -> argparse.Namespace:
        return argparse.Namespace(**{"json": False, "check": False, **given})

    finish(report(), options(json=True))
    out, err = capsys.readouterr()
    assert json.loads(out)["name"] == "sockets"
    assert err.splitlines()[-1] == "bench: start to first answer: limit 100 missed"
    finish(report(), options())
    assert capsys.readouterr().out == report().markdown() + "\n"
    with pytest.raises(SystemExit) as info:
        finish(report(), options(check=True))
    assert info.value.code == 1


def test_every_benchmark_has_help_and_json() -> None:
    assert {"cuse", "fuse", "sockets"} <= set(bench_all.names())
    for name in bench_all.names():
        command = [sys.executable, str(ROOT / f"bench/{name}.py"), "--help"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        assert "--json" in done.stdout


def test_those_that_need_it_run_in_the_lab() -> None:
    assert "kernel-helpers/lab" in bench_all.command_of("cuse")[0]
    assert bench_all.command_of("sockets")[0] == sys.executable


def test_summary_replaces_its_part_of_the_readme() -> None:
    part = bench_all.summary([report()], FACTS, "2026-01-31")
    assert "| Memory of one TPM, Pss | MiB | 30 | 4 | 7.50 |" in part  # no target of ours beside it
    assert len([line for line in part.splitlines() if line.startswith("| ")]) == 2
    assert "(docs/benchmarks/headlines.png)" in part
    assert "2026-01-31: 2 x Some CPU, kernel 6.1, Python 3.11, beside swtpm 0.7." in part
    old = f"before\n{bench_all.BEGIN}\nold\n{bench_all.END}\nafter\n"
    new = bench_all.into_readme(old, part)
    assert new == f"before\n{part}\nafter\n"
    assert bench_all.into_readme(new, part) == new
    with pytest.raises(ValueError, match="lacks"):
        bench_all.into_readme("nothing", part)
    assert bench_all.BEGIN in (ROOT / "README.md").read_text()


def test_what_is_kept_says_nothing_of_limits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kept, readme = tmp_path / "docs/benchmarks", tmp_path / "README.md"
    readme.write_text(f"{bench_all.BEGIN}\n{bench_all.END}\n")
    for name, value in (("ROOT", tmp_path), ("OUT", tmp_path / "out"), ("KEPT", kept)):
        monkeypatch.setattr(bench_all, name, value)
    monkeypatch.setattr(bench_all, "names", lambda: ["sockets"])
    monkeypatch.setattr(bench_all, "run", lambda _: report())
    monkeypatch.setattr(sys, "argv", ["all.py", "--keep"])
    assert bench_all.main() == 0
    assert "limit missed" in (tmp_path / "out/README.md").read_text()
    for folder in (kept, ROOT / "docs/benchmarks"):
        for name in ("README.md", "results.json"):
            assert not re.search("limit|missed", (folder / name).read_text())


def test_headlines_are_rows_of_the_kept_results() -> None:
    kept = json.loads((ROOT / "docs/benchmarks/results.json").read_text())
    there = {(report["name"], row["what"]) for report in kept["reports"] for row in report["rows"]}
    assert {(name, what) for name, what, _ in bench_all.HEADLINES} <= there
    assert len(bench_all.HEADLINES) <= 8


def test_written_files(tmp_path: Path) -> None:
    bench_all.write(tmp_path, [report()], FACTS, "2026-01-31")
    assert json.loads((tmp_path / "results.json").read_text())["reports"][0]["name"] == "sockets"
    assert "![ratios](ratios.png)" in (tmp_path / "README.md").read_text()
    for picture in ("ratios.png", "headlines.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_a_benchmark_that_fails_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_all, "command_of", lambda _: [sys.executable, "-c", "print('x')"])
    assert bench_all.run("sockets") is None
    monkeypatch.setattr(bench_all, "command_of", lambda _: [sys.executable, "-c", "exit(3)"])
    assert bench_all.run("sockets") is None
    assert "failed after" in capsys.readouterr().err


@pytest.mark.parametrize("failed", [0, 1])
def test_one_failure_is_the_failure_of_all(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, failed: int
) -> None:
    monkeypatch.setattr(sys, "argv", ["all.py"])
    monkeypatch.setattr(bench_all, "OUT", tmp_path)
    monkeypatch.setattr(bench_all, "names", lambda: ["a", "b"])
    monkeypatch.setattr(bench_all, "run", lambda name: None if failed and name == "b" else report())
    assert bench_all.main() == failed
    assert "### Unix socket" in (tmp_path / "README.md").read_text()
