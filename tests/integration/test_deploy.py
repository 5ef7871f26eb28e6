"""deploy/place, the half of "./setup deploy" that touches the system, below folders of its own."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
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
    for name in ("swtpm", "swtpm-cuse", "vtpm", "vtpmd"):
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


def place(system: Path, *words: str | Path, status: int = 0, umask: int = -1) -> str:
    done = subprocess.run(
        [ROOT / "deploy/place", "--root", system, *words],
        check=False,
        capture_output=True,
        text=True,
        umask=umask,
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
        "swtpm-resource-manager@.service",
        "swtpm-vtpm-proxy@.service",
        "vtpm-tree.service",
        "vtpmd.service",
        "vtpmd.socket",
    }
    for unit in ("system", "user"):
        text = (local / f"lib/systemd/{unit}/vtpmd.service").read_text()
        (started,) = re.findall(r"^ExecStart=(\S+)", text, re.MULTILINE)
        assert (system / started[1:]).resolve() == local / "lib/vtpm-cuse/venv/bin/vtpmd"
    assert (local / "include/swtpm/tpm_ioctl.h").is_file()
    assert (local / "share/man/man8/swtpm-cuse.8").resolve().name == "swtpm_cuse.8"
    assert (local / "share/bash-completion/completions/swtpm").resolve().is_file()
    program = (local / "bin/swtpm").resolve()
    assert program == local / "lib/vtpm-cuse/venv/bin/swtpm"
    first = program.read_text().splitlines()[0]
    assert first.startswith("#!/usr/bin/env -S -u ")
    assert first.endswith(" /usr/local/lib/vtpm-cuse/venv/bin/python3 -IB")
    python = local / "lib/vtpm-cuse/venv/bin/python3"
    run = subprocess.run([python, program], check=True, capture_output=True, text=True)
    assert run.stdout == "swtpm runs\n"


def test_selinux_policy(system: Path, venv: Path) -> None:
    """It compiles; each path has a type of its own or the system's, and the programs have theirs."""
    policy = ROOT / "deploy/selinux/vtpm_cuse.te"
    types = set(re.findall(r"^type (\w+),", policy.read_text(), re.MULTILINE))
    rows = [row.split() for row in policy.with_suffix(".fc").read_text().splitlines()]
    labels = {row[0]: row[-1].split(":")[2] for row in rows}
    assert types - {"vtpm_cuse_t"} <= {*labels.values()} <= types | {"bin_t", "tpm_device_t"}
    place(system, venv)
    program = f"/{(system / 'usr/local/bin/swtpm').resolve().relative_to(system)}"
    last = [label for path, label in labels.items() if re.fullmatch(path, program)][-1]
    assert last == "vtpm_cuse_exec_t"
    if (compiler := shutil.which("checkmodule")) is None:
        pytest.skip("checkmodule is missing")
    output = system / "vtpm_cuse.mod"
    subprocess.run([compiler, "-M", "-m", "-o", output, policy], check=True)
    assert output.stat().st_size


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give folders away")
@pytest.mark.parametrize("there", [False, True], ids=["new", "root's"])
def test_users_and_their_folders(tmp_path: Path, *, there: bool) -> None:
    for program in ("systemd-sysusers", "systemd-tmpfiles"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is missing")
    folder = tmp_path / "var/lib/swtpm-localca"
    (tmp_path / "etc").mkdir()
    if there:
        folder.mkdir(parents=True)
        folder.chmod(0o700)
    for words in (
        ["systemd-sysusers", f"--root={tmp_path}", f"{ROOT}/deploy/sysusers.conf"],
        ["systemd-tmpfiles", "--create", f"--root={tmp_path}", f"{ROOT}/deploy/tmpfiles.conf"],
    ):
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    accounts = (tmp_path / "etc/passwd").read_text().splitlines()
    numbers = {fields[0]: int(fields[2]) for fields in (row.split(":") for row in accounts)}
    owner = 0 if there else numbers["tss"]
    found = folder.stat()
    assert (found.st_uid, found.st_gid) == (owner, 0)
    assert found.st_mode & 0o777 == (0o700 if there else 0o750)
    assert (tmp_path / "run/vtpm-cuse").stat().st_uid == numbers["vtpm-cuse"]


def test_compiled_files_name_their_final_place(system: Path, venv: Path) -> None:
    place(system, venv)
    (compiled,) = (system / "usr/local/lib/vtpm-cuse/venv").rglob("one.*.pyc")
    assert b"/usr/local/lib/vtpm-cuse/venv/lib/" in compiled.read_bytes()
    assert str(system).encode() not in compiled.read_bytes()


def test_compiled_files_stay_good_in_a_copy(system: Path, venv: Path) -> None:
    """Whose files are younger, so that root would compile them again at each start."""
    place(system, venv)
    (source,) = (system / "usr/local/lib/vtpm-cuse/venv").rglob("one.py")
    source.write_text("raise SystemExit('compiled again')\n")
    python = system / "usr/local/lib/vtpm-cuse/venv/bin/python3"
    code = f"import sys; sys.path.insert(0, {str(source.parent)!r}); import one; print(one.x)"
    done = subprocess.run([python, "-Ic", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("1\n", "")


def check_modes(folder: Path) -> int:
    """Each file is for all to read and for its owner alone to write; returns their number."""
    count = 0
    for path in [folder, *folder.rglob("*")]:
        if not path.is_symlink():
            status = path.stat()
            program = path.is_dir() or path.parent.name == "bin" or ".so" in path.name
            allowed = (0o755,) if path.is_dir() else (0o644, 0o755) if program else (0o644,)
            assert (str(path), status.st_mode & 0o777) in {(str(path), mode) for mode in allowed}
            assert status.st_uid == os.geteuid()
            count += 1
    return count


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_modes_are_not_the_callers_umasks(tmp_path: Path, venv: Path, umask: int) -> None:
    built = tmp_path / "built"
    shutil.copytree(venv, built, symlinks=True)
    for path in [built, *built.rglob("*")]:
        if not path.is_symlink():
            executable = path.is_dir() or path.stat().st_mode & 0o100
            path.chmod((0o777 if executable else 0o666) & ~umask)
    system = tmp_path / "system"
    system.mkdir()
    place(system, built, umask=umask)
    assert check_modes(system) > 40
    place(system, built, umask=umask)
    check_modes(system)


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_a_whole_deployment_under_another_umask(tmp_path: Path, umask: int) -> None:
    checkout = tmp_path / "checkout"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "build", "*.egg-info", "tests", "bench")
    shutil.copytree(ROOT, checkout, symlinks=True, ignore=ignored)
    done = subprocess.run(
        [checkout / "setup", "deploy", "--root", tmp_path / "system"],
        env={
            **os.environ,
            "PYTHONHOME": "/x",
            "PYTHONPATH": "/x",
            "PYTHONEXECUTABLE": "/x/python",
            "__PYVENV_LAUNCHER__": "/x/python",
        },
        capture_output=True,
        text=True,
        check=False,
        umask=umask,
    )
    assert done.returncode == 0, done.stderr
    assert check_modes(tmp_path / "system") > 500
    venv = tmp_path / "system/usr/local/lib/vtpm-cuse/venv"
    assert not {path.name for path in (venv / "bin").iterdir()} & {"pip", "activate"}
    # Of each source there is a compiled file, so that nothing is left to be written at a start.
    sources = [path for path in venv.rglob("*.py") if path.parent.name != "bin"]
    compiled = {path.name.split(".")[0] for path in venv.rglob("*.pyc")}
    assert {path.stem.split(".")[0] for path in sources} <= compiled


def test_no_program_of_the_current_folder_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As root, who has an empty part in PATH and perhaps does not know."""
    (tmp_path / "systemctl").write_text("#!/bin/sh\n: >ran\n")
    (tmp_path / "systemctl").chmod(0o755)
    monkeypatch.chdir(tmp_path)
    placing = runpy.run_path(str(ROOT / "deploy/place"))
    for part in ("", ".", "x/.."):
        monkeypatch.setenv("PATH", f"{part}:/none")
        placing["call"]("systemctl", "daemon-reload")
        with pytest.raises(placing["DeployError"], match="systemctl is missing"):
            placing["active_units"]()
    assert not (tmp_path / "ran").exists()


def test_a_folder_that_others_can_change(system: Path, venv: Path) -> None:
    open_to_all = system / "usr/local/lib"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    before = tree(system)
    said = place(system, venv, status=1)
    assert f"{open_to_all} can be changed by others (mode 0777, owner {os.geteuid()}:" in said
    assert tree(system) == before
    open_to_all.chmod(0o755)
    place(system, venv)
    open_to_all.chmod(0o777)
    assert "can be changed by others" in place(system, "--uninstall", status=1)
    assert (system / MANIFEST).exists()


def test_a_folder_where_others_could_make_the_next(system: Path, venv: Path) -> None:
    """As in /tmp: what is not there yet could be a link by the time it is used."""
    shared = system / "usr/local"
    shared.chmod(0o1777)
    assert f"{shared} can be changed by others" in place(system, venv, status=1)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give a folder away")
@pytest.mark.parametrize("kind", ["folder", "link"])
def test_a_folder_of_somebody_else(system: Path, venv: Path, tmp_path: Path, kind: str) -> None:
    theirs = system / "usr/local/lib"
    if kind == "folder":
        theirs.mkdir()
    else:
        (system / "elsewhere").mkdir()
        theirs.symlink_to("../../elsewhere")
    os.chown(theirs, 1234, 1234, follow_symlinks=False)
    before = tree(system)
    assert f"{theirs} can be changed by others" in place(system, venv, status=1)
    assert tree(system) == before


def test_a_link_within_the_system_is_followed_and_one_out_of_it_is_not(
    tmp_path: Path, venv: Path
) -> None:
    system, elsewhere = tmp_path / "system", tmp_path / "elsewhere"
    (system / "usr").mkdir(parents=True)
    (system / "var/usrlocal").mkdir(parents=True)
    elsewhere.mkdir()
    (system / "usr/local").symlink_to(elsewhere)
    assert f"{system}/usr/local leads out of {system}" in place(system, venv, status=1)
    assert not list(elsewhere.iterdir())
    (system / "usr/local").unlink()
    (system / "usr/local").symlink_to("../var/usrlocal")
    place(system, venv)
    assert (system / "var/usrlocal/bin/swtpm").is_symlink()


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-build.txt"])
def test_what_is_deployed_is_pinned_by_hashes(name: str) -> None:
    """And names no place to have it from: that is for who installs to say."""
    text = (ROOT / "deploy" / name).read_text()
    assert "://" not in text
    entries = re.findall(
        r"^(\S+?)==\S+((?: *;.*?)?(?: \\\n +--hash=sha256:[0-9a-f]{64})+)$", text, re.MULTILINE
    )
    rows = [row for row in text.splitlines() if not row.startswith(("#", " "))]
    assert len(entries) == len(rows)
    wanted = {"requirements.txt": "cryptography", "requirements-build.txt": "setuptools"}[name]
    assert {wanted, "cffi"} <= {entry[0] for entry in entries}


def test_a_package_with_another_hash_is_not_installed(tmp_path: Path) -> None:
    """As "./setup deploy" asks for it, from a folder with another file of that version."""
    wheel = tmp_path / "sniffio-1.3.1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        info = "sniffio-1.3.1.dist-info"
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: sniffio\nVersion: 1.3.1\n"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    pinned = (ROOT / "deploy/requirements.txt").read_text()
    own = re.search(r"^sniffio==.*?(?=^\S|\Z)", pinned, re.MULTILINE | re.DOTALL)
    assert own
    (tmp_path / "list").write_text(own[0])
    pip = [sys.executable, "-m", "pip", "install", "--no-index", "--require-hashes", "--no-deps"]
    done = subprocess.run(
        [*pip, "--find-links", tmp_path, "--target", tmp_path / "x", "-r", tmp_path / "list"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode
    assert "DO NOT MATCH THE HASHES" in done.stderr
    assert "--require-hashes" in (ROOT / "tools/programs.py").read_text()


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


@pytest.mark.parametrize(
    ("unit", "exposure"),
    [
        ("swtpm-cuse@.service", 5),
        ("swtpm-vtpm-proxy@.service", 10),
        ("swtpm-resource-manager@.service", 5),
        ("vtpmd.service", 21),
        ("vtpm-tree.service", 37),
    ],
)
def test_units_are_hardened(unit: str, exposure: int, tmp_path: Path) -> None:
    """The score of systemd-analyze in tenths: 0 is a sealed box, 100 no protection."""
    instance = tmp_path / unit.replace("@", "@x")
    shutil.copy(ROOT / "deploy/systemd" / unit, instance)
    command = ["systemd-analyze", "security", "--no-pager", "--offline=true"]
    done = subprocess.run([*command, f"--threshold={exposure}", instance], capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    tighter = subprocess.run([*command, f"--threshold={exposure - 1}", instance])
    assert tighter.returncode == 1  # the figure above is the true one


def test_profiles_are_understood(system: Path, venv: Path) -> None:
    place(system, venv)
    folder = system / "etc/apparmor.d"
    options = ["--skip-kernel-load", "--skip-cache", "--names"]
    command = ["apparmor_parser", "-I", str(folder), *options, str(folder / "vtpm-cuse")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "rror" not in done.stderr
    assert done.stdout.split() == ["swtpm-cuse", "swtpm-vtpm-proxy"]


def test_profiles_are_narrow() -> None:
    common = (ROOT / "deploy/apparmor-common").read_text()
    cuse, proxy = (ROOT / "deploy/apparmor").read_text().split("profile swtpm-")[1:]
    assert "capability" not in common + cuse
    assert re.findall(r"capability (\w+)", proxy) == ["sys_admin"]
    assert re.findall(r"/dev/\S+", common) == []
    assert re.findall(r"/dev/\S+", cuse) == ["/dev/cuse"]
    assert re.findall(r"/dev/\S+", proxy) == ["/dev/vtpmx"]
    for row in (common + cuse + proxy).splitlines():
        assert "/var/lib/private" not in row or row.startswith("  owner ")
