"""``swtpm_setup``: makes a TPM that is ready to use."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from typing import TYPE_CHECKING, Final, NoReturn

from vtpm_cuse.cli.setup import settings as setup_settings
from vtpm_cuse.cli.setup.options import OPTIONS
from vtpm_cuse.cli.words.commandline import CommandLine
from vtpm_cuse.cli.words.help import help_text
from vtpm_cuse.cli.words.program import complain, inform, run_program, version_text
from vtpm_cuse.cli.words.report import SetupReport
from vtpm_cuse.cli.words.table import Example, Program, Term
from vtpm_cuse.config import LogConfig
from vtpm_cuse.errors import UsageError, VtpmError, shown
from vtpm_cuse.manufacture import files as setup_files
from vtpm_cuse.service.confine import secrecy
from vtpm_cuse.service.process import logs
from vtpm_cuse.storage.locations import absolute_path

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vtpm_cuse.manufacture.config import SetupConfig
    from vtpm_cuse.manufacture.makers import TpmMakers
    from vtpm_cuse.manufacture.target import Target

_TIME_FORMAT: Final = "%a %d %h %Y %I:%M:%S %p %Z"
_ENDING: Final = (signal.SIGTERM, signal.SIGHUP)

PROGRAM: Final = Program(
    "swtpm_setup",
    "set up a TPM: keys, certificates, PCR banks",
    OPTIONS,
    description=(
        "Makes the state of a new TPM, as a manufacturer would: it creates endorsement keys and "
        "their certificates, which a local CA signs (see swtpm_localca(8)), and chooses the "
        "active PCR banks. The TPM is made in memory and written when it is complete: until "
        "then, and after an error or a signal, a TPM that is there stays as it was.",
    ),
    examples=(
        Example(
            "A TPM 2.0 with keys and certificates",
            "swtpm_setup --tpm2 --tpm-state dir:///var/lib/vtpm0 --create-ek-cert \\\n"
            "    --create-platform-cert --lock-nvram --vmid vm1",
        ),
        Example(
            "Another PCR bank for a TPM that is there",
            "swtpm_setup --tpm2 --tpm-state /var/lib/vtpm0 --reconfigure \\\n"
            "    --pcr-banks sha384",
        ),
        Example(
            "For a user without root, once; then as above",
            "swtpm_setup --create-config-files skip-if-exist",
        ),
    ),
    exits=(
        Term("0", "The TPM is set up, or was there already and --not-overwrite was given."),
        Term("1", "An error; what is stored is as it was."),
        Term("130, 143, 129", "Ended by SIGINT, SIGTERM or SIGHUP; what is stored is as it was."),
    ),
    environment=(
        Term("XDG_CONFIG_HOME", "Where the user's own configuration is, by default ~/.config."),
    ),
    files=(
        Term("$XDG_CONFIG_HOME/swtpm_setup.conf", "The user's own configuration."),
        Term("/etc/swtpm_setup.conf", "The configuration where there is none of the user's own."),
    ),
    see_also=("swtpm(8)", "swtpm_localca(8)", "swtpm_cert(8)", "swtpm_setup.conf(5)"),
    banner=version_text("setup tool "),
)


class _Ended(BaseException):
    """A signal other than SIGINT."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def main() -> int:
    """The program swtpm_setup."""
    for number in _ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(number, _on_signal)
    try:
        return run_program(lambda: _run(sys.argv[1:]), complain)
    except _Ended as exc:
        return 128 + exc.number


def _on_signal(number: int, _frame: object) -> NoReturn:
    raise _Ended(number)


def _run(words: Sequence[str]) -> int:
    try:
        line = CommandLine(PROGRAM, words)
    except UsageError as exc:
        complain(str(exc))
        return 1
    if line.has("help"):
        print(help_text(PROGRAM), end="")
        return 0
    if line.has("version"):
        print(version_text("setup tool "))
        return 0
    if line.has("create-config-files"):
        write_config_files(line.value("create-config-files") or "")
        return 0
    for name in ("swtpm_ioctl", "tcsd-system-ps-file"):
        if line.has(name):
            complain(f"Warning: --{name} is deprecated and has no effect.")
    return _run_setup(line)


def write_config_files(how: str) -> None:
    """Writes a user's configuration, and says so: see `manufacture.files.create_config_files`."""
    for path in setup_files.create_config_files(how):
        inform(f"Writing {shown(path)}.\n")


def _run_setup(line: CommandLine) -> int:
    from vtpm_cuse.manufacture.makers import TpmMakers

    secrecy.hide_process()  # before keys and passwords are in memory
    makers = TpmMakers(line.value("tpm"))
    if line.has("print-capabilities"):
        print(shown(makers.capabilities_text()))
        return 0
    if (user := line.value("runas")) is not None:
        _become(user)
    makers.need_version(tpm2=line.has("tpm2"))  # by a program of --tpm's, which may be the user's
    if line.has("print-profiles"):
        print(shown(_profiles_text(line, makers)))
        return 0
    logfile = line.value("logfile")
    report = SetupReport(logfile, quiet=line.has("quiet"))
    logs.configure(LogConfig(path=None if logfile is None else absolute_path(logfile), prefix=""))
    try:
        return _prepare(line, makers, report)
    except VtpmError as exc:
        report.error(str(exc))
        return 1


def _become(name: str) -> None:
    """Is that user from now on. Raises UsageError."""
    from vtpm_cuse.config import Exits
    from vtpm_cuse.service.confine.preload import import_set_up
    from vtpm_cuse.service.confine.privileges import become, find_user

    import_set_up()
    become(find_user(name), Exits())
    secrecy.hide_process()


def _profiles_text(line: CommandLine, makers: TpmMakers) -> str:
    from vtpm_cuse.cli.setup.profiles import profiles_text

    if not line.has("tpm2"):
        return "{}"
    return profiles_text(_config_file(line), makers.builtin_profiles())


def _config_file(line: CommandLine) -> setup_files.ConfigFile:
    return setup_files.ConfigFile.load(line.value("config"), _names()[0])


def _prepare(line: CommandLine, makers: TpmMakers, report: SetupReport) -> int:
    """Looks at everything before anything is done."""
    from vtpm_cuse.manufacture.config import Existing
    from vtpm_cuse.manufacture.target import Target, check_access, check_directory

    user, _ = _names()
    uri = setup_settings.state_uri(line)
    check_access(uri, user)
    if (directory := line.value("write-ek-cert-files")) is not None:
        check_directory(directory, user)
    setup_settings.check_options(line)
    with contextlib.closing(Target(uri, tpm2=line.has("tpm2"))) as target:
        existing = setup_settings.existing(line)
        replace = existing is Existing.REPLACE  # then whatever is there goes
        if not replace and _is_kept(target, existing, report):
            return 0
        config = setup_settings.setup_config(line, _config_file(line), makers, user, uri)
        if config.key is not None:
            report.line(setup_settings.key_message(config.key))
        target.lock()
        # Another process may have been at it before the lock was ours.
        if not replace and _is_kept(target, existing, report):
            return 0
        return _set_up(config, target, report)


def _is_kept(target: Target, existing: object, report: SetupReport) -> bool:
    """Whether the TPM that is there is all that was wanted. Raises UsageError."""
    from vtpm_cuse.manufacture.config import Existing

    there = target.has_state()
    if existing is Existing.RECONFIGURE and not there:
        # PEER: makes a new TPM, perhaps in place of one whose storage is not mounted.
        raise UsageError("There is no TPM state to reconfigure.")
    if there and existing is Existing.REFUSE:
        raise UsageError("Found existing TPM state 'permall'.")
    if there and existing is Existing.KEEP:
        report.line("Not overwriting existing state file.")
        return True
    return False


def _set_up(config: SetupConfig, target: Target, report: SetupReport) -> int:
    from vtpm_cuse.manufacture.run import set_up

    what = "reconfiguration" if config.plan.reconfigure else "manufacturing"
    user, group = _names()
    report.line(f"Starting vTPM {what} as {user}:{group} @ {time.strftime(_TIME_FORMAT)}")
    if config.profile is not None:
        report.line(f"Apply profile: {config.profile.text}")
    status = 1
    try:
        set_up(config, target, report)
        status = 0
        report.line("Successfully authored TPM state.")
        report.done("Successfully authored TPM state.")
    except VtpmError as exc:
        report.error(str(exc))
        report.error("An error occurred. Authoring the TPM state failed.")
    except (KeyboardInterrupt, _Ended):
        report.error("Interrupted. What is stored is as it was.")
        raise
    report.line(f"Ending vTPM manufacturing @ {time.strftime(_TIME_FORMAT)}")
    return status


def _names() -> tuple[str, str]:
    """User and group that this runs as."""
    import grp

    from vtpm_cuse.ca.configfile import user_name

    gid = os.getegid()
    try:
        return user_name(), grp.getgrgid(gid).gr_name
    except KeyError:
        return user_name(), str(gid)
