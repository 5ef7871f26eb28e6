"""Targets: what people write. Options and their values, names, passwords, profiles."""

from __future__ import annotations

import contextlib
import io
import json
import os
from typing import TYPE_CHECKING, Final

from tests.support.engine import FakeEngine
from vtpm_cuse.ca.names import common_name, directory_name, escaped
from vtpm_cuse.ca.passwords import read_password
from vtpm_cuse.cli import registry
from vtpm_cuse.cli.ca.options import point_key, raw_key, rsa_key
from vtpm_cuse.cli.emulator import settings
from vtpm_cuse.cli.setup.profiles import profile_config
from vtpm_cuse.cli.words import suboptions
from vtpm_cuse.cli.words.commandline import CommandLine
from vtpm_cuse.cli.words.numbers import leading_number
from vtpm_cuse.config import ProfileConfig
from vtpm_cuse.engine.profiles import profile_text
from vtpm_cuse.errors import UsageError
from vtpm_cuse.manufacture.files import ConfigFile
from vtpm_cuse.manufacture.plan import TpmFacts

if TYPE_CHECKING:
    from collections.abc import Callable

PROGRAMS: Final = registry.programs()
SUB_TABLES: Final = {
    f"{program.name} {option.name}": option.subs
    for program in PROGRAMS
    for option in program.options
    if option.subs
}
SUB_TABLES_BY_OPTION: Final = {name.rpartition(" ")[2]: subs for name, subs in SUB_TABLES.items()}
BUILTIN: Final = frozenset({"null", "default-v1", "custom"})
_SETTINGS: Final[dict[str, Callable[[CommandLine], object]]] = {
    "tpmstate": settings.state_config,
    "pid": settings.pid_config,
    "log": settings.log_config,
    "flags": settings._startup_config,
    "locality": settings._locality_config,
    "seccomp": settings._seccomp_action,
    "key": lambda line: settings._key_source(line, "key"),
}
"""What becomes of options; nothing that opens files."""

_ALGORITHMS: Final = "rsa,rsa-min-size=1024,tdes,sha1,ecc,ecc-nist-p192,ecc-min-size=192"


def _text(data: bytes) -> str:
    """As Python gives arguments and variables: any bytes but zeros."""
    return os.fsdecode(data.replace(b"\0", b""))


# -- the command line ---------------------------------------------------------------------


def options(data: bytes) -> None:
    """Words for any of the programs; every option of sub-options is read as well."""
    program = PROGRAMS[sum(data[:1]) % len(PROGRAMS)]
    words = [os.fsdecode(word) for word in data[1:].split(b"\0")]
    with contextlib.redirect_stderr(io.StringIO()):
        line = CommandLine(program, words)
    for option in program.options:
        if line.has(option.name):
            text = " ".join(line.values(option.name))
            assert not text or text in " ".join(words) or option.repeats
        if option.subs:
            line.subs(option.name)
    for name, read in _SETTINGS.items():
        if line.knows(name):
            read(line)
    if line.has("name"):
        (settings.file_name if line.knows("mount") else settings.device_name)(line)


def sub_options(data: bytes) -> None:
    """The value of one option, behind its name: its words are those of the text, in their order."""
    name, _, value = data.partition(b" ")
    names = sorted(SUB_TABLES_BY_OPTION)
    option = name.decode(errors="replace")
    table = SUB_TABLES_BY_OPTION.get(option, SUB_TABLES_BY_OPTION[names[sum(name) % len(names)]])
    text = _text(value)
    tokens: list[str] = []
    refused: ValueError | None = None
    try:
        tokens.extend(suboptions._tokens(text))
    except suboptions.SubOptionError as exc:
        refused = exc
    if refused is None:
        assert ",".join(tokens) == text
    with contextlib.suppress(suboptions.SubOptionError):
        found = leading_number(text)
        assert found is None or text.endswith(found[1])
    suboptions.parse(text, table)


def names(data: bytes) -> None:
    """Distinguished names: what is taken is well-formed DER, and an escaped text stays one."""
    text = _text(data)
    with contextlib.suppress(UnicodeEncodeError):
        text.encode()
        assert _depth(common_name(text)) == 4
        if text.strip() == text and text:
            try:
                named = directory_name(f"CN={escaped(text)}")
            except ValueError:
                assert len(escaped(text)) > 4000
            else:
                assert named == common_name(text)
    assert _depth(directory_name(text)) == 4


def _depth(der: bytes) -> int:
    """How deep the elements go; asserts that each is whole."""
    deepest = 0
    while der:
        tag, size, start = der[0], der[1], 2
        if size >= 0x80:
            start += size & 0x7F
            size = int.from_bytes(der[2:start], "big")
        assert start + size <= len(der)
        inside = _depth(der[start : start + size]) if tag & 0x20 else 0
        deepest = max(deepest, 1 + inside)
        der = der[start + size :]
    return deepest


def key_words(data: bytes) -> None:
    """Keys as hex digits, and where a password is."""
    text = _text(data[1:])
    with contextlib.suppress(UsageError):
        if not text.startswith(("fd:", "file:")):
            read_password(text, "pwd", {"SECRET": "s"})
    if data[:1] < b"\x80":
        rsa_key(text, "--modulus")
    elif data[:1] > b"\xc0":
        kind, _, key = text.partition(",")
        raw_key(kind, key, "--public")
    else:
        curve, x, y = (*text.split(","), "", "", "")[:3]
        point_key(curve, x, y, "--ecc")


# -- JSON ---------------------------------------------------------------------------------


def profile(data: bytes) -> None:
    """A profile on the command line, and the same less what FIPS refuses."""
    program = next(program for program in PROGRAMS if program.name == "swtpm_setup")
    text = _text(data)
    engine = FakeEngine()
    engine.text = json.dumps({"AvailableProfiles": [{"Name": "custom", "Algorithms": _ALGORITHMS}]})
    reduced = profile_text(ProfileConfig(text, "fips-host"), engine)
    with contextlib.redirect_stderr(io.StringIO()):
        line = CommandLine(program, ["--tpm2", "--profile", text])
    found = profile_config(line, ConfigFile({}), BUILTIN)
    assert found is not None
    assert found.text == text
    if reduced != text:
        assert json.loads(reduced)["Name"] == json.loads(text)["Name"]
        assert "tdes" not in json.loads(reduced)["Algorithms"].split(",")


def facts(data: bytes) -> None:
    """What a TPM says of its make."""
    found = TpmFacts.from_json(data.decode(errors="replace"))
    assert isinstance(found.specification.level, int)
    assert isinstance(found.specification.family, str)
