"""The processes that make devices for a manager: what they may do, and their deaths."""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio

from tests.support.files import open_descriptors
from tests.support.waiting import wait_until
from vtpm_cuse.acquire import chardev
from vtpm_cuse.errors import FrontendError
from vtpm_cuse.fleet import opener as openers
from vtpm_cuse.fleet.heritage import SavedOpener
from vtpm_cuse.fleet.messages import Message, Order, Report
from vtpm_cuse.fleet.opener import Opener, Wanted
from vtpm_cuse.wire.layout import HOST
from vtpm_cuse.wire.vtpmx import VTPM_PROXY_FLAG_TPM2, VTPM_PROXY_IOC_NEW_DEV, VtpmProxyNewDev

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


CAP_CHOWN, CAP_SYS_ADMIN = 0, 21
REFUSED = Wanted("tpm0", 0, 0, 0)


def worker_of(opener: Opener) -> int:
    """The one of the two that works, once it is there."""
    children = Path(f"/proc/{opener._child}/task/{opener._child}/children")
    wait_until(lambda: children.read_text(encoding="ascii").split() != [], "one that works")
    return int(children.read_text(encoding="ascii"))


def is_gone(pid: int) -> bool:
    return not os.path.exists(f"/proc/{pid}")


def with_opener(use: Callable[[Opener], Awaitable[None]]) -> None:
    """One that is root's, or would be."""
    with Opener("/nonexistent", own=False) as opener:
        pids = opener._child, worker_of(opener)
        trio.run(use, opener)
    wait_until(lambda: all(map(is_gone, pids)), "the end of both")


def test_an_opener_has_no_more_rights_than_it_takes() -> None:
    async def use(opener: Opener) -> None:
        for name in ("tpm0", "vtpm0", "vtpmd-a/b", "vtpmd-", "vtpmd-" + 65 * "a", "vtpmdrm-a\n"):
            with pytest.raises(FrontendError, match="is not called"):
                await opener.make(Wanted(name, 0, 0, 0))
        for pid in (opener._child, worker_of(opener)):
            status = dict(line.split(":\t", 1) for line in _status(pid))
            rights = [int(status[kind], 16) for kind in ("CapEff", "CapPrm", "CapInh", "CapBnd")]
            most = 1 << CAP_CHOWN | 1 << CAP_SYS_ADMIN
            assert [one & ~most for one in rights[:3]] == [0, 0, 0]
            if os.geteuid() == 0:
                assert rights[0] & 1 << CAP_CHOWN
                assert rights[3] == 0
            assert status["NoNewPrivs"] == "1"

    with_opener(use)


def test_what_a_killed_manager_has_asked_is_no_answer_to_the_next() -> None:
    """It would have one TPM's clients at another TPM."""
    ours, end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs, mine = os.memfd_create("theirs"), os.memfd_create("mine")
    with end, contextlib.closing(open(theirs, "rb")), contextlib.closing(open(mine, "rb")):

        def answer(number: int, fd: int) -> None:
            message = Message(Report.DONE, number=number, descriptors=(fd,))
            socket.send_fds(end, [message.pack()], message.descriptors)

        for number in range(4):
            answer(number, theirs)
        opener = Opener("", own=True, left=SavedOpener(0, ours.detach()))

        async def ask() -> int:
            found: list[int] = []

            async def mount() -> None:
                found.append(await opener.mount("/nowhere"))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(mount)
                await trio.lowlevel.wait_readable(end)
                answer(openers._request(end.recv(4096)).number, mine)
            return found[0]

        with opener:
            opener.shared()
            fd = trio.run(ask)
        assert os.path.samestat(os.fstat(fd), os.fstat(mine))
        os.close(fd)


def test_of_a_killed_managers_opener_only_one_that_lives_is_used() -> None:
    with Opener("/nonexistent", own=True) as fresh:
        ours, end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        end.close()
        assert Opener.behind(SavedOpener(0, ours.detach()), fresh) is fresh
        ours, end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with end, Opener.behind(SavedOpener(0, ours.detach()), fresh) as used:
            used.shared()
            assert used is not fresh
            assert is_gone(fresh._child)


def _status(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()


def test_a_dead_one_has_a_successor() -> None:
    async def use(opener: Opener) -> None:
        for _ in range(3):
            dead = worker_of(opener)
            os.kill(dead, signal.SIGKILL)  # and asked at once: it may be a zombie yet
            with pytest.raises(FrontendError, match="is not called"):
                await opener.make(REFUSED)
            assert worker_of(opener) != dead

    with_opener(use)


def test_a_manager_that_ends_without_its_answer_is_no_reason_to_stay() -> None:
    with Opener("/nonexistent", own=False) as opener:
        works = worker_of(opener)
        os.kill(works, signal.SIGSTOP)
        opener._ours.send(Message(Order.OPEN, json.dumps(REFUSED).encode()).pack())
        opener._ours.close()
        os.kill(works, signal.SIGCONT)
        wait_until(lambda: os.waitpid(opener._child, os.WNOHANG) != (0, 0), "their end")
        assert is_gone(works)


def test_when_both_are_dead_that_is_said() -> None:
    async def use(opener: Opener) -> None:
        for pid in (opener._child, worker_of(opener)):
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(FrontendError, match="restart vtpmd"):
            await opener.make(REFUSED)

    with_opener(use)


def test_what_one_has_died_of_the_next_one_does_and_what_two_have_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answer = openers._Devices.answer
    with mmap.mmap(-1, 1) as deaths:  # which all of these processes share

        def dying(request: Message) -> Message:
            if deaths[0]:
                deaths[0] -= 1
                os.kill(os.getpid(), signal.SIGKILL)
            return answer(request)

        async def use(opener: Opener) -> None:
            for times, said in ((1, "is not called"), (2, "killed twice"), (0, "is not called")):
                deaths[0] = times
                with pytest.raises(FrontendError, match=said):
                    await opener.make(REFUSED)

        monkeypatch.setattr(openers._Devices, "answer", staticmethod(dying))
        with_opener(use)


def test_an_answer_that_comes_twice_is_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who dies behind an answer has not taken the request out of the socket."""
    send = socket.send_fds

    def send_twice(end: socket.socket, data: list[bytes], fds: tuple[int, ...]) -> int:
        send(end, data, fds)
        return send(end, data, fds)

    async def use(opener: Opener) -> None:
        begun = open_descriptors()
        for _ in range(3):
            made = await opener.make_proxy()
            assert made.number == 3
            os.close(made.fd)
            with pytest.raises(FrontendError, match="is not called"):
                await opener.make(REFUSED)
        assert open_descriptors() <= begun

    monkeypatch.setattr(socket, "send_fds", send_twice)
    monkeypatch.setattr(openers, "_make_proxy", lambda: openers.Made(os.open("/dev/null", 2), 3))
    with_opener(use)


def test_the_kernel_is_asked_for_a_tpm_2(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "vtpmx").touch()
    monkeypatch.setattr(chardev, "VTPMX_PATH", str(tmp_path / "vtpmx"))
    seen: list[int] = []

    def ioctl(_fd: int, number: int, argument: bytearray, _mutate: bool) -> int:
        seen.extend((number, VtpmProxyNewDev.unpack_untrusted(argument, HOST).flags))
        argument[:] = VtpmProxyNewDev(1, 7, os.open("/dev/null", os.O_RDWR), 10, 224).pack(HOST)
        return 0

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    made = openers._make_proxy()
    assert seen == [VTPM_PROXY_IOC_NEW_DEV, VTPM_PROXY_FLAG_TPM2]
    assert made.number == 7
    assert not os.get_inheritable(made.fd)
    os.close(made.fd)
    (tmp_path / "vtpmx").unlink()
    with pytest.raises(FrontendError, match="Could not open"):
        openers._make_proxy()


def test_a_node_becomes_its_owners_alone_whoever_had_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """udev gives the nodes of TPMs to a group."""
    done: list[tuple[object, ...]] = []

    class Node:
        st_mode, st_uid, st_rdev = 0o20660, 113, os.makedev(253, 65536 + 7)

    with monkeypatch.context() as patch:
        patch.setattr(os, "lstat", lambda _: Node)
        patch.setattr(os, "chown", lambda *one, **_: done.append(("chown", *one)))
        patch.setattr(os, "chmod", lambda *one: done.append(("chmod", *one)))
        openers._give_proxy(7, 4242)
        with pytest.raises(FrontendError, match="something else"):
            openers._give_proxy(8, 4242)
    assert done[:6] == [
        step
        for node in ("/dev/tpm7", "/dev/tpmrm7")
        for step in (
            *(("chown", node, 0, 0), ("chmod", node, 0o600)),
            ("chown", node, 4242, -1),
        )
    ]
