"""Manual and completions as other programs read them: man, mandoc, bash, zsh and fish."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.waiting import PATIENCE_SECONDS
from tools.manual.completions import names
from tools.manual.pages import links, pages
from vtpm_cuse.cli.swtpm_ioctl import PROGRAM

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[2]
COMPLETIONS = ROOT / "completions"
PLAIN = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", "HOME": "/nonexistent", "TERM": "dumb"}

for tool in ("man", "mandoc", "bash", "zsh", "fish"):
    if not shutil.which(tool):
        pytest.skip(f"{tool} is missing", allow_module_level=True)


def run(*words: str | Path, folder: Path = ROOT) -> str:
    """Output of a command that must succeed and say nothing on standard error."""
    done = subprocess.run(
        words,
        check=False,
        capture_output=True,
        text=True,
        env=PLAIN,
        cwd=folder,
        timeout=PATIENCE_SECONDS,
    )
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


@pytest.mark.parametrize("page", [*pages(), *links()])
def test_page_is_clean(page: str) -> None:
    path = ROOT / "man" / page
    assert run("mandoc", "-Tlint", "-Wstyle", path) == ""
    text = run("man", "--warnings=all", "-Tutf8", "-l", path)
    assert "NAME" in re.sub(".\b", "", text)  # bold is a letter struck twice


def test_check_finds_what_is_old(tmp_path: Path) -> None:
    run(sys.executable, "-m", "tools.manual", tmp_path)
    check = [sys.executable, "-m", "tools.manual", "--check", str(tmp_path)]
    assert subprocess.run(check, check=False, capture_output=True).returncode == 0
    page = tmp_path / "man" / next(iter(pages()))
    page.write_text(page.read_text() + "x")
    (tmp_path / "man/man8/gone.8").write_text("")
    (tmp_path / "man" / next(iter(links()))).unlink()
    done = subprocess.run(check, check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout.count("old: ") == 3
    run(sys.executable, "-m", "tools.manual", tmp_path)
    assert subprocess.run(check, check=False).returncode == 0


CASES = [
    ("swtpm so", {"socket"}),
    ("swtpm cuse --tpms", {"--tpmstate"}),
    ("swtpm cuse --tpmstate di", {"dir="}),
    ("swtpm cuse --tpmstate dir=/x,mo", {"dir=/x,mode="}),
    ("swtpm socket --server type=t", {"type=tcp"}),
    ("swtpm socket --ctrl type=unixio,path=/etc/hostn", {"type=unixio,path=/etc/hostname"}),
    ("swtpm-cuse --fore", {"--foreground"}),
    ("swtpm_ioctl --save per", {"permanent"}),
    ("swtpm_ioctl --save permanent /etc/hostn", {"/etc/hostname"}),
    ("swtpm_ioctl -c /etc/hostn", {"/etc/hostname"}),
]


def bash(line: str) -> set[str]:
    """What bash offers: the words that would stand on the line."""
    script = f"""
        source completions/bash/vtpm-cuse
        COMP_LINE={shlex.quote(line)} COMP_POINT=${{#COMP_LINE}}
        read -r _ _ function name < <(complete -p "${{COMP_LINE%% *}}")
        "$function" "${{COMP_LINE%% *}}" 2>&1
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    last = line.split(" ")[-1]
    # Readline keeps what is before the last separator and puts the offer behind it.
    kept = last[: max(last.rfind("="), last.rfind(":")) + 1]
    return {kept + word for word in run("bash", "--norc", "-c", script).split()}


@pytest.mark.parametrize(("line", "offers"), CASES)
def test_bash_completes(line: str, offers: set[str]) -> None:
    assert bash(line) == offers


def test_bash_knows_every_program() -> None:
    run("bash", "-n", COMPLETIONS / "bash/vtpm-cuse")
    for name in names():
        out = run("bash", "-c", f"source completions/bash/vtpm-cuse; complete -p {name}")
        assert out == f"complete -F _vtpm_cuse {name}\n"


def test_bash_offers_files_for_paths(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    assert bash(f"swtpm-cuse --tpmstate dir={tmp_path}/f") == {f"dir={tmp_path}/folder"}
    both = {f"file={tmp_path}/folder", f"file={tmp_path}/file"}
    assert bash(f"swtpm-cuse --log level=5,file={tmp_path}/f") == {f"level=5,{x}" for x in both}


def fish(line: str) -> set[str]:
    """What fish offers, without descriptions."""
    name = line.split(" ")[0]
    script = f"source completions/fish/{name}.fish; complete -C {shlex.quote(line)}"
    rows = run("fish", "--no-config", "-c", script).splitlines()
    return {row.partition("\t")[0] for row in rows}


@pytest.mark.parametrize(("line", "offers"), CASES)
def test_fish_completes(line: str, offers: set[str]) -> None:
    if "type=" in line:  # fish completes the keys of a list, not what follows a key
        line, offers = line.partition("type=")[0] + "typ", {"type="}
    assert fish(line) == offers


def test_fish_knows_every_program() -> None:
    assert {path.stem for path in (COMPLETIONS / "fish").iterdir()} == set(names())
    for name in names():
        run("fish", "-n", COMPLETIONS / f"fish/{name}.fish")


def zsh(line: str) -> set[str]:
    """What zsh offers: the words that would stand on the line."""
    rows = run("zsh", "-f", "tests/support/offers.zsh", line).split("OFFER ")[1:]
    last = line.split(" ")[-1]
    kept = last[: max(last.rfind(char) for char in "=,/") + 1]
    return {kept + row.split()[0] for row in rows}


@pytest.mark.parametrize(("line", "offers"), CASES)
def test_zsh_completes(line: str, offers: set[str]) -> None:
    assert zsh(line) == offers


@pytest.mark.parametrize("shell", [bash, fish, zsh], ids=["bash", "fish", "zsh"])
def test_names_of_tpms_are_offered(
    shell: Callable[[str], set[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vtpm = tmp_path / "vtpm"
    vtpm.write_text(
        '#!/bin/sh\n[ "$*" = "ls --names" ] && printf "web1\\nweb2\\n\\$(false)\\nx\\n"\n'
    )
    vtpm.chmod(0o700)
    monkeypatch.setitem(PLAIN, "PATH", f"{tmp_path}:{PLAIN['PATH']}")
    assert shell("vtpm start w") == {"web1", "web2"}
    assert shell("vtpm create w") == set()


def test_zsh_knows_every_program() -> None:
    run("zsh", "-n", COMPLETIONS / "zsh/_vtpm_cuse")
    script = "fpath=(completions/zsh $fpath); autoload -Uz compinit; compinit -u -D; print $_comps["
    for name in names():
        assert run("zsh", "-f", "-c", f"{script}{name}]") == "_vtpm_cuse\n"
    shown = zsh("swtpm_ioctl -")
    assert shown == {word for option in PROGRAM.available for word in option.words}
