"""A key that the manager is given, and keeps nowhere."""

from __future__ import annotations

import os
from base64 import b64encode
from typing import TYPE_CHECKING

import pytest

from tests.support import commands as tpm
from tests.support.fake_fleet import OTHER_USER, FakeFleet, with_manager
from tests.support.fleet import UID, Client, fleet, in_trio
from vtpm_cuse.config import KeySource, Secret
from vtpm_cuse.errors import FleetError, VarlinkError
from vtpm_cuse.fleet.base import Spec
from vtpm_cuse.fleet.manager import api
from vtpm_cuse.wire.manager import Key

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from vtpm_cuse.client.manager import Manager


def texts(folder: Path) -> list[bytes]:
    """All that was written below it."""
    return [path.read_bytes() for path in folder.rglob("*") if path.is_file()]


@in_trio
async def test_a_key_that_is_given_is_kept_nowhere(tmp_path: Path) -> None:
    secret, mode = Secret(os.urandom(32)), KeySource(mode="aes-256-cbc")
    async with fleet(tmp_path) as manager:
        await manager.create(Spec("plain", UID))
        attempts: dict[str, Callable[[], Awaitable[object]]] = {
            "kept nowhere": lambda: manager.create(Spec("one", UID, key=mode)),
            "has 5 bytes": lambda: manager.create(Spec("one", UID, key=mode), Secret(b"short")),
            "not encrypted": lambda: manager.start("plain", secret),
        }
        for said, attempt in attempts.items():
            with pytest.raises(FleetError, match=said) as refused:
                await attempt()
            assert refused.value.fault == "KeyRejected"
        assert (await manager.create(Spec("one", UID, key=mode), secret)).encrypted
    assert not any(
        secret.value in text or secret.value.hex().encode() in text for text in texts(tmp_path)
    )
    async with fleet(tmp_path) as manager:
        for wrong, said in ((None, "--key fd=N"), (Secret(bytes(32)), "HMAC")):
            with pytest.raises(FleetError, match=said) as refused:
                await manager.start("one", wrong)
            assert refused.value.fault == "KeyRejected"
        client = await Client.of(await manager.start("one", secret))
        assert tpm.code_of(await client.ask(tpm.get_random(8))) == 0
        await manager.hibernate("one")
        assert tpm.code_of(await client.ask(tpm.get_random(8))) == 0


def test_another_user_has_a_key_of_his_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which the manager reads nowhere."""
    fake = FakeFleet()
    monkeypatch.setattr(api, "_asker", lambda _: api._Asker(OTHER_USER, 1))
    secret = os.urandom(16)
    key = Key(secret=b64encode(secret).decode())

    def use(manager: Manager) -> None:
        manager.create("mine", key=key)
        manager.start("mine", key=key)
        assert fake.secrets == [secret] * 2
        for wrong in (
            *(key._replace(file="/etc/shadow"), Key(file="/etc/shadow"), Key()),
            Key(secret="?"),  # noqa: S106
        ):
            with pytest.raises(VarlinkError, match="InvalidParameter"):
                manager.start("mine", key=wrong)
        with pytest.raises(VarlinkError, match="InvalidParameter"):
            manager.create("two", key=key._replace(file="/etc/shadow"))
        assert len(fake.secrets) == 2

    with_manager(fake, tmp_path / "manager", use)
