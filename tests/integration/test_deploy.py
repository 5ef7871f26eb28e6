"""deploy/place, the half of "./setup deploy" that touches the system, below folders of its own."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STATE = "var/lib/vtpm-cuse/vtpm0/tpm2-00.permall"
SETTINGS = "etc/vtpm-cuse/vtpm0.env"
FOREIGN = ("usr/local/bin/other", "etc/apparmor.d/other", STATE, SETTINGS)
MANIFEST = "usr/local/lib/vtpm-cuse/manifest"

Tree = dict[str, tuple[int, bytes | str]]


@pytest.fixture(scope="module")
def venv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Programs to place, as "./setup deploy" builds them, but with nothing in them."""
    path = tmp_path_factory.mktemp("built") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", path], check=True)
    for name in ("swtpm", "swtpm-cuse"):
        (path / "bin" / name).write_text(f"#!{path}/bin/python\nimport one\nprint('{name} runs')\n")
        (path / "bin" / name).chmod(0o755)
    (next((path / "lib").glob("python3*/site-packages")) / "one.py").write_text("x = 1\n")
    return path


@pytest.fixture
def system(tmp_path: Path) -> Path:
    """A system with files of others, the state of a TPM among them."""
    for name in FOREIGN:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (tmp_path / "usr/local/share").mkdir()
    return tmp_path


def place(system: Path, *words: str | Path, status: int = 0) -> str:
    done = subprocess.run(
        [ROOT / "deploy/place", "--root", system, *words],
        check=False,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (status, ""), done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def tree(system: Path) -> Tree:
    """All there is, with permissions and content."""
    found: Tree = {}
    for path in system.rglob("*"):
        content: bytes | str = ""
        if path.is_symlink():
            content = str(path.readlink())
        elif path.is_file():
            content = path.read_bytes()
        found[str(path.relative_to(system))] = (path.lstat().st_mode, content)
    return found


def test_what_is_put_can_be_taken_out_again(system: Path, venv: Path) -> None:
    before = tree(system)
    place(system, venv)
    after = tree(system)
    assert {name: after[name] for name in before} == before
    listed = set((system / MANIFEST).read_text().splitlines())
    for name in after.keys() - before.keys():
        inside = name.startswith("usr/local/lib/vtpm-cuse/")
        assert inside or name in listed or f"{name}/" in listed
    place(system, "--uninstall")
    assert tree(system) == before


def test_it_lies_where_the_system_looks(system: Path, venv: Path) -> None:
    place(system, venv)
    local = system / "usr/local"
    rules = local / "lib/udev/rules.d/60-vtpm-cuse.rules"
    assert rules.read_bytes() == (ROOT / "udev/60-vtpm-cuse.rules").read_bytes()
    assert {path.name for path in (local / "lib/systemd/system").iterdir()} == {
        "swtpm-cuse@.service",
        "swtpm-vtpm-proxy@.service",
    }
    assert (local / "share/man/man8/swtpm-cuse.8").resolve().name == "swtpm_cuse.8"
    assert (local / "share/bash-completion/completions/swtpm").resolve().is_file()
    program = (local / "bin/swtpm").resolve()
    assert program == local / "lib/vtpm-cuse/venv/bin/swtpm"
    first = program.read_text().splitlines()[0]
    assert first == "#!/usr/local/lib/vtpm-cuse/venv/bin/python3"
    python = local / "lib/vtpm-cuse/venv/bin/python3"
    run = subprocess.run([python, program], check=True, capture_output=True, text=True)
    assert run.stdout == "swtpm runs\n"


def test_compiled_files_name_their_final_place(system: Path, venv: Path) -> None:
    place(system, venv)
    (compiled,) = (system / "usr/local/lib/vtpm-cuse/venv").rglob("one.*.pyc")
    assert b"/usr/local/lib/vtpm-cuse/venv/lib/" in compiled.read_bytes()
    assert str(system).encode() not in compiled.read_bytes()


def test_a_second_time_replaces_the_first(system: Path, venv: Path, tmp_path: Path) -> None:
    before = tree(system)
    place(system, venv)
    program = system / "usr/local/bin/swtpm-gone"  # as if the former version had it
    program.symlink_to("../lib/vtpm-cuse/venv/bin/swtpm-gone")
    manifest = system / MANIFEST
    manifest.write_text(manifest.read_text() + "usr/local/bin/swtpm-gone\n")
    (system / "usr/local/lib/udev/rules.d/60-vtpm-cuse.rules").write_text("old")
    place(system, venv)
    assert not program.is_symlink()
    assert (system / "usr/local/lib/udev/rules.d/60-vtpm-cuse.rules").read_text() != "old"
    place(system, "--uninstall")
    assert tree(system) == before


def test_a_file_of_somebody_else_is_not_replaced(system: Path, venv: Path) -> None:
    mine = system / "usr/local/bin/swtpm"
    mine.write_text("the C suite")
    before = tree(system)
    said = place(system, venv, status=1)
    assert str(mine) in said
    assert "nothing was done" in said
    assert tree(system) == before


def test_a_folder_with_somebody_elses_file_stays(system: Path, venv: Path) -> None:
    place(system, venv)
    mine = system / "usr/local/lib/udev/rules.d/99-mine.rules"
    mine.write_text("mine")
    place(system, "--uninstall")
    assert mine.read_text() == "mine"
    assert not (system / "usr/local/lib/vtpm-cuse").exists()


def test_nothing_to_take_out(system: Path) -> None:
    before = tree(system)
    assert "nothing was put" in place(system, "--uninstall", status=1)
    assert tree(system) == before


def test_a_deployment_that_broke_off_can_be_taken_out(system: Path, venv: Path) -> None:
    before = tree(system)
    place(system, venv)
    # The manifest is written first: as if only half of the files had come after it.
    shutil.rmtree(system / "usr/local/share/man")
    shutil.rmtree(system / "usr/local/lib/vtpm-cuse/venv")
    (system / "usr/local/bin/.swtpm.new").symlink_to("x")
    place(system, venv)
    place(system, "--uninstall")
    assert tree(system) == before


@pytest.mark.parametrize(("unit", "exposure"), [("swtpm-cuse@", 7), ("swtpm-vtpm-proxy@", 10)])
def test_units_are_hardened(unit: str, exposure: int, tmp_path: Path) -> None:
    """The score of systemd-analyze in tenths: 0 is a sealed box, 100 no protection."""
    instance = tmp_path / f"{unit}x.service"
    shutil.copy(ROOT / f"deploy/systemd/{unit}.service", instance)
    command = ["systemd-analyze", "security", "--no-pager", "--offline=true"]
    done = subprocess.run([*command, f"--threshold={exposure}", instance], capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    tighter = subprocess.run([*command, f"--threshold={exposure - 1}", instance])
    assert tighter.returncode == 1  # the figure above is the true one


def test_profile_is_understood() -> None:
    command = ["apparmor_parser", "--skip-kernel-load", "--skip-cache"]
    done = subprocess.run([*command, ROOT / "deploy/apparmor"], check=True, capture_output=True)
    assert b"rror" not in done.stderr
