"""A TPM outside of a manager: what is no archive of one, and who imports one for whom."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final

import pytest

from tests.support.fake_fleet import OTHER_USER, FakeFleet, with_manager
from vtpm_cuse.errors import FleetError, VarlinkError
from vtpm_cuse.fleet.manager import api
from vtpm_cuse.fleet.states.archives import STATE_MAX
from vtpm_cuse.wire.manager import Archive, Key

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from vtpm_cuse.client.manager import Manager

ARCHIVE: Final = Archive(
    *("vtpm-cuse TPM", 1, "6c1dd2ba-9d67-4fb1-8f4c-9a5a35d6e9f4", "web1", False, {"vm": "7"}),
    "c3RhdGU=",
)


@pytest.fixture
def fleet() -> FakeFleet:
    return FakeFleet()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "manager.sock"


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"format": "tar"}, "StateDamaged"),
        ({"version": 2}, "StateDamaged"),
        ({"id": "../../etc"}, "StateDamaged"),
        ({"id": ARCHIVE.id.upper()}, "StateDamaged"),
        ({"id": f"{{{ARCHIVE.id}}}"}, "StateDamaged"),
        ({"permall": "c3RhdGU"}, "StateDamaged"),
        ({"permall": "c3Rh dGU="}, "StateDamaged"),
        ({"permall": "ä"}, "StateDamaged"),
        ({"permall": "AAAA" * (STATE_MAX // 3 + 1)}, "OverLimit"),
    ],
)
def test_an_archive_that_is_none_is_refused(
    fleet: FakeFleet, path: Path, change: dict[str, Any], fault: str
) -> None:
    def use(manager: Manager) -> None:
        with pytest.raises(FleetError) as refused:
            manager.import_tpm(ARCHIVE._replace(**change))
        assert refused.value.fault == fault
        assert fleet.bundles == []
        assert manager.import_tpm(ARCHIVE, name="web2").labels == {"vm": "7"}

    with_manager(fleet, path, use)


def test_what_is_exported_can_be_imported_and_is_never_logged(
    fleet: FakeFleet, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    fleet.add("web1")
    fleet.state = bytes(STATE_MAX)

    def use(manager: Manager) -> None:
        archive = manager.export("web1")
        assert manager.import_tpm(archive, name="web2").name == "web2"
        assert fleet.bundles.pop().state == fleet.state
        assert archive.permall[:99] not in caplog.text
        assert "Import of 'web2'" in caplog.text
        fleet.state += b"x"
        with pytest.raises(FleetError, match="more than"):
            manager.export("web1")

    with_manager(fleet, path, use)


def test_another_user_imports_for_himself_and_names_no_file(
    fleet: FakeFleet, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "_asker", lambda _: api._Asker(OTHER_USER, 1))

    def use(manager: Manager) -> None:
        for more in ({"owner": OTHER_USER + 1}, {"key": Key(file="/etc/shadow")}):
            with pytest.raises(FleetError) as refused:
                manager.import_tpm(ARCHIVE, **more)
            assert refused.value.fault == "NotOwner"
        assert fleet.bundles == []
        assert manager.import_tpm(ARCHIVE).owner == OTHER_USER
        with pytest.raises(VarlinkError, match="InvalidParameter"):
            manager.import_tpm(ARCHIVE, name="web2", interface="usb")
        manager.import_tpm(ARCHIVE, name="web2", interface="cuse")
        assert [one.spec.interface for one in fleet.bundles] == ["socket", "cuse"]

    with_manager(fleet, path, use)


def test_another_user_makes_no_tpm_of_the_kernels(
    fleet: FakeFleet, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of the host would see it; one that root has made for him is his."""
    monkeypatch.setattr(api, "_asker", lambda _: api._Asker(OTHER_USER, 1))

    def use(manager: Manager) -> None:
        kind = "vtpm-proxy"
        fleet.tpms["theirs"] = fleet.add("theirs")._replace(interface="vtpm-proxy")
        attempts: tuple[Callable[[], object], ...] = (
            lambda: manager.create("one", interface=kind),
            lambda: manager.import_tpm(ARCHIVE, interface=kind),
            lambda: manager.clone("theirs", "another"),
        )
        for attempt in attempts:
            with pytest.raises(FleetError, match="made for a user by root") as refused:
                attempt()
            assert refused.value.fault == "NotOwner"
        assert manager.start("theirs").state == "asleep"

    with_manager(fleet, path, use)
