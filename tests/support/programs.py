"""The modules of the programs, for tests that start them with something changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from vtpm_cuse.cli.registry import MODULES

Run = Callable[..., tuple[int, str, str]]
"""Runs a program with words; gives status, output and errors."""

INSTALLED: Final = (
    "swtpm",
    "swtpm-create-tpmca",
    "swtpm-cuse",
    "swtpm_bios",
    "swtpm_cert",
    "swtpm_cuse",
    "swtpm_ioctl",
    "swtpm_localca",
    "swtpm_setup",
    "vtpm",
    "vtpmd",
)
"""The programs, but for those that only call another one."""


def module_of(program: str) -> str:
    """As swtpm_cert is vtpm_cuse.cli.ca.swtpm_cert."""
    (found,) = (module for module in MODULES if module.rpartition(".")[2] == program)
    return found
