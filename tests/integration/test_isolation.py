"""Programs run alike whatever the caller's environment and folder say to Python, however installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from tests.support.programs import INSTALLED
from tests.support.sockets import GET_CAPABILITY, connect
from tests.support.waiting import PATIENCE_SECONDS, wait_until
from tests.support.wheel import ROOT, copied_sources

FOREIGN: Final = ("trio", "cffi", "vtpm_cuse", "sitecustomize", "usercustomize")

Words = list[str]


def installed(folder: Path) -> Path:
    """A venv with the package as pip installs it, and the dependencies of this one."""
    tree = copied_sources(folder)
    # Paths that no line with #! could name.
    venv = folder / f"a venv {'x' * 200}" / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    packages = next((venv / "lib").glob("python3*/site-packages"))
    (packages / "rest.pth").write_text("".join(f"{path}\n" for path in sys.path if path))
    pip: list[str | Path] = [sys.executable, "-m", "pip", "--python", venv / "bin/python"]
    options = ["-q", "--no-deps", "--no-index", "--no-build-isolation", "--no-warn-script-location"]
    subprocess.run([*pip, "install", *options, tree], check=True)
    return venv / "bin"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return installed(tmp_path_factory.mktemp("isolation"))


@pytest.fixture(params=["installed", "linked", "deployed", "venv"])
def program(request: pytest.FixtureRequest, tmp_path: Path) -> Words:
    """What is executed for "swtpm" in each form."""
    if request.param == "venv":
        return [str(Path(sys.executable).parent / "swtpm")]
    bin_: Path = request.getfixturevalue("wheel")
    if request.param == "installed":
        return [str(bin_ / "swtpm")]
    if request.param == "linked":
        (tmp_path / "links").mkdir()
        (tmp_path / "links/tpm").symlink_to(bin_ / "swtpm")
        return [str(tmp_path / "links/tpm")]
    system = tmp_path / "system"
    system.mkdir()
    subprocess.run([ROOT / "deploy/place", "--root", system, bin_.parent], check=True)
    # Its first line names the place where it will be, so what the kernel does is done here.
    path = system / "usr/local/bin/swtpm"
    words = path.read_text().splitlines()[0].removeprefix("#!").split(" ")
    *env, python, options = words
    return [*env, f"{system}{python}", options, str(path)]


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A folder of modules that tell when they are run, as those of a user's home are found too."""
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    for folder in (tmp_path / "foreign", tmp_path / f"home/.local/lib/{version}/site-packages"):
        folder.mkdir(parents=True)
        for name in FOREIGN:
            text = f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r})\nraise SystemExit(77)\n"
            (folder / f"{name}.py").write_text(text)
    venv = tmp_path / "foreign/venv"
    packages = venv / "lib" / version / "site-packages"
    packages.mkdir(parents=True)
    shutil.copy(tmp_path / "foreign/sitecustomize.py", packages)
    (venv / "pyvenv.cfg").write_text(f"home = {sys.base_prefix}/bin\n")
    (venv / "bin").mkdir()
    (venv / "bin/python").symlink_to(os.path.realpath(sys.executable))
    return tmp_path / "foreign"


VARIABLES: Final = {
    "PYTHONHOME": "/x",
    "PYTHONPATH": "FOREIGN",
    "PYTHONSTARTUP": "FOREIGN/trio.py",
    "PYTHONUSERBASE": "HOME/.local",
    "PYTHONINSPECT": "1",
    "PYTHONWARNINGS": "error",
    "PYTHONMALLOC": "none such",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONPYCACHEPREFIX": "FOREIGN/cache",
    "PYTHONSAFEPATH": "1",
    "PYTHONPLATLIBDIR": "x",
    "PYTHONUTF8": "none such",
    "PYTHONHASHSEED": "none such",
    "PYTHONIOENCODING": "none such",
    "PYTHONINTMAXSTRDIGITS": "none such",
    "PYTHONTRACEMALLOC": "none such",
    "PYTHONOPTIMIZE": "2",
    "PYTHONVERBOSE": "1",
    "PYTHONDEVMODE": "1",
    "PYTHONPROFILEIMPORTTIME": "1",
    "PYTHONDUMPREFS": "1",
    "PYTHONEXECUTABLE": "FOREIGN/venv/bin/python",
    "__PYVENV_LAUNCHER__": "FOREIGN/venv/bin/python",
}

DESPITE_I: Final = ("PYTHONEXECUTABLE", "__PYVENV_LAUNCHER__")
"""What Python hears even when it is told to hear nothing."""


def variables(foreign: Path, *names: str) -> dict[str, str]:
    home = str(foreign.parent / "home")
    values = {name: VARIABLES[name] for name in names}
    for name, value in values.items():
        values[name] = value.replace("FOREIGN", str(foreign)).replace("HOME", home)
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTHON", "__PYVENV"))
    }
    return {**clean, "HOME": home, **values}


def test_the_variables_and_folders_do_matter_to_python(foreign: Path) -> None:
    """So that the tests below can fail."""
    found = []
    for name in VARIABLES:
        call = [sys.executable, "-c", "import trio"]
        done = subprocess.run(call, env=variables(foreign, name), capture_output=True, check=False)
        found += [name] if done.returncode or done.stderr else []
    matter = {"PYTHONHOME", "PYTHONPATH", "PYTHONMALLOC", "PYTHONUTF8", "PYTHONVERBOSE", *DESPITE_I}
    assert matter <= set(found)


def test_no_variable_of_python_is_seen(program: Words, foreign: Path) -> None:
    call = [*program, "--version"]
    plain = subprocess.run(call, env=variables(foreign), capture_output=True, check=True)
    for name in VARIABLES:
        done = subprocess.run(
            call, cwd=foreign, env=variables(foreign, name), capture_output=True, check=False
        )
        assert (name, done.returncode, done.stdout, done.stderr) == (name, 0, plain.stdout, b"")
    assert not (foreign.parent / "ran").exists()
    assert not (foreign / "cache").exists()


@pytest.mark.parametrize("module", ["vtpm_cuse.cli.swtpm", "vtpm_cuse.cli.swtpm_ioctl"])
def test_a_module_that_python_is_told_to_run_is_not_isolated(module: str, foreign: Path) -> None:
    """Nor can it be: Python has read the variables before any line of ours is run."""
    call = [sys.executable, "-m", module, "--version"]
    done = subprocess.run(
        call, cwd=ROOT, env=variables(foreign, "PYTHONPATH"), capture_output=True, check=False
    )
    assert done.returncode
    assert (foreign.parent / "ran").exists()


@pytest.mark.parametrize("name", DESPITE_I)
@pytest.mark.parametrize("program", INSTALLED)
def test_python_is_the_one_that_the_program_names(program: str, name: str, foreign: Path) -> None:
    path = Path(sys.executable).parent / program
    env = variables(foreign, name)
    done = subprocess.run([path, "--help"], env=env, capture_output=True, check=False)
    assert not (foreign.parent / "ran").exists()
    assert (done.returncode, done.stderr) == (0, b"")


def test_setup_starts_no_other_python(foreign: Path) -> None:
    """What it finds Python with, and what it hands over to."""
    done = subprocess.run(
        [ROOT / "setup", "deploy", "--none-such"],
        env=variables(foreign, *DESPITE_I),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr.split(" ")[0]) == (2, "usage:")
    assert not (foreign.parent / "ran").exists()


def test_a_tpm_serves_under_all_of_them(program: Words, foreign: Path) -> None:
    folder = foreign.parent / "tpm"
    folder.mkdir()
    words = ["--tpm2", "--tpmstate", f"dir={folder}", "--ctrl", f"type=unixio,path={folder}/ctrl"]
    process = subprocess.Popen(
        [*program, "socket", *words, "--pid", f"file={folder}/pid"],
        cwd=foreign,
        env=variables(foreign, *VARIABLES),
        stderr=subprocess.PIPE,
    )
    try:
        wait_until((folder / "pid").exists, "it serves", process=process)
        with connect(folder / "ctrl") as client:
            assert client.control(GET_CAPABILITY, size=8)
        assert Path(f"/proc/{process.pid}/comm").read_text() in {"swtpm\n", "tpm\n"}
    finally:
        process.terminate()
        _, said = process.communicate()
    assert said == b""
    assert not (foreign.parent / "ran").exists()


def test_no_program_of_the_current_folder_is_run(program: Words, foreign: Path) -> None:
    """As an empty part of PATH says, of which a user may not know."""
    for name in ("readlink", "dirname"):
        (foreign / name).write_text(f"#!/bin/sh\n: >{foreign.parent}/ran\n")
        (foreign / name).chmod(0o755)
    env = {**variables(foreign), "PATH": f":{os.environ['PATH']}"}
    done = subprocess.run(
        [*program, "--version"], cwd=foreign, env=env, capture_output=True, check=False
    )
    assert not (foreign.parent / "ran").exists()
    assert (done.returncode, done.stderr) == (0, b"")


def test_programs_see_their_words_as_they_are(wheel: Path, tmp_path: Path) -> None:
    """The line is not read by a shell once more; nor are standard files that are closed filled."""
    words = ["a b", "$HOME", "`id`", "", "*", "\\", "'\""]
    for word in words:
        done = subprocess.run(
            [wheel / "swtpm", "socket", f"--tpmstate=dir={tmp_path}/{word}x,{word}"],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
        )
        assert done.returncode
        assert word in done.stderr
        assert "Traceback" not in done.stderr


def test_an_installation_of_the_users_own(tmp_path: Path, wheel: Path) -> None:
    """Its packages are in the user's home, so there they are looked for."""
    home = tmp_path / "home"
    (home / ".local/bin").mkdir(parents=True)
    base = next(Path(sys.base_prefix, "bin").glob(f"python3.{sys.version_info[1]}"))
    packages = home / f".local/lib/python3.{sys.version_info[1]}/site-packages"
    packages.mkdir(parents=True)
    (packages / "all.pth").write_text("".join(f"{path}\n" for path in sys.path if path))
    shutil.copy(wheel / "swtpm", home / ".local/bin")
    (home / ".local/bin/vtpm-cuse-python").write_text(f"#!{base}\n")
    done = subprocess.run(
        [home / ".local/bin/swtpm", "--version"],
        env={"HOME": str(home), "PATH": os.environ["PATH"], "PYTHONHOME": "/x"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "version" in done.stdout


def test_an_installer_that_goes_by_way_of_a_shell(tmp_path: Path, wheel: Path) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    shutil.copy(wheel / "swtpm", folder)
    (folder / "python3").symlink_to(wheel / "python3")
    shutil.copy(wheel.parent / "pyvenv.cfg", tmp_path)
    (tmp_path / "lib").symlink_to(wheel.parent / "lib")
    text = "#!/bin/sh\n'''exec' '/a long path/python' \"$0\" \"$@\"\n' '''\n"
    (folder / "vtpm-cuse-python").write_text(text)
    done = subprocess.run(
        [folder / "swtpm", "--version"],
        env={"PYTHONHOME": "/x", "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_SECONDS,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_without_the_python_it_was_installed_for(tmp_path: Path, wheel: Path) -> None:
    shutil.copy(wheel / "swtpm", tmp_path)
    done = subprocess.run(
        [tmp_path / "swtpm"], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 127
    assert f"{tmp_path}/vtpm-cuse-python" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("names", [DESPITE_I, tuple(VARIABLES)], ids=["two", "all"])
@pytest.mark.parametrize(
    "name", ["deploy/place", "kernel-helpers/lab", "kernel-helpers/tpm-device"]
)
def test_helpers_of_a_checkout_are_closed_too(
    name: str, names: tuple[str, ...], foreign: Path
) -> None:
    (foreign / "argparse.py").write_text((foreign / "trio.py").read_text())
    done = subprocess.run(
        [ROOT / name, "--help"],
        cwd=foreign,
        env=variables(foreign, *names),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: ")
    assert not (foreign.parent / "ran").exists()
