"""Several processes with nothing good in mind, on a real device: the kernel hands on what it may.

Every operation is drawn by a seed. Which of them meet whom is the scheduler's business; what must
hold at the end is not: the same process serves, answers, and has neither grown nor kept anything.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import signal
import socket
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, Never

import pytest

from tests.fuzz.harness import mutated
from tests.kernel.harness import (
    LIBC,
    PTM_LOCK_STORAGE,
    PTM_SET_STATEBLOB,
    PTM_SHUTDOWN,
    child,
    errno_from,
    needs,
    opened,
    seeded,
    u32,
    wait_child,
)
from tests.kernel.proxy import Proxy
from tests.kernel.test_bad_input import CALLS, ask, reset
from tests.support import commands as tpm
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

    from tests.kernel.conftest import Serve
    from tests.kernel.harness import Server

pytestmark = pytest.mark.usefixtures("warm")

SEED: Final = 20261129
CLIENTS: Final = 3
OPERATIONS: Final = 120
GROWTH_KIB: Final = 16 << 10
CONTENTS: Final = b"what must survive"
COMMANDS: Final = (
    tpm.get_random(16),
    tpm.pcr_read(3),
    tpm.pcr_extend(3, bytes(32)),
    tpm.nv_read(tpm.NV_INDEX, 8),
    tpm.TPM2_STARTUP_CLEAR,
    tpm.TPM2_READ_CLOCK,
)
REQUESTS: Final = tuple({*CALLS} - {PTM_LOCK_STORAGE, PTM_SHUTDOWN, PTM_SET_STATEBLOB})
"""All that neither wait for years nor do lasting harm, which they would rightly do."""


class Client:
    """One process's open of a device, if it has one, and what it does with it next."""

    def __init__(self, paths: tuple[Path, ...], chance: random.Random) -> None:
        self._paths, self._chance = paths, chance
        self._fd = -1
        self._doing: tuple[Callable[[], object], ...] = (
            *(self._write, self._write, self._read, self._read, self._command),
            *(self._request, self._strange_ioctl, self._bad_pointer, self._poll, self._close),
        )

    def run(self, count: int) -> None:
        """So many operations; a timer interrupts those that wait."""
        signal.signal(signal.SIGALRM, _interrupted)
        for _ in range(count):
            with suppress(OSError):
                try:
                    self._operate()
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)

    def _operate(self) -> None:
        if self._fd < 0:
            flags = self._chance.choice((0, os.O_NONBLOCK, os.O_CLOEXEC))
            self._fd = os.open(self._chance.choice(self._paths), os.O_RDWR | flags)
        signal.setitimer(signal.ITIMER_REAL, self._chance.choice((0.001, 0.01, 0.2)))
        self._chance.choice(self._doing)()

    def _write(self) -> None:
        size = self._chance.choice((0, 1, 9, 10, 11, 4095, 4096, 4097, 65536, 70000))
        os.write(self._fd, self._chance.randbytes(size))

    def _command(self) -> None:
        os.write(self._fd, mutated(self._chance, self._chance.choice(COMMANDS)))
        if self._chance.randrange(2):
            os.read(self._fd, 4096)

    def _read(self) -> None:
        os.read(self._fd, self._chance.choice((0, 1, 3, 10, 4096, 4097, 1 << 20)))

    def _request(self) -> None:
        words = (self._chance.choice((0, 1, 2, 3, 255, 3072, 1 << 31)) for _ in range(4))
        number = self._chance.choice(REQUESTS)
        argument = bytearray(u32(*words) + self._chance.randbytes(4096))
        fcntl.ioctl(self._fd, number, argument, True)

    def _strange_ioctl(self) -> None:
        number = self._chance.getrandbits(32)
        if self._chance.randrange(2):  # of the right type, at least
            number = number & 0xFFFF00FF | ord("P") << 8
        if number & 0xFFFF != PTM_SHUTDOWN & 0xFFFF:
            fcntl.ioctl(self._fd, number, bytearray(1 << 14), True)

    def _bad_pointer(self) -> None:
        place = self._chance.choice((0, 1, 0x7FFF_FFFF_F000, (1 << 64) - 8))
        number = self._chance.choice(REQUESTS)
        LIBC.ioctl(self._fd, ctypes.c_ulong(number), ctypes.c_void_p(place))
        LIBC.write(self._fd, ctypes.c_void_p(place), ctypes.c_size_t(12))
        LIBC.read(self._fd, ctypes.c_void_p(place), ctypes.c_size_t(12))

    def _poll(self) -> None:
        poll = select.poll()
        poll.register(self._fd, select.POLLIN | select.POLLOUT)
        poll.poll(self._chance.choice((0, 1)))

    def _close(self) -> None:
        os.close(self._fd)
        self._fd = -1


def _interrupted(_number: int, _frame: object) -> Never:
    raise InterruptedError


def storm(*paths: Path, seed: int = SEED, meanwhile: Callable[[], object] | None = None) -> None:
    """All clients at once, to their ends; *meanwhile* is called again and again."""
    with ExitStack() as stack:
        clients = [Client(paths, seeded(seed + number)) for number in range(CLIENTS)]
        pids = [stack.enter_context(child(partial(one.run, OPERATIONS))) for one in clients]
        ends = [os.pidfd_open(pid) for pid in pids]
        while meanwhile is not None and not select.select(ends, [], [], 0)[0]:
            meanwhile()
        for pid, end in zip(pids, ends, strict=True):
            os.close(end)
            assert wait_child(pid) == 0


def resident_kib(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0])


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


# -- our own devices ---------------------------------------------------------------------------------


def weather(server: Server) -> None:
    """Two storms on a device of ours, and what it is like afterwards."""
    with opened(server.device) as fd:
        assert tpm.code_of(ask(fd, tpm.nv_define(tpm.NV_INDEX, len(CONTENTS)))) == 0
        assert tpm.code_of(ask(fd, tpm.nv_write(tpm.NV_INDEX, CONTENTS))) == 0
    pid = server.pid
    storm(server.device)  # memory is at its level now
    level, held = resident_kib(pid), descriptors(pid)
    storm(server.device, seed=SEED + 100)
    with opened(server.device) as fd:
        reset(fd)
        assert tpm.code_of(ask(fd, tpm.get_random(8))) == 0
        assert tpm.nv_data(ask(fd, tpm.nv_read(tpm.NV_INDEX, len(CONTENTS)))) == CONTENTS
    # A file that was replaced is closed beside the work, before the one figure or behind the other.
    wait_until(lambda: descriptors(pid) <= held, "no descriptor is left")
    assert resident_kib(pid) - level < GROWTH_KIB
    assert server.pid == pid
    assert "Traceback" not in server.said, server.said[-3000:]


def test_cuse_device_under_a_storm(serve: Serve) -> None:
    server = serve("vtpmstorm").start()
    weather(server)
    wait_until(lambda: server.waiting() == 0, "nothing waits for an answer")


# -- the vTPM proxy -----------------------------------------------------------------------


@pytest.fixture
def proxy(tmp_path: Path) -> Proxy:
    error = errno_from(lambda: os.close(os.open("/dev/vtpmx", os.O_RDWR)))
    needs(not error, f"/dev/vtpmx: {os.strerror(error)}; run kernel-helpers/lab -- ...")
    return Proxy(tmp_path)


def test_proxy_devices_under_a_storm(proxy: Proxy) -> None:
    """Both devices; the server is stopped and goes on, and hears nonsense on its control channel."""
    chance = seeded(SEED)
    with proxy:
        pid = proxy.process.pid

        def pester() -> None:
            proxy.process.send_signal(chance.choice((signal.SIGSTOP, signal.SIGCONT)))
            with socket.socket(socket.AF_UNIX) as control, suppress(OSError):
                control.settimeout(0.01)
                control.connect(str(proxy.control))
                control.send(b"\xff" + chance.randbytes(chance.randrange(1, 40)))
            proxy.process.send_signal(signal.SIGCONT)

        storm(proxy.device, proxy.shared, meanwhile=pester)
        level, held = resident_kib(pid), descriptors(pid)
        storm(proxy.device, proxy.shared, seed=SEED + 100, meanwhile=pester)
        wait_until(lambda: descriptors(pid) <= held, "no connection is left")
        assert resident_kib(pid) - level < GROWTH_KIB
        with opened(proxy.shared) as fd:
            assert tpm.code_of(ask(fd, tpm.get_random(8))) == 0
        assert proxy.end() == 0


def test_a_server_that_dies_in_a_storm_takes_its_devices_along(proxy: Proxy) -> None:
    """Clients are not left waiting; another server can have the state."""
    with proxy:
        killed = False

        def kill() -> None:
            nonlocal killed
            if not killed:
                proxy.process.kill()
                killed = True

        storm(proxy.device, proxy.shared, meanwhile=kill)
        assert killed
        assert proxy.ended() == -signal.SIGKILL
    with Proxy(proxy.folder) as second, opened(second.shared) as fd:
        assert tpm.code_of(ask(fd, tpm.get_random(8))) == 0
