"""All programs of the suite: where man pages and completions find their tables.

A program is named here by its module, which is imported only when it is asked
for; the module has the table as ``PROGRAM``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from vtpm_cuse.cli.words.table import Program

MODULES: Final = (
    "vtpm_cuse.cli.swtpm",
    "vtpm_cuse.cli.emulator.swtpm_socket",
    "vtpm_cuse.cli.emulator.swtpm_chardev",
    "vtpm_cuse.cli.emulator.swtpm_cuse",
    "vtpm_cuse.cli.swtpm_doctor",
    "vtpm_cuse.cli.emulator.swtpm_fuse",
    "vtpm_cuse.cli.emulator.swtpm_resource_manager",
    "vtpm_cuse.cli.swtpm_ioctl",
    "vtpm_cuse.cli.ca.swtpm_cert",
    "vtpm_cuse.cli.ca.swtpm_localca",
    "vtpm_cuse.cli.ca.swtpm_create_tpmca",
    "vtpm_cuse.cli.setup.swtpm_setup",
    "vtpm_cuse.cli.setup.swtpm_create_user_config_files",
    "vtpm_cuse.cli.swtpm_bios",
    "vtpm_cuse.cli.vtpm.vtpm",
    "vtpm_cuse.cli.vtpm.vtpm_clients",
    "vtpm_cuse.cli.vtpm.vtpm_env",
    "vtpm_cuse.cli.vtpm.vtpm_flush",
    "vtpm_cuse.cli.vtpm.vtpm_rc",
    "vtpm_cuse.cli.vtpm.vtpm_run",
    "vtpm_cuse.cli.vtpm.vtpm_trace",
    "vtpm_cuse.cli.vtpm.fleet.vtpm_attach",
    "vtpm_cuse.cli.vtpm.fleet.vtpm_cdi",
    "vtpm_cuse.cli.vtpm.fleet.vtpm_clone",
    "vtpm_cuse.cli.vtpm.fleet.vtpm_create",
    "vtpm_cuse.cli.vtpm.fleet.vtpm_export",
    "vtpm_cuse.cli.vtpm.fleet.vtpm_hibernate",
    "vtpm_cuse.cli.vtpm.fleet.vtpm_import",
    "vtpm_cuse.cli.vtpm.fleet.vtpm_logs",
    "vtpm_cuse.cli.vtpm.fleet.vtpm_ls",
    "vtpm_cuse.cli.vtpm.fleet.vtpm_metrics",
    "vtpm_cuse.cli.vtpm.fleet.vtpm_reset",
    "vtpm_cuse.cli.vtpm.fleet.vtpm_restore",
    "vtpm_cuse.cli.vtpm.fleet.vtpm_rm",
    "vtpm_cuse.cli.vtpm.fleet.vtpm_show",
    "vtpm_cuse.cli.vtpm.fleet.vtpm_snapshot",
    "vtpm_cuse.cli.vtpm.fleet.vtpm_start",
    "vtpm_cuse.cli.vtpm.fleet.vtpm_stop",
    "vtpm_cuse.cli.vtpm.fleet.vtpm_top",
    "vtpm_cuse.cli.vtpm.fleet.vtpm_tree",
    "vtpm_cuse.cli.vtpm.fleet.vtpm_wake",
    "vtpm_cuse.cli.vtpm.fleet.vtpm_watch",
    "vtpm_cuse.cli.vtpmd",
)


def program_of(module: str) -> Program:
    """The table of one module."""
    program: Program = import_module(module).PROGRAM
    return program


def programs() -> tuple[Program, ...]:
    """Every table, in the order of `MODULES`."""
    return tuple(map(program_of, MODULES))
