"""`--managed ...,per-process`: what a process leaves is there when it comes again, for it alone."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from tests.integration.test_managed_sockets import Managed
from tests.kernel.harness import child, needs, run, wait_child
from tests.support import managed as m
from tests.support import sockets as s
from tests.support.commands import code_of, create_primary_rsa
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NO_OBJECT: Final = 0xB0910
PYTSS: Final = Path("/usr/lib/python3/dist-packages/tpm2_pytss")
MANY_OF_PYTSS: Final = """
import sys
from tpm2_pytss import ESAPI, ESYS_TR, TPM2_ALG, TPM2_SE, TPMT_SYM_DEF
with ESAPI(sys.argv[1]) as tpm:
    keys = [tpm.create_primary(None, "ecc")[0] for _ in range(5)]
    kind = dict(session_type=TPM2_SE.POLICY, symmetric=TPMT_SYM_DEF(algorithm=TPM2_ALG.NULL))
    who = dict(tpm_key=ESYS_TR.NONE, bind=ESYS_TR.NONE, auth_hash=TPM2_ALG.SHA256)
    sessions = [tpm.start_auth_session(**who, **kind) for _ in range(5)]
    assert len({bytes(tpm.read_public(key)[0].publicArea.unique.ecc.x) for key in keys}) == 1
    assert {len(bytes(tpm.policy_get_digest(session))) for session in sessions} == {32}
    print("all there")
"""


@pytest.fixture
def world(tmp_path: Path) -> Iterator[Managed]:
    with Managed(tmp_path, *s.RUNNING, more=",per-process") as found:
        yield found


def ask(world: Managed, command: bytes) -> bytes:
    """On a connection of its own, as tpm2-tss' TCTI for the C suite does."""
    with world.client() as client:
        return client.command(command)


def code(world: Managed, command: bytes) -> int:
    return code_of(ask(world, command))


def in_child(body: Callable[[], None]) -> None:
    with child(body) as pid:
        assert wait_child(pid) == 0


def test_what_a_process_left_is_its_own(world: Managed) -> None:
    keys = [m.handle_of(ask(world, m.load_external(number))) for number in range(5)]
    session = m.handle_of(ask(world, m.start_session()))
    public = ask(world, m.read_public(keys[0]))

    def elsewhere() -> None:
        for handle in keys:
            assert code(world, m.read_public(handle)) == NO_OBJECT
            assert code(world, m.flush(handle)) == 0xB01CB
        assert code(world, m.policy_digest(session)) == NO_OBJECT
        assert code(world, m.flush(session)) == 0xB01CB
        assert m.listed(ask(world, m.list_handles(0x80000000))) == []
        for number in range(9):
            m.handle_of(ask(world, m.load_external(number)))

    in_child(elsewhere)
    with world.client() as open_meanwhile:
        in_child(lambda: expect(open_meanwhile.command(m.read_public(keys[0])), public))
    assert m.listed(ask(world, m.list_handles(0x80000000))) == keys
    assert code(world, m.policy_digest(session)) == 0


def expect(found: bytes, expected: bytes) -> None:
    assert found == expected


def test_it_ends_with_the_process(world: Managed) -> None:
    left, wait = os.pipe(), os.pipe()

    def leave() -> None:
        for number in range(2):
            m.handle_of(ask(world, m.load_external(number)))
        m.handle_of(ask(world, m.start_session()))
        os.write(left[1], b"x")
        os.read(wait[0], 1)

    with child(leave), world.client() as other:
        assert os.read(left[0], 1)
        for _ in range(3):  # its last connection has been closed, and that seen
            assert code_of(other.command(m.list_handles(0x80000000))) == 0
    with world.raw() as raw:
        for first in (0x80000000, 0x02000000, 0x03000000):
            wait_until(
                lambda first=first: not m.listed(raw.command(m.list_handles(first))),  # type: ignore[misc]
                "nothing is left",
            )


def test_as_another_user_it_is_another(world: Managed, tmp_path: Path) -> None:
    needs(os.geteuid() == 0, "it takes root to be several users")
    tmp_path.chmod(0o755)
    world.managed_address.chmod(0o777)

    def change() -> None:
        os.chdir(tmp_path)
        world.managed_address = Path(world.managed_address.name)
        handle = m.handle_of(ask(world, m.load_external(1)))
        for become in (os.setegid, os.seteuid):
            become(65534)
            assert code(world, m.read_public(handle)) == NO_OBJECT
            become(0)
            assert code(world, m.read_public(handle)) == 0

    in_child(change)


def test_who_is_away_has_a_place(tmp_path: Path) -> None:
    limits = ("--managed-limits", "clients-of-a-user=2")
    with Managed(tmp_path, *s.RUNNING, *limits, more=",per-process") as world:
        ready, go_on = os.pipe(), os.pipe()

        def stay() -> None:
            handle = m.handle_of(ask(world, m.load_external(1)))
            os.write(ready[1], b"x")
            os.read(go_on[0], 1)
            assert code(world, m.read_public(handle)) == 0

        with child(stay) as first, child(stay) as second:
            for _ in (first, second):
                assert os.read(ready[0], 1)
            with world.client() as late:
                assert late.ended()
            os.write(go_on[1], b"xx")
            assert (wait_child(first), wait_child(second)) == (0, 0)

        def has_room() -> bool:
            with world.client() as late:
                late.send(m.list_handles(0x80000000))
                return not late.ended()

        wait_until(has_room, "those who have ended have no place")


def test_who_left_in_mid_command_has_its_place(tmp_path: Path) -> None:
    """At its user's limit."""
    limits = ("--managed-limits", "clients-of-a-user=1")
    with Managed(tmp_path, *s.RUNNING, *limits, more=",per-process") as world:
        with world.client() as client:
            handle = m.handle_of(client.command(m.load_external(1)))
            client.send(create_primary_rsa(unique=os.urandom(8)))
            wait_until(lambda: s.is_read(client.socket), "the server has the command")
        assert code(world, m.read_public(handle)) == 0


def test_programs_that_connect_anew_for_each_command(world: Managed) -> None:
    needs(shutil.which("tpm2_sign") is not None, "tpm2-tools are missing")
    address = world.managed_address
    address.with_name("managed.ctrl").symlink_to(str(world.control_address))
    tcti, folder = f"swtpm:path={address}", address.parent
    env = {"TPM2TOOLS_TCTI": tcti}

    def tool(name: str, *words: str | Path) -> None:
        run(f"tpm2_{name}", *words, env=env, cwd=folder)

    (folder / "message").write_text("one message")
    tool("createprimary", "-Q", "-C", "o", "-G", "ecc", "-c", "primary")
    tool("create", "-Q", "-C", "primary", "-G", "ecc", "-u", "u", "-r", "r", "-c", "key")
    tool("sign", "-Q", "-c", "key", "-g", "sha256", "-o", "signature", "message")
    verify = ("-c", "key", "-g", "sha256", "-m", "message", "-s", "signature")
    tool("verifysignature", "-Q", *verify)
    if PYTSS.exists():
        for where in (tcti, world.tcti()):
            assert run("/usr/bin/python3", "-c", MANY_OF_PYTSS, where).stdout == "all there\n"


def test_programs_of_ibm_tss2_on_a_port(tmp_path: Path) -> None:
    """They stay connected, and so need no more than a managed socket."""
    needs(shutil.which("tsscreateprimary") is not None, "tss2 is missing")
    with s.listener() as listening:
        fd, port = listening.fileno(), listening.getsockname()[1]
        words = (*s.RUNNING, "--managed", f"type=tcp,fd={fd}")
        running = s.Server(tmp_path, *words, pass_fds=[fd])
    env = {
        "TPM_INTERFACE_TYPE": "socsim",
        "TPM_SERVER_TYPE": "raw",
        "TPM_SERVER_NAME": "127.0.0.1",
        "TPM_COMMAND_PORT": str(port),
        "TPM_DATA_DIR": str(tmp_path),
    }
    with running:
        for _ in range(4):
            made = run("tsscreateprimary", "-hi", "o", "-ecc", "nistp256", env=env)
            assert "Handle 80000000" in made.stdout
            assert "Handle" in run("tssstartauthsession", "-se", "p", env=env).stdout
