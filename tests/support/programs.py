"""The modules of the programs, for tests that start them with something changed."""

from __future__ import annotations

from vtpm_cuse.cli.registry import MODULES


def module_of(program: str) -> str:
    """As swtpm_cert is vtpm_cuse.cli.ca.swtpm_cert."""
    (found,) = (module for module in MODULES if module.rpartition(".")[2] == program)
    return found
