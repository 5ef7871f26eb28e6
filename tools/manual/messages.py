"""A page of the handbook: every message of the programs, found in their source, with cause and cure."""

from __future__ import annotations

import ast
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Final, NamedTuple

_PACKAGE: Final = Path(__file__).parents[2] / "vtpm_cuse"
_HOLE: Final = "…"
_LEVELS: Final = {"critical": "error", "exception": "error"}
_LOGGED: Final = ("critical", "error", "exception", "warning")


class Kind(NamedTuple):
    """Messages that come from one kind of trouble."""

    title: str
    raised: tuple[str, ...]
    """The exceptions that carry them, or "log error" and "log warning"."""
    cause: str
    cure: str


KINDS: Final = (
    Kind(
        "The command line, or a file of options",
        ("UsageError", "SubOptionError"),
        "An option, a configuration file or a place that one of them names cannot be used as it is. Nothing "
        "has been changed.",
        "The message names the word. `--help` of the program has all options with examples. Exit status 1; "
        "2 where the words alone are wrong for programs that are not the C suite's.",
    ),
    Kind(
        "Devices, sockets and other programs",
        (
            "FrontendError",
            "DeviceGone",
            "TimeoutError",
            "EOFError",
            "PermissionError",
        ),
        "A device, a socket, a mount or a program that the TPM is to be reached by cannot be had, or has "
        "gone.",
        "`vtpm doctor` says what this machine offers and what to type. A socket that refuses has nobody who "
        "listens: is the TPM running, and does its `--ctrl` or `--server` name this path?",
    ),
    Kind(
        "The state on the disk",
        (
            "StorageError",
            "StateMissing",
            "StateLocked",
            "StateNoRoom",
            "StateDamaged",
        ),
        "A TPM's state cannot be read or written, is another process's, or fails a check. It stays as it is: "
        "no TPM is ever made over it.",
        "Keep a copy of the folder before anything else. Locked: end the other TPM on it. No room: make "
        "room, then start again. Damaged: put back a copy, or start with `backup` where that was used. The "
        "page on backup has the steps.",
    ),
    Kind(
        "Blobs, keys and migration",
        ("BlobError",),
        "A state blob, from a file or a client, is not what it should be: cut, of another version, or "
        "encrypted with another key.",
        "Use the key, the mode (`aes-128-cbc`, `aes-256-cbc`) and the kind of blob that it was written with.",
    ),
    Kind(
        "PTM requests",
        ("PtmError", "AnswerError"),
        "A request on the control channel, or an ioctl, does not fit the TPM's present condition, or is "
        "malformed; or what answers is no TPM of this kind.",
        "Most need a TPM that is initialized (`swtpm_ioctl -i`), those for state blobs one that is stopped "
        "(`swtpm_ioctl --stop`). The TPM goes on as before.",
    ),
    Kind(
        "libtpms",
        ("EngineError", "EngineUnavailable", "TpmUnavailable"),
        "The library that is the TPM is missing, too old for what was asked, or does not start from this "
        "state.",
        "Install libtpms0, or a newer one. A state that a newer libtpms has written needs that one.",
    ),
    Kind(
        "TPM responses",
        ("TpmError", "WireError"),
        "The TPM refused a command of the program's own, or bytes do not fit their layout.",
        "`vtpm rc CODE` says what a response code means; `vtpm trace` shows what was asked before.",
    ),
    Kind(
        "Certificates and CAs",
        ("CertificateError",),
        "A certificate cannot be made: its CA's key or certificate, or the TPM's key, cannot be used.",
        "Look at the file that the message names. `swtpm-localca.conf(5)` says which files a CA has.",
    ),
    Kind(
        "A private TPM, for tests",
        ("LabError",),
        "A TPM of `vtpm_cuse.lab` or `vtpm run` cannot be had, or has gone.",
        "What its emulator said last is in the message. The page on the laboratory has the conditions.",
    ),
    Kind(
        "The manager of many TPMs",
        ("FleetError", "MessageError", "ChannelError"),
        "`vtpmd` cannot do that to this TPM now, or one of its processes said what none of them says and "
        "was ended.",
        "`vtpm show NAME` says what the TPM is doing. One that has failed is started by `vtpm reset NAME`.",
    ),
    Kind(
        "Files and values",
        ("OSError", "ValueError", "ConnectionAbortedError", "FileNotFoundError"),
        "The end of another message: why a file, or a value in one, was not taken.",
        "Files with secrets must belong to you and to nobody else (`chmod 600`), and be no pipe or device.",
    ),
    Kind(
        "The log: errors",
        ("log error",),
        "What could not be done while a TPM is served, or why a program ends.",
        "The TPM's clients have got an error code and nothing was lost; a TPM whose state cannot be stored "
        "answers 0x101 until it is reset. A Python traceback in a log is a fault of ours: please report it.",
    ),
    Kind(
        "The log: warnings",
        ("log warning",),
        "The program goes on, but something is not as it was asked for.",
        "Read what it says; nothing has to be done at once.",
    ),
)

_KNOWN: Final = {carrier for kind in KINDS for carrier in kind.raised}
_INSIDE: Final = {"AssertionError", "AttributeError", "RuntimeError", "TypeError"}
"""Faults of ours, which no user is to meet."""


def fitting(carrier: str) -> Kind | None:
    """The kind of what *carrier* raises or logs; None for a fault of ours.

    Raises LookupError for one that nobody has given a kind.
    """
    if carrier in _INSIDE:
        return None
    for kind in KINDS:
        if carrier in kind.raised:
            return kind
    raise LookupError(f"{carrier} has no kind in {__name__}: say its cause and its cure")


@cache
def messages(package: Path = _PACKAGE) -> dict[str, set[str]]:
    """The messages in a package's source, by what carries them; what they are given is ``…``."""
    found: dict[str, set[str]] = defaultdict(set)
    for path in sorted(package.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        functions = [
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        ]
        # Helpers that make an exception say which by their annotation.
        made = {node.name: ast.unparse(node.returns) for node in functions if node.returns}
        for function in functions:
            for carrier, text in _said(function, made):
                found[carrier].add(text)
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and node.name in _KNOWN:
                found[node.name] |= set(_own(node))
    return {carrier: texts for carrier, texts in found.items() if texts}


def _own(exception: ast.ClassDef) -> list[str]:
    """What an exception says itself, in the place of who raises it."""
    shown = [node for node in exception.body if getattr(node, "name", "") == "__str__"]
    values = [node.value for one in shown for node in ast.walk(one) if isinstance(node, ast.Return)]
    return [text for value in values if value and _is_said(text := _text(value))]


def _is_said(text: str) -> bool:
    return " " in text.strip(f"{_HOLE} ")


def _said(function: ast.AST, made: dict[str, str]) -> list[tuple[str, str]]:
    named = defaultdict(list)
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            named[node.targets[0].id].append(node.value)
    said = []
    for node in (node for node in ast.walk(function) if isinstance(node, ast.Call)):
        carrier = _carrier(node, made)
        if not carrier:
            continue
        for argument in (*node.args, *(word.value for word in node.keywords)):
            values = named[argument.id] if isinstance(argument, ast.Name) else [argument]
            texts = [_text(value) for value in values]
            said += [(carrier, text) for text in texts if _is_said(text)]
    return said


def _carrier(call: ast.Call, made: dict[str, str]) -> str:
    match call.func:
        case ast.Attribute(attr=name) if name in _LOGGED:
            return f"log {_LEVELS.get(name, name)}"
        case ast.Name(id=name) | ast.Attribute(attr=name):
            name = made.get(name, name)
            return name if name in _KNOWN or name.endswith("Error") else ""
    return ""


def _text(node: ast.AST) -> str:
    match node:
        case ast.Constant(value=str(text)):
            return text.replace("%s", _HOLE).replace("%r", _HOLE).replace("%d", _HOLE)
        case ast.JoinedStr(values=values):
            return "".join(_text(value) or _HOLE for value in values)
        case ast.BinOp(left=left, right=right):
            return "".join(_text(side) or _HOLE for side in (left, right))
    return ""


def page() -> str:
    """The page, in Markdown."""
    found = messages()
    for carrier in found:
        fitting(carrier)
    lines = [
        "# What to do when ...",
        "",
        "Every message that the programs can print, by the kind of trouble. `…` stands for a name, a",
        "number, or a reason that the system gives. Look for a part of the message that is yours.",
    ]
    for kind in KINDS:
        texts = sorted({text for carrier in kind.raised for text in found[carrier]})
        lines += ["", f"## {kind.title}", "", kind.cause, "", f"*What to do:* {kind.cure}", ""]
        lines += [f"- {_code(text)}" for text in texts]
    return "\n".join((*lines, ""))


def _code(text: str) -> str:
    text = " ".join(text.split())
    return f"`` {text} ``" if "`" in text else f"`{text}`"
