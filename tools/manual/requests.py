"""swtpm_ioctls(3): the control requests, from the declarations in `wire.ptm`."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Final

from tools.manual.roff import Roff, bold, italic
from vtpm_cuse.wire.ptm import (
    PTM_SPECS,
    PtmBlobType,
    PtmCapability,
    PtmCommand,
    PtmConfigFlag,
    PtmEmpty,
    PtmInitFlag,
    PtmResult,
    PtmStateFlag,
)

if TYPE_CHECKING:
    from enum import IntEnum, IntFlag

    from vtpm_cuse.wire.layout import WireStruct

# One clause each; what is sent and answered comes from the structures.
_PURPOSES: Final = {
    PtmCommand.PTM_GET_CAPABILITY: "which of these requests are offered",
    PtmCommand.PTM_INIT: "power the TPM on, or off and on again",
    PtmCommand.PTM_SHUTDOWN: "power the TPM off and end the emulator",
    PtmCommand.PTM_GET_TPMESTABLISHED: "the tpmEstablished bit",
    PtmCommand.PTM_SET_LOCALITY: "the locality of the commands to come",
    PtmCommand.PTM_HASH_START: "begin a measurement by hardware, as the DRTM makes one",
    PtmCommand.PTM_HASH_DATA: "a part of what is measured",
    PtmCommand.PTM_HASH_END: "end the measurement and extend PCR 17 with it",
    PtmCommand.PTM_CANCEL_TPM_CMD: "cancel the command that is running",
    PtmCommand.PTM_STORE_VOLATILE: "write the volatile state beside the permanent state",
    PtmCommand.PTM_RESET_TPMESTABLISHED: "reset the tpmEstablished bit",
    PtmCommand.PTM_GET_STATEBLOB: "a part of a state blob; on a device for root and the user who "
    "serves it alone",
    PtmCommand.PTM_SET_STATEBLOB: "a part of a state blob for a TPM that is off; as the one before",
    PtmCommand.PTM_STOP: "power the TPM off",
    PtmCommand.PTM_GET_CONFIG: "which keys are in use",
    PtmCommand.PTM_SET_DATAFD: "use the socket that comes with this message (SCM_RIGHTS) for TPM "
    "commands; on the control channel only",
    PtmCommand.PTM_SET_BUFFERSIZE: "the size of the TPM's command buffer",
    PtmCommand.PTM_GET_INFO: "facts about the TPM as JSON text",
    PtmCommand.PTM_LOCK_STORAGE: "lock the state, which another host held during a migration",
    PtmCommand.PTM_GET_CLIENTS: "the clients of the resource manager as JSON text; not in the C "
    "suite",
    PtmCommand.PTM_FLUSH_CLIENT: "end an object or session of a client, or with a handle of 0 all "
    "that it has; client 0 has the sessions that others have left; not in the C suite",
}
_FLAGS: Final[tuple[type[IntFlag | IntEnum], ...]] = (
    *(PtmCapability, PtmInitFlag, PtmStateFlag, PtmConfigFlag, PtmBlobType, PtmResult),
)


def requests_page(date: str, source: str) -> str:
    """The page."""
    page = Roff("swtpm_ioctls", 3, "control requests of the TPM emulator", date, source)
    page.heading("SYNOPSIS")
    page.raw(bold("#include <swtpm/tpm_ioctl.h>"))
    page.line_break()
    page.raw(bold("#include <sys/ioctl.h>"))
    page.line_break()
    page.raw(
        f"{bold('int ioctl(int ')}{italic('fd')}{bold(', PTM_INIT, ptm_init *')}"
        f"{italic('argument')}{bold(');')}"
    )
    page.heading("DESCRIPTION")
    page.paragraphs(
        (
            "A TPM emulator is controlled by requests: ioctls on the character device of "
            "swtpm_cuse(8), or messages on the control channel of swtpm_socket(8).",
            "As an ioctl, request and response share one argument: a union in the byte order "
            "and alignment of the host. The request is read from it, and the response written "
            "to it. Every response but that of PTM_GET_CAPABILITY begins with a result: 0, or "
            "the code of an error. Some requests are refused by a running TPM, others by one "
            "that is off.",
            "On the control channel a message is the command, 4 bytes, and the request; the "
            "answer is the response. All is big-endian, and of a structure that ends in data "
            "only the bytes in use travel. The command is the ioctl's number plus one. A "
            "failed request is answered by its result alone.",
        )
    )
    page.heading("REQUESTS")
    for command, spec in PTM_SPECS.items():
        purpose = _PURPOSES[command]
        page.term(
            f"{bold(command.name)} (0x{spec.ioctl(command):08x}, command {command + 1})",
            f"{purpose[:1].upper()}{purpose[1:]}.",
        )
        page.indent()
        if spec.request is not PtmEmpty:
            page.term("request", _fields(spec.request))
        page.term("response", _fields(spec.response))
        page.dedent()
    page.heading("VALUES")
    for values in _FLAGS:
        page.subheading(f"{values.__name__}: {first_line(values)}")
        for row, value in enumerate(values):
            if row:
                page.line_break()
            page.raw(f"{bold(value.name or '')} 0x{value.value:x}")
    page.heading("SEE ALSO")
    page.request(".BR swtpm_ioctl (8),")
    page.request(".BR swtpm_cuse (8),")
    page.request(".BR swtpm_socket (8)")
    return str(page)


def rows() -> str:
    """The requests as a table of the handbook."""
    lines = ["| request | command | ioctl | what it is for |", "|---|---|---|---|"]
    for command, spec in PTM_SPECS.items():
        ioctl = f"0x{spec.ioctl(command):08x}"
        lines.append(f"| {command.name} | {command + 1} | {ioctl} | {_PURPOSES[command]} |")
    return "\n".join(lines)


def _fields(structure: type[WireStruct]) -> str:
    names = []
    for name, kind in inspect.get_annotations(structure).items():
        code = kind.__metadata__[0]
        type_name = {"B": "uint8", "H": "uint16", "I": "uint32", "Q": "uint64"}.get(code)
        names.append(f"{type_name} {name}" if type_name else f"{name}[{structure.TAIL}]")
    return "; ".join(names) + f" ({structure.SIZE + structure.TAIL} bytes at most)"


def first_line(values: type) -> str:
    """Of what is said of a class, without its full stop."""
    return inspect.cleandoc(values.__doc__ or "").splitlines()[0].rstrip(".")
