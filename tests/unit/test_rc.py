"""Response codes in words: by the specifications, and as other programs read them."""

from __future__ import annotations

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtpm_cuse.resmgr.refusal import LAYER
from vtpm_cuse.wire.ptm import PtmResult
from vtpm_cuse.wire.rc import UNKNOWN, explain
from vtpm_cuse.wire.tpm import TpmRc

FAIL_WORDS: Final = "wrong password or HMAC, which counts towards the lockout"


@pytest.mark.parametrize(
    ("code", "layer", "name", "where"),
    [
        (0, "TPM", "TPM_RC_SUCCESS", ""),
        # format one: parameter, handle, session
        (0x98E, "TPM", "TPM_RC_AUTH_FAIL", "session 1"),
        (0xF8E, "TPM", "TPM_RC_AUTH_FAIL", "session 7"),
        (0x2CB, "TPM", "TPM_RC_HANDLE", "parameter 2"),
        (0xFD5, "TPM", "TPM_RC_SIZE", "parameter 15"),
        (0x18B, "TPM", "TPM_RC_HANDLE", "handle 1"),
        (0x78B, "TPM", "TPM_RC_HANDLE", "handle 7"),
        (0x08B, "TPM", "TPM_RC_HANDLE", ""),
        (0x0A7, "TPM", "TPM_RC_ECC_POINT", ""),
        (0x086, "TPM", "", ""),
        # format zero: errors, warnings, vendors' codes, a bit that is reserved
        (0x100, "TPM", "TPM_RC_INITIALIZE", ""),
        (0x101, "TPM", "TPM_RC_FAILURE", ""),
        (0x155, "TPM", "TPM_RC_SENSITIVE", ""),
        (0x901, "TPM", "TPM_RC_CONTEXT_GAP", ""),
        (0x910, "TPM", "TPM_RC_REFERENCE_H0", ""),
        (0x91E, "TPM", "TPM_RC_REFERENCE_S6", ""),
        (0x921, "TPM", "TPM_RC_LOCKOUT", ""),
        (0x907, "TPM", "TPM_RC_LOCALITY", ""),
        (0x107, "TPM", "TPM_RC_LOCALITY", ""),
        (0x500, "TPM", "", ""),
        (0x301, "TPM", "", ""),
        (0x1001, "TPM", "", ""),
        # TPM 1.2
        (0x001, "TPM 1.2", "TPM_AUTHFAIL", ""),
        (0x01E, "TPM 1.2", "TPM_BADTAG", ""),
        (0x026, "TPM 1.2", "TPM_INVALID_POSTINIT", ""),
        (0x05F, "TPM 1.2", "TPM_MA_AUTHORITY", ""),
        (0x060, "TPM 1.2", "", ""),
        (0x063, "TPM 1.2", "TPM_NOCONTEXTSPACE", ""),
        (0x800, "TPM 1.2", "TPM_RETRY", ""),
        (0x803, "TPM 1.2", "TPM_DEFEND_LOCK_RUNNING", ""),
        (0x401, "TPM 1.2", "", ""),
        # layers
        (0x60034, "FAPI", "TSS2_FAPI_RC_NOT_PROVISIONED", ""),
        (0x70018, "ESYS", "TSS2_ESYS_RC_BAD_TR", ""),
        (0x80001, "SYS", "TSS2_SYS_RC_GENERAL_FAILURE", ""),
        (0x90010, "MU", "TSS2_MU_RC_BAD_SIZE", ""),
        (0xA000A, "TCTI", "TSS2_TCTI_RC_IO_ERROR", ""),
        (0xB0143, "RESMGR_TPM", "TPM_RC_COMMAND_CODE", ""),
        (0xB098E, "RESMGR_TPM", "TPM_RC_AUTH_FAIL", "session 1"),
        (0xC0009, "RESMGR", "TSS2_RESMGR_RC_TRY_AGAIN", ""),
        (0xD0036, "POLICY", "TSS2_POLICY_RC_CALLBACK_NULL", ""),
        (0xA0000, "TCTI", "", ""),
        (0x50001, "layer 5", "", ""),
        (0x100_0001, "", "", ""),
        (-1, "", "", ""),
    ],
)
def test_codes(code: int, layer: str, name: str, where: str) -> None:
    found = explain(code)
    assert found[:4] == (code, layer, name, where)
    assert bool(found.name) is (found.words not in {UNKNOWN, "a code of the TPM's vendor"})


def test_what_a_code_says_is_a_sentence_of_use() -> None:
    assert explain(0x98E).words.startswith(FAIL_WORDS)
    assert (
        explain(0xB098E).words == f"a resource manager in the TPM's place: {explain(0x98E).words}"
    )
    assert explain(0x911).words == "handle 2 is not loaded"
    assert explain(0x500).words == "a code of the TPM's vendor"


@pytest.mark.parametrize(
    ("code", "name"), [(0, "TPM_SUCCESS"), (0x9, "TPM_FAIL"), (0x98E, ""), (0x4FF, "")]
)
def test_of_a_tpm12_whatever_the_bits_say(code: int, name: str) -> None:
    assert explain(code, tpm12=True)[:4] == (code, "TPM 1.2", name, "")


@given(st.integers(-(1 << 40), 1 << 40) | st.integers(0, 0xFFF), st.booleans())
def test_any_number_is_explained(code: int, tpm12: bool) -> None:
    found = explain(code, tpm12=tpm12)
    assert found.code == code
    assert found.words
    assert found.words[-1] not in ".\n"


@pytest.mark.parametrize("member", [*TpmRc.__members__, *PtmResult.__members__])
def test_the_package_calls_codes_the_same(member: str) -> None:
    code = (TpmRc if member in TpmRc.__members__ else PtmResult)[member]
    plain, parameter = re.subn(r"_P([12])$", "", member)
    assert explain(code).name == plain.replace("TPM_SUCCESS", "TPM_RC_SUCCESS")
    assert not parameter or explain(code).where == f"parameter {member[-1]}"
    assert explain(LAYER | code).layer == "RESMGR_TPM"


# -- peers --------------------------------------------------------------------------------

IN_TPMS: Final = (
    *(number | (0x180, 0x2C0, 0xB80)[number % 3] for number in range(0x40)),
    *range(0x100, 0x160),
    *range(0x900, 0x930),
)
IN_LAYERS: Final = (*(0x60000 | base for base in range(1, 54)), 0x70001, 0x80002, 0x90003, 0xA0004)
AND_MORE: Final = (0xB098E, 0xB0143, 0xB0902)
NEWER: Final = frozenset({0x107, 0x156})
"""Older tools than this, or those of another origin, have nothing to say about these."""


def said_by(tool: str, codes: tuple[int, ...]) -> dict[int, str]:
    ask = partial(subprocess.run, check=False, capture_output=True, text=True)
    with ThreadPoolExecutor(4) as pool:
        done = pool.map(lambda code: ask([tool, f"{code:#x}"]), codes)
        return {code: one.stdout.strip() for code, one in zip(codes, done, strict=True)}


@pytest.mark.skipif(shutil.which("tssreturncode") is None, reason="needs tssreturncode")
def test_names_and_places_are_those_of_the_ibm_tss() -> None:
    compared = 0
    for code, said in said_by("tssreturncode", IN_TPMS).items():
        ours = explain(code)
        if not said.startswith("TPM_RC_"):  # it has no name there
            continue
        compared += 1
        assert said.split()[0] == ours.name
        place = re.search("(Session|Handle|Parameter) number ([0-9]+)", said)
        assert ours.where == (f"{place[1].lower()} {place[2]}" if place else "")
    assert compared > 80


@pytest.mark.skipif(shutil.which("tpm2_rc_decode") is None, reason="needs tpm2_rc_decode")
def test_layers_and_places_are_those_of_tpm2_tools_and_names_divide_as_its_texts() -> None:
    """It says no names: each of its texts has one name here, and the reverse."""
    prefixes = {"tpm": "TPM", "rmt": "RESMGR_TPM", "esapi": "ESYS"}
    names: dict[str, set[str]] = {}
    texts: dict[str, set[str]] = {}
    for code, said in said_by("tpm2_rc_decode", (*IN_TPMS, *IN_LAYERS, *AND_MORE)).items():
        ours = explain(code)
        layer, _, rest = said.partition(":")
        assert ours.layer == prefixes.get(layer, layer.upper())
        place = re.match(r"(session|handle|parameter)\(([0-9]+)\):", rest)
        assert ours.where == (f"{place[1]} {place[2]}" if place else "")
        text = re.sub(r"^(session|handle|parameter|error|warn)\([0-9.]+\):\s*", "", rest)
        if re.search(r"0x|unknown|\(null\)|not currently used", text) or code in NEWER:
            continue
        base = re.sub("^TSS2_[A-Z]+_", "", ours.name)
        names.setdefault(text, set()).add(base)
        texts.setdefault(base, set()).add(text)
    assert len(names) > 100
    assert {text: found for text, found in names.items() if len(found) > 1 or "" in found} == {}
    assert {name: found for name, found in texts.items() if len(found) > 1} == {}
