"""The texts of the print options, byte for byte those of the C suite on the same libtpms."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.differential.servers import OURS, PEER
from tests.differential.test_differential import pytestmark as needs_peer

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = needs_peer

LATER = (
    *("tpmstate-dir-backend-opt-backup", "tpmstate-dir-backend-opt-fsync"),
    *("cmdarg-pcap", "systemd-notify"),
)
"""What --print-capabilities promises of the C suite's next version."""

TEXTS = [
    *(
        [option, *version]
        for option in ("--print-capabilities", "--print-profiles")
        for version in ([], ["--tpm2"])
    ),
    *(
        ["--print-info", flags, *version]
        for flags in ("1", "0x2", "4", "7", "8", "0x10", "0x20", "0x40", "0x80", "0xff", "256")
        for version in ([], ["--tpm2"])
    ),
]


def text(program: str, *words: str | Path) -> tuple[int, str]:
    run = subprocess.run(
        [program, "socket", *words], check=False, stdout=subprocess.PIPE, text=True
    )
    return run.returncode, run.stdout


@pytest.mark.parametrize("words", TEXTS, ids=" ".join)
def test_same_text(words: list[str]) -> None:
    status, ours = text(OURS, *words)
    for verb in LATER:
        ours = ours.replace(f', "{verb}"', "")
    assert (status, ours) == text(PEER, *words)


@pytest.mark.parametrize("version", [["--tpm2"], []], ids=["TPM 2", "TPM 1.2"])
def test_same_states(tmp_path: Path, version: list[str]) -> None:
    where = ["--tpmstate", f"dir={tmp_path}", *version]
    assert text(OURS, *where, "--print-states") == text(PEER, *where, "--print-states")
    assert text(PEER, *where, "--print-info", "1")[0] == 0  # makes the TPM
    there = text(PEER, *where, "--print-states")
    assert "permall" in there[1]
    assert text(OURS, *where, "--print-states") == there


ALGORITHMS = (
    "rsa,rsa-min-size=1024,tdes,tdes-min-size=128,sha1,hmac,aes,aes-min-size=128,mgf1,keyedhash,"
    "xor,sha256,sha384,sha512,null,rsassa,rsaes,rsapss,oaep,ecdsa,ecdh,ecdaa,sm2,ecschnorr,ecmqv,"
    "kdf1-sp800-56a,kdf2,kdf1-sp800-108,ecc,ecc-min-size=192,ecc-nist,ecc-bn,ecc-sm2-p256,"
    "symcipher,camellia,camellia-min-size=128,cmac,ctr,ofb,cbc,cfb,ecb"
)


def custom(old: str = "", new: str = "", attributes: str = "") -> str:
    profile = {"Name": "custom", "Algorithms": ALGORITHMS.replace(old, new)}
    if attributes:
        profile["Attributes"] = attributes
    return "profile=" + json.dumps(profile, separators=(",", ":"))


FIPS = ",remove-disabled=fips-host"
PROFILES = [
    "",
    "name=null",
    "name=default-v1",
    "name=custom",
    "name=custom:mine",
    "name=nonsense",
    "profile={}",
    'profile={"Name":"custom","Algorithms":"nonsense"}',
    'profile={"Name":"custom","StateFormatLevel":2}',
    custom(),
    custom("rsa-min-size=1024", "rsa-min-size=2048"),
    custom(attributes="no-sha1-signing"),
    "name=null,profile={}",
    "remove-disabled=check",
    "name=custom,remove-disabled=nonsense",
    "name=custom,remove-disabled=check",
    "name=null" + FIPS,
    "name=default-v1" + FIPS,
    "name=nonsense" + FIPS,
    "name=custom" + FIPS,
    "name=custom:mine" + FIPS,
    'profile={"Name":"custom","StateFormatLevel":2}' + FIPS,
    custom() + FIPS,
    custom("rsa-min-size=1024", "rsa-min-size=3072") + FIPS,
    custom(",rsa-min-size=1024") + FIPS,
    custom("ecc-min-size=192", "ecc-min-size=256") + FIPS,
    custom("tdes,tdes-min-size=128,") + FIPS,
    custom("ecc-nist,", "ecc-nist-p192,ecc-nist-p224,ecc-nist-p256,ecc-nist-p384,") + FIPS,
    custom("hmac,", "hmac,hmac-min-key-size=200,") + FIPS,
    custom(attributes="fips-host") + FIPS,
    custom(attributes="no-unpadded-encryption,no-sha1-hmac") + FIPS,
    custom(attributes="pct") + FIPS,
]


@pytest.mark.parametrize("given", PROFILES)
def test_same_profile(tmp_path: Path, given: str) -> None:
    """The profile that a new TPM gets, or the refusal; then the refusal for one that is there."""
    options = ["--profile", given] if given else []
    found = []
    for name, program in (("peer", PEER), ("ours", OURS)):
        folder = tmp_path / name
        folder.mkdir()
        where = ["--tpm2", "--tpmstate", f"dir={folder}", "--print-info", "0x20"]
        made = text(program, *where, *options)
        found.append((made, text(program, *where, *options), text(program, *where)))
    assert found[1] == found[0]
