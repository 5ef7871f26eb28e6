"""The kernel lab as a command inside sees it."""

from __future__ import annotations

import os
import stat
import uuid
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    "LAB_SCRATCH" not in os.environ, reason="not in the lab: kernel-helpers/lab -- pytest …"
)


@pytest.mark.parametrize("name", ["cuse", "vtpmx"])
def test_device_is_there_for_root(name: str) -> None:
    status = os.stat(f"/dev/{name}")
    assert stat.S_ISCHR(status.st_mode)
    os.close(os.open(f"/dev/{name}", os.O_RDWR))


def test_modules_are_loaded() -> None:
    loaded = {line.split()[0] for line in Path("/proc/modules").read_text().splitlines()}
    assert {"cuse", "tpm_vtpm_proxy", "overlay", "loop"} <= loaded


def test_every_folder_of_the_host_is_writable() -> None:
    # What is written here stays in memory: tests/integration/test_lab_command.py looks at the host.
    for folder in (Path("/etc"), Path("/usr/bin"), Path.cwd(), Path("/tmp"), Path("/run")):  # noqa: S108
        file = folder / f"lab-{uuid.uuid4()}"
        file.write_text("x")
        assert file.read_text() == "x"
        file.unlink()


def test_scratch_is_a_share_of_its_own() -> None:
    scratch = Path(os.environ["LAB_SCRATCH"])
    assert os.path.ismount(scratch)
    (scratch / "a").write_bytes(b"content")
    (scratch / "a").rename(scratch / "b")
    assert (scratch / "b").read_bytes() == b"content"
    (scratch / "b").unlink()


def test_shared_memory_terminals_and_random_numbers() -> None:
    Path("/dev/shm/lab").write_text("x")  # noqa: S108
    main, other = os.openpty()
    assert os.isatty(other)
    os.close(main)
    os.close(other)
    assert len(os.getrandom(32, os.GRND_NONBLOCK)) == 32


def test_the_clock_is_counted_by_the_machine_and_not_guessed() -> None:
    source = Path("/sys/devices/system/clocksource/clocksource0/current_clocksource")
    assert source.read_text() == "acpi_pm\n"
