"""TPMs of a manager that containers may ask for: their documents."""

from __future__ import annotations

import json
import os
import re
import signal
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.fleet import UID, fleet, in_trio, started, until
from tests.support.fleet_devices import fake_opener
from vtpm_cuse.containers import cdi
from vtpm_cuse.errors import FrontendError
from vtpm_cuse.fleet.base import Spec
from vtpm_cuse.fleet.states.catalogue import Catalogue

if TYPE_CHECKING:
    from pathlib import Path

    from vtpm_cuse.fleet.base import Offer

_NAME = re.compile("[A-Za-z0-9]([A-Za-z0-9_.:-]*[A-Za-z0-9])?")
"""Of a device, by the specification."""


def documents(folder: Path) -> dict[str, Any]:
    return {path.name: json.loads(path.read_text()) for path in (folder / "cdi").glob("*")}


def spec(name: str = "one", offer: Offer = "keep", owner: int = UID) -> Spec:
    return Spec(name, owner, interface="cuse", cdi=offer)


@in_trio
async def test_it_is_offered_while_its_devices_are_there(tmp_path: Path) -> None:
    with fake_opener() as opener:
        async with fleet(tmp_path, opener, cdi=str(tmp_path / "cdi")) as manager:
            tpm = await manager.create(spec())
            assert documents(tmp_path) == {}
            await manager.start("one")
            written = documents(tmp_path)
            name, rootless = (
                f"vtpm-cuse.org-{kind}_{tpm.id}.json" for kind in ("vtpm", "rootless")
            )
            assert {*written} == {name, rootless}
            document = written[name]
            names = [device["name"] for device in written[rootless]["devices"]]
            assert (written[rootless]["kind"], names) == ("vtpm-cuse.org/rootless", ["one", tpm.id])
            assert {(*one["containerEdits"],) for one in written[rootless]["devices"]} == {
                ("mounts",)
            }
            assert {(*document,)} == {("cdiVersion", "kind", "devices")}
            assert (document["cdiVersion"], document["kind"]) == ("0.5.0", "vtpm-cuse.org/vtpm")
            assert [device["name"] for device in document["devices"]] == ["one", tpm.id]
            assert all(_NAME.fullmatch(device["name"]) for device in document["devices"])
            for device in document["devices"]:
                assert device["containerEdits"] == {
                    "deviceNodes": [
                        {
                            "path": inside,
                            "hostPath": path,
                            "permissions": "rw",
                            "fileMode": 0o600,
                            "uid": UID,
                            "gid": 0,
                        }
                        for inside, path in (
                            ("/dev/tpm0", "/dev/vtpmd-one"),
                            ("/dev/tpmrm0", "/dev/vtpmdrm-one"),
                        )
                    ]
                }
            status = (tmp_path / "cdi" / name).stat()
            assert status.st_mode & 0o777 == 0o644
            await manager.hibernate("one")
            pid = (await manager.wake("one")).pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            await until(manager, "one", "failed")
            assert documents(tmp_path) == written
            await manager.stop("one")
            assert documents(tmp_path) == {}
            await manager.update("one", new_name="two")
            await manager.start("two")
            assert documents(tmp_path)[name]["devices"][0]["name"] == "two"
            await manager.remove("two", force=True)
            assert documents(tmp_path) == {}


@in_trio
async def test_it_is_offered_otherwise_at_once_and_not_by_a_dead_manager(tmp_path: Path) -> None:
    with fake_opener() as opener:
        async with fleet(tmp_path, opener, cdi=str(tmp_path / "cdi")) as manager:
            await started(manager, "one", interface="cuse")
            assert documents(tmp_path) == {}
            assert (await manager.update("one", cdi="keep")).cdi == "keep"
            assert len(documents(tmp_path)) == 2
            tpm = await manager.update("one", cdi="remove")
            written = documents(tmp_path)
            (hook, *_) = hooks = [
                hook
                for document in written.values()
                for device in document["devices"]
                for hook in device["containerEdits"]["hooks"]
            ]
            assert hooks == [hook] * 4
            assert hook["hookName"] == "poststop"
            assert os.access(hook["path"], os.X_OK)
            socket = str(tmp_path / "run/manager.sock")
            assert hook["args"] == [hook["path"], "rm", "--force", "--socket", socket, tpm.id]
            await manager.update("one", cdi="off")
            assert documents(tmp_path) == {}
            await manager.update("one", cdi="keep")
            off = await manager.create(spec("off", "off"))
    assert documents(tmp_path) == {}
    # As a manager that is killed leaves them, also while it ends an offer.
    left = [cdi.file_name(one.id, kind) for one in (tpm, off) for kind in (cdi.KIND, cdi.ROOTLESS)]
    for name in (*left, "other.json"):
        (tmp_path / "cdi" / name).write_text("{}")
    with fake_opener() as opener:
        async with fleet(tmp_path, opener, cdi=str(tmp_path / "cdi")) as manager:
            assert documents(tmp_path) == {"other.json": {}}
            assert (await manager.describe("one")).cdi == "keep"
            assert (await manager.clone("one", "two")).cdi == "off"


@in_trio
async def test_what_cannot_be_offered(tmp_path: Path) -> None:
    with fake_opener() as opener:
        async with fleet(tmp_path, opener) as manager:
            with pytest.raises(FrontendError, match="start it with --cdi DIR"):
                await manager.create(spec())
        (tmp_path / "cdi").write_text("no folder")
        async with fleet(tmp_path, opener, cdi=str(tmp_path / "cdi")) as manager:
            with pytest.raises(FrontendError, match="make it with --interface cuse"):
                await manager.create(Spec("one", UID, cdi="keep"))
            await started(manager, "two")
            with pytest.raises(FrontendError, match="make it with --interface cuse"):
                await manager.update("two", cdi="keep")
            await manager.create(spec("three"))
            with pytest.raises(FrontendError, match=r"cannot be offered to containers: .*cdi"):
                await manager.start("three")
            assert (await manager.describe("three")).state == "stopped"
            assert opener.gone("vtpmd-three")


def test_a_file_is_mounted_where_a_device_is_made() -> None:
    found = cdi.document(("one",), ("/m/vtpm0", "/m/vtpmrm0"), 7, nodes=False)
    (device,) = found["devices"]
    assert device["containerEdits"] == {
        "mounts": [
            {"hostPath": path, "containerPath": inside, "options": ["bind", "rw", "nosuid"]}
            for path, inside in (("/m/vtpm0", "/dev/tpm0"), ("/m/vtpmrm0", "/dev/tpmrm0"))
        ]
    }


def test_an_offer_that_is_none_is_no_entry(tmp_path: Path) -> None:
    """As others that are damaged: the TPM is there, and is not offered."""
    catalogue = Catalogue(str(tmp_path))
    try:
        (tmp_path / "one/state").mkdir(parents=True)
        kept = {"id": "0" * 32, "owner": UID, "profile": None, "manufactured": False}
        text = json.dumps({**kept, "labels": [], "cdi": "everybody"})
        (tmp_path / "one/tpm.json").write_text(text)
        assert catalogue.entries()["one"].cdi == "off"
        assert (tmp_path / "one/tpm.json.damaged").exists()
    finally:
        catalogue.close()
