"""tpm2-tools on the TPM in a FUSE mount, by a user who is not root."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.device.tpm2_tools import *  # noqa: F403
from tests.kernel.harness import Done, Server, servers
from tests.support.fuse import FuseServer, User, needs_fuse, ordinary_user

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture(scope="module")
def user() -> Iterator[User]:
    needs_fuse()
    with ordinary_user() as user:
        yield user


@pytest.fixture(scope="module")
def make(user: User) -> Iterator[Callable[..., Server]]:
    class UsersServer(FuseServer):
        def run(self, *argv: str | Path, **settings: Any) -> Done:  # noqa: ANN401
            return user.run(*argv, **settings)

    yield from servers(user.folder, UsersServer)


@pytest.fixture(scope="module")
def server(make: Callable[..., Server]) -> Server:
    return make("vtpm0").start()


@pytest.fixture
def serve(make: Callable[..., Server]) -> Iterator[Callable[..., Server]]:
    """As many as a test wants; they end with it."""
    made: list[Server] = []

    def one(*arguments: Any, **settings: Any) -> Server:  # noqa: ANN401
        made.append(make(*arguments, **settings))
        return made[-1]

    yield one
    for server in made:
        server.end()
        server.permall.unlink(missing_ok=True)


@pytest.fixture
def folder(user: User, tmp_path: Path) -> Path:
    mine = user.folder / tmp_path.name
    mine.mkdir()
    user.own(mine)
    return mine
