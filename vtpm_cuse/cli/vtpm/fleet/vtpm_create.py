"""``vtpm create``: makes a TPM of the manager's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vtpm_cuse.cli.vtpm.fleet.asking import (
    ENVIRONMENT,
    EXITS,
    INTERFACE_OPTION,
    KEY_OPTION,
    OPTIONS,
    OWNER,
    ask,
    interface_of,
    key_of,
    operands,
    tell,
)
from vtpm_cuse.cli.vtpm.fleet.vtpm_cdi import REMOVE, offer_of
from vtpm_cuse.cli.words.front import run_command
from vtpm_cuse.cli.words.table import Example, Option, Program, Term
from vtpm_cuse.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vtpm_cuse.cli.words.commandline import CommandLine

PROGRAM: Final = Program(
    "vtpm create",
    "make a TPM of the manager's",
    (
        OWNER,
        Option(
            "manufactured",
            "with endorsement keys, their certificates, a platform certificate and PCR banks, as "
            "the manager's swtpm_setup.conf says",
        ),
        Option("profile", "libtpms' profile, as JSON or by a name", metavar="PROFILE"),
        KEY_OPTION,
        Option(
            "label",
            "to be kept beside it, for people and scripts",
            metavar="KEY=VALUE",
            repeats=True,
        ),
        INTERFACE_OPTION,
        Option("cdi", "offer it to containers, by its name, as vtpm cdi does"),
        REMOVE,
        *OPTIONS,
    ),
    usage=("[options] NAME",),
    operands=(Term("NAME", "what it is to be called"),),
    description=(
        "Makes a TPM 2.0, which is stopped. It is for the user who asks, who with root and the user "
        "of the manager alone sees it and can do something to it; only these can make one for "
        "somebody else.",
        "The certificates of one that is manufactured have its id, as vtpm show prints it, as common "
        "name: the name can change, and the id never does. The manager has some ready, so it need "
        "not be waited for (see --pool in vtpmd(8)), but for one of another profile.",
        "A key is read by the manager, each time the TPM is started, from the file or from the "
        "credential that the manager was given by systemd; it remembers where that is, and no key. "
        "Without it, the TPM cannot be started. Only root and the manager's user can say where it "
        "is. Whoever wants his key to be kept nowhere gives it by a descriptor (fd, or pwdfd with a "
        "passphrase) or from a kernel keyring of his own (keyring), and again to each vtpm start; the "
        "manager has it while the TPM is on.",
        "With --interface socket it has three Unix sockets, as vtpm show tells. With --interface cuse "
        "it is two character devices, which root's manager alone can make: /dev/vtpmd-NAME for one "
        "client at a time and PTM requests, /dev/vtpmdrm-NAME for many clients, each of which sees a "
        "TPM of its own. They are there while it is on, belong to its owner, and have the same "
        "numbers whenever that can be. With --interface vtpm-proxy the kernel makes them, as for a TPM of "
        "the machine's: /dev/tpmN and /dev/tpmrmN, by a number that vtpm show tells while it is on. Only root "
        "makes such a TPM, which all of the host sees, for whomever it is. With --interface fuse, which a user's own manager alone has, it "
        "is the files vtpm0 and vtpmrm0, which are used like these devices by this user alone.",
    ),
    examples=(
        Example("", "vtpm create web1 && vtpm start web1"),
        Example("", "vtpm create --label vm=7 web2"),
        Example(
            "Encrypted",
            "head -c 32 /dev/urandom >web4.key\n"
            "vtpm create --key file=web4.key,format=binary,mode=aes-256-cbc web4",
        ),
        Example(
            "With a key that the manager does not keep",
            "vtpm create --key fd=3 web6 3<web6.key\nvtpm start --key fd=3 web6 3<web6.key",
        ),
        Example("With keys and certificates", "vtpm create --manufactured web3"),
        Example(
            "As a device",
            "sudo vtpm create --interface cuse --owner $USER web5\nsudo vtpm start web5\n"
            "tpm2_getrandom -T device:/dev/vtpmdrm-web5 --hex 8",
        ),
        Example(
            "For a container",
            "sudo vtpm create --interface cuse --cdi web6\nsudo vtpm start web6\n"
            "sudo podman run --device vtpm-cuse.org/vtpm=web6 IMAGE PROGRAM",
        ),
    ),
    exits=EXITS,
    environment=ENVIRONMENT,
    see_also=(
        "vtpm(8)",
        "vtpm_start(8)",
        "vtpm_cdi(8)",
        "vtpm_clone(8)",
        "vtpm_rm(8)",
        "swtpm_setup(8)",
    ),
)


def main(words: Sequence[str], program: str) -> int:
    """Runs ``vtpm create`` with the words behind it."""
    return run_command(PROGRAM, words, program, _run)


def _run(line: CommandLine) -> int:
    (name,) = operands(line, "one TPM, as it is to be called")
    owner, interface = line.user("owner"), interface_of(line)
    if line.has("rm") and not line.has("cdi"):
        raise UsageError("--rm is for a TPM that containers are offered, with --cdi")
    labels = dict(map(_label, line.values("label")))
    tpm = ask(
        line,
        lambda manager: manager.create(
            name,
            owner=owner,
            profile=line.value("profile"),
            labels=labels or None,
            manufactured=line.has("manufactured"),
            key=key_of(line),
            interface=interface,
            cdi=offer_of(line) if line.has("cdi") else None,
        ),
    )
    return tell(line, tpm)


def _label(text: str) -> tuple[str, str]:
    """Raises UsageError."""
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise UsageError(f"'{text}' is no label; write it as KEY=VALUE")
    return key, value
