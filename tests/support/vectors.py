"""Where the C suite's files are (origin: tests/vectors/state/README.md)."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Final

STATE: Final = Path(__file__).parents[1] / "vectors" / "state"

PAYLOADS: Final = {
    "v0.7.1-tpm2-dir-plain/tpm2-00.permall": "258b0ffabbc99a53b612f7ae40c1338637547b51428943ec96a1f7c62ad3d6ea",
    "v0.7.1-tpm2-dir-plain/tpm2-00.volatilestate": "7c887f671e106106982765b52b8445e9493df8d514e4ab75372844812690f3fc",
    "v0.10.2-tpm2-dir-plain/tpm2-00.permall": "278fd79a0de0f1e1dbc3b240ff93fc8cdd18c48fa3d622e7096e7b01d2cced07",
    "v0.10.2-tpm2-dir-plain/tpm2-00.volatilestate": "fbbffa38c23622ae7150f42422a8f2d3ded4d84883b99b07cb1fafb2cd1b9ec1",
    "v0.10.2-tpm12-dir-plain/tpm-00.permall": "2c5482bd40aba762127d0f329929d5d690175987343e9219e515ed6453a89f14",
    "v0.10.2-tpm12-dir-plain/tpm-00.volatilestate": "02d5b418c41033e4591176162bf5476e3e41a17326d14eb01eb27b3263c0a1ce",
    "v0.7.1-tpm12-dir-plain/tpm-00.permall": "2c5482bd40aba762127d0f329929d5d690175987343e9219e515ed6453a89f14",
    "v0.7.1-tpm12-dir-plain/tpm-00.volatilestate": "741ccffc1a742cebd227561cd4de8d44262345f229bd347812e33c42378ee434",
    "v0.10.2-tpm12-savestate/tpm-00.savestate": "9e0f3b1e008e98340740176faf98cf02f9d652e18df7a814d82026c5abc3ff2b",
    "v1-plain/tpm2-00.permall": "278fd79a0de0f1e1dbc3b240ff93fc8cdd18c48fa3d622e7096e7b01d2cced07",
}
"""State files to the SHA-256 of their payload."""

MIGRATION_PAYLOADS: Final = {
    "v0.10.2-tpm2-migr-plain/permanent.blob": "e3dd13aae6fc23f3678570136b13e3a380ddac3203c2ac9d78096a4e5f842523",
    "v0.10.2-tpm2-migr-plain/volatile.blob": "28bfc182fd1fe94827cddf49081aa614d390ec75c168448751f81500ad609ae4",
    "v0.7.1-tpm2-migr-plain/permanent.blob": "2f16263cb599be28b3420c2fd03e6330015bbf83513b3daf5c2d4bd28d1d5e7e",
    "v0.7.1-tpm2-migr-plain/volatile.blob": "605bddeefd74d45ae9d443be776614423ea60672b53e0e698c01d09482099ab0",
}
"""Migration blobs to the SHA-256 of their payload."""


def state_in(directory: Path, vector: str) -> Path:
    """A copy of a state directory that a test may change."""
    copy = directory / vector
    shutil.copytree(STATE / vector, copy)
    return copy
