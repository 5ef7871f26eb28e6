"""open, write, read, poll of a managed device: as on the kernel's own /dev/tpmrm0."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import threading
from typing import TYPE_CHECKING

from tests.device.managed import clients, objects_of, opened
from tests.kernel.harness import PTM_GET_CAPABILITY, errno_from
from tests.support import managed as m
from tests.support.commands import code_of, create_primary_rsa, get_random, tpm2
from tests.support.waiting import PATIENCE_SECONDS

if TYPE_CHECKING:
    from tests.support.managed_device import DeviceClient, DeviceWorld


def events(client: DeviceClient) -> int:
    poll = select.poll()
    poll.register(client.fd)
    return dict(poll.poll(0)).get(client.fd, 0)


def test_no_second_command_before_the_answer_was_looked_at(world: DeviceWorld) -> None:
    with world.client() as client:
        client.send(get_random(8))
        assert errno_from(lambda: client.send(get_random(8))) == errno.EBUSY
        assert len(os.read(client.fd, 10)) == 10
        assert len(client.command(get_random(4))) == 16  # the rest is dropped


def test_an_answer_is_read_in_parts(world: DeviceWorld) -> None:
    with world.client() as client:
        client.send(get_random(8))
        parts = [os.read(client.fd, 7) for _ in range(4)]
        assert [len(part) for part in parts] == [7, 7, 6, 0]
        assert code_of(b"".join(parts)) == 0


def test_commands_that_are_not_whole(world: DeviceWorld) -> None:
    with world.client() as client:
        assert errno_from(lambda: os.write(client.fd, get_random(8)[:-1])) == errno.EINVAL
        assert errno_from(lambda: os.write(client.fd, b"\x80\x01\0\0\0")) == errno.EINVAL
        assert errno_from(lambda: os.write(client.fd, bytes(4097))) == errno.E2BIG
        assert len(client.command(get_random(8))) == 20


def test_an_unknown_command(world: DeviceWorld) -> None:
    with world.client() as client:
        assert code_of(client.command(tpm2(0xFFFF, b""))) == 0x000B0143


def test_poll(world: DeviceWorld) -> None:
    with world.client() as client:
        assert events(client) == select.POLLOUT
        client.send(get_random(8))
        assert events(client) == select.POLLIN
        client.response()
        assert events(client) == select.POLLOUT


def test_without_waiting(world: DeviceWorld) -> None:
    while not _reads_before_a_key_is_made(world):
        pass  # that was quicker: once more


def _reads_before_a_key_is_made(world: DeviceWorld) -> bool:
    with world.client() as client:
        os.set_blocking(client.fd, False)
        client.send(create_primary_rsa(unique=os.urandom(8)))
        if not (error := errno_from(client.response)):
            return False
        assert error == errno.EAGAIN
        poll = select.poll()
        poll.register(client.fd, select.POLLIN)
        assert poll.poll(1000 * PATIENCE_SECONDS)
        assert m.handle_of(client.response()) == 0x80000000
        return True


def test_there_are_no_ptm_requests(world: DeviceWorld) -> None:
    with world.client() as client:
        number = PTM_GET_CAPABILITY
        assert errno_from(lambda: fcntl.ioctl(client.fd, number, bytearray(8))) == errno.ENOTTY


def test_one_clients_long_command_and_the_others(world: DeviceWorld) -> None:
    with clients(world, 3) as (slow, other, third), world.raw() as raw:
        slow.send(create_primary_rsa(unique=os.urandom(8)))
        answers: list[bytes] = []
        threads = [
            threading.Thread(target=lambda one=one: answers.append(one.command(get_random(8))))
            for one in (other, third, raw)
        ]
        for thread in threads:
            thread.start()
        assert m.handle_of(slow.response()) == 0x80000000
        for thread in threads:
            thread.join()
        assert [len(answer) for answer in answers] == [20, 20, 20]


def test_a_descriptor_that_two_share_is_one_client(world: DeviceWorld) -> None:
    with world.client() as client:
        copy = os.dup(client.fd)
        key = opened(client, m.load_external(1))
        os.close(copy)
        assert code_of(client.command(m.read_public(key))) == 0
        assert objects_of(client) == [key]


def test_so_many_clients_and_no_more(world: DeviceWorld) -> None:
    with clients(world, 64) as there:
        assert errno_from(lambda: world.client().__exit__()) == errno.EMFILE
        assert all(len(client.command(get_random(8))) == 20 for client in there)
    with world.client() as client:
        assert len(client.command(get_random(8))) == 20
