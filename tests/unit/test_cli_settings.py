"""From words to configuration: defaults, precedence, errors with their exit statuses."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from vtpm_cuse.cli.emulator import (
    settings,
    swtpm_chardev,
    swtpm_cuse,
    swtpm_fuse,
    swtpm_resource_manager,
    swtpm_socket,
)
from vtpm_cuse.cli.emulator.manager_settings import manager_config
from vtpm_cuse.cli.words.commandline import CommandLine
from vtpm_cuse.config import (
    CuseConfig,
    LocalityConfig,
    LogConfig,
    PidConfig,
    ProcessConfig,
    ProfileConfig,
    StartupConfig,
    StartupKind,
    StateConfig,
    VtpmConfig,
)
from vtpm_cuse.errors import UsageError
from vtpm_cuse.resmgr.quota import Limits
from vtpm_cuse.wire.blob import BlobFlag, with_header

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def _somewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TPM_PATH", raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_STATE_HOME", "/no/such/folder")
    monkeypatch.chdir("/usr")


def line_of(*words: str) -> CommandLine:
    return CommandLine(swtpm_cuse.PROGRAM, words, "swtpm-cuse")


def config_of(*words: str) -> CuseConfig:
    return settings.cuse_config(line_of("-n", "vtpm0", *words))


def error_of(*words: str) -> tuple[str, int]:
    with pytest.raises(UsageError) as info:
        settings.cuse_config(line_of(*words))
    return info.value.reason, info.value.exit_status


def test_defaults() -> None:
    """A name is enough for a TPM that is ready."""
    assert config_of() == CuseConfig(
        name="vtpm0",
        vtpm=VtpmConfig(
            tpm2=True,
            state=StateConfig("dir:///no/such/folder/vtpm-cuse/vtpm0", own_place=True),
            startup=StartupConfig(not_need_init=True, startup="clear"),
        ),
        managed="vtpmrm0",
        process=ProcessConfig(background=True),
    )


def test_defaults_where_a_place_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the C suite, which does not start without one."""
    expected = VtpmConfig(state=StateConfig("dir:///usr/s"))
    assert config_of("--tpmstate", "dir=s").vtpm == expected
    monkeypatch.setenv("TPM_PATH", "s")
    assert config_of().vtpm == expected


@pytest.mark.parametrize(
    ("user", "home", "words", "folder"),
    [
        (0, "/ignored", ("-n", "vtpm0"), "/var/lib/vtpm-cuse/vtpm0"),
        (0, "/ignored", ("-n", "/dev/vtpm0"), "/var/lib/vtpm-cuse/vtpm0"),
        (0, "/ignored", ("-n", "a/b"), "/var/lib/vtpm-cuse/a!b"),
        (1000, "/mine", ("-n", "vtpm0"), "/mine/vtpm-cuse/vtpm0"),
        (1000, "relative", ("-n", "vtpm0"), "/my/home/.local/state/vtpm-cuse/vtpm0"),
        (1000, "", ("-n", "vtpm0"), "/my/home/.local/state/vtpm-cuse/vtpm0"),
    ],
)
def test_place_for_a_name(
    user: int,
    home: str,
    words: tuple[str, ...],
    folder: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: user)
    monkeypatch.setenv("HOME", "/my/home")
    monkeypatch.setenv("XDG_STATE_HOME", home)
    state = settings.cuse_config(line_of(*words)).vtpm.state
    assert state == StateConfig(f"dir://{folder}", own_place=True)


@pytest.mark.parametrize(
    ("there", "words", "tpm2"),
    [
        ((), (), True),
        ((), ("--tpm12",), False),
        (("tpm-00.permall",), (), False),
        (("tpm-00.permall",), ("--tpm12",), False),
        (("tpm2-00.permall",), (), True),
        (("tpm-00.permall", "tpm2-00.permall"), (), True),
        (("tpm-00.permall", "tpm2-00.permall"), ("--tpm12",), False),
    ],
)
def test_version_of_what_is_in_the_place(
    there: tuple[str, ...],
    words: tuple[str, ...],
    tpm2: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place = tmp_path / "vtpm-cuse" / "vtpm0"
    place.mkdir(parents=True)
    for name in there:
        (place / name).write_bytes(b"state")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert config_of(*words).vtpm.tpm2 is tpm2


@pytest.mark.parametrize(
    ("there", "word", "says"),
    [("tpm-00.permall", "--tpm2", "TPM 1.2"), ("tpm2-00.permall", "--tpm12", "TPM 2.0")],
)
def test_no_new_tpm_beside_one_of_another_version(
    there: str, word: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "vtpm-cuse" / "vtpm0"
    place.mkdir(parents=True)
    (place / there).write_bytes(b"state")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    reason, status = error_of("-n", "vtpm0", word)
    assert (reason, status) == (f"Error: {place} holds a {says}", 1)


@pytest.mark.parametrize("aside", [False, True])
@pytest.mark.parametrize("tpm2", [False, True])
def test_no_new_tpm_beside_what_is_left_of_another_version(
    tpm2: bool, aside: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unasked, it is the version of what is left, from which the start then refuses to begin."""
    place = tmp_path / "vtpm-cuse" / "vtpm0"
    place.mkdir(parents=True)
    pattern = "TMP{}-00.permall" if aside else "tpm{}-00.permall.bak"
    left = place / pattern.format("2" if tpm2 else "")
    left.write_bytes(with_header(BlobFlag(0), b"state"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert config_of().vtpm.tpm2 is tpm2
    reason, status = error_of("-n", "vtpm0", "--tpm12" if tpm2 else "--tpm2")
    version = "2.0" if tpm2 else "1.2"
    assert (reason, status) == (f"Error: {place} holds {left} of an earlier TPM {version}", 1)
    (place / f"tpm{'' if tpm2 else '2'}-00.permall").write_bytes(b"state")
    assert config_of().vtpm.tpm2 is not tpm2, "one that is whole comes first"


def test_proxy_without_a_word_more() -> None:
    line = CommandLine(swtpm_chardev.PROGRAM, ["--vtpm-proxy"], "swtpm chardev")
    vtpm = settings.chardev_config(line).vtpm
    assert vtpm.state == StateConfig("dir:///no/such/folder/vtpm-cuse/proxy0", own_place=True)
    assert (vtpm.tpm2, vtpm.startup.not_need_init, vtpm.startup.startup) == (True, True, "clear")
    line = CommandLine(swtpm_chardev.PROGRAM, ["--vtpm-proxy", "-n", "x"], "swtpm chardev")
    assert settings.state_config(line) == StateConfig(
        "dir:///no/such/folder/vtpm-cuse/x", own_place=True
    )


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a b", "\n"])
def test_proxy_names_that_cannot_be(name: str) -> None:
    line = CommandLine(swtpm_chardev.PROGRAM, ["--vtpm-proxy", "-n", name], "swtpm chardev")
    with pytest.raises(UsageError, match="cannot be the name of a TPM"):
        settings.chardev_config(line)


def test_no_place_without_a_name() -> None:
    """Nor where the C suite has none, and ends later on."""
    assert settings.state_config(line_of()) is None
    device = CommandLine(swtpm_chardev.PROGRAM, ["--chardev", "/dev/x"], "swtpm chardev")
    assert settings.state_config(device) is None


@pytest.mark.parametrize("name", ["vtpm0", "/dev/vtpm0"])
def test_device_may_be_named_by_its_path(name: str) -> None:
    assert settings.cuse_config(line_of("-n", name)).name == "vtpm0"


@pytest.mark.parametrize(
    ("words", "flags"),
    [
        ((), (False, False)),
        (("--migration", "incoming"), (True, False)),
        (("--migration", "incoming,release-lock-outgoing"), (True, True)),
    ],
)
def test_migration(words: tuple[str, ...], flags: tuple[bool, bool]) -> None:
    vtpm = config_of(*words).vtpm
    assert (vtpm.incoming, vtpm.release_outgoing) == flags


def test_everything() -> None:
    config = config_of(
        *("-M", "0x10", "--min=3", "--foreground", "--tpm2"),
        *("--tpmstate", "dir=state,mode=0600,lock=false"),
        *("--flags", "startup-clear,disable-auto-shutdown"),
        *("--locality", "reject-locality-4,allow-set-locality"),
        *("--profile", "name=null", "--log", "file=log,level=4,truncate", "--pid", "file=pid"),
    )
    assert config == CuseConfig(
        name="vtpm0",
        major=16,
        minor=3,
        process=ProcessConfig(
            background=False,
            log=LogConfig(path="/usr/log", level=4, prefix="", truncate=True),
            pid=PidConfig(path="/usr/pid"),
        ),
        vtpm=VtpmConfig(
            tpm2=True,
            state=StateConfig("dir:///usr/state", mode=0o600, lock=False),
            startup=StartupConfig(not_need_init=True, startup="clear", auto_shutdown=False),
            locality=LocalityConfig(reject_locality_4=True, allow_set_locality=True),
            profile=ProfileConfig('{"Name":"null"}'),
        ),
    )


def test_first_name_and_last_of_any_other_option_count() -> None:
    config = config_of("-n", "other", "-M", "1", "-M", "2", "--log", "level=3", "--log", "fd=2")
    assert (config.name, config.major, config.process.log.level) == ("vtpm0", 2, 1)


@pytest.mark.parametrize(
    ("words", "state"),
    [
        (["dir=/a,backend-uri=dir:///b"], StateConfig("dir:///a")),
        (["backend-uri=dir://b"], StateConfig("dir:///usr/b")),
        (["backend-uri=file:///b"], StateConfig("file:///b")),
        (["backend-uri=file:///b,lock=false"], StateConfig("file:///b", lock=False)),
        (["dir=/a,fsync=false,backup"], StateConfig("dir:///a", fsync=False, backup=True)),
        (["backend-uri=odd:b"], StateConfig("odd:b")),
    ],
)
def test_state(words: list[str], state: StateConfig) -> None:
    assert config_of("--tpmstate", *words).vtpm.state == state


def test_tpm_path_is_the_default_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TPM_PATH", "here")
    assert config_of().vtpm.state == StateConfig("dir:///usr/here")
    assert config_of("--tpmstate", "dir=/a").vtpm.state == StateConfig("dir:///a")


@pytest.mark.parametrize(
    ("flags", "not_need_init", "startup"),
    [
        ("not-need-init", True, None),
        ("startup-none", False, "none"),
        ("startup-state,startup-clear", True, "clear"),
        ("startup-none,startup-deactivated,startup-state", True, "state"),
        ("startup-none,startup-deactivated", True, "deactivated"),
        ("startup-clear=no", False, None),
    ],
)
def test_startup(flags: str, not_need_init: bool, startup: StartupKind | None) -> None:
    expected = StartupConfig(not_need_init, startup)
    assert config_of("--tpmstate", "dir=s", "--flags", flags).vtpm.startup == expected


def test_log_without_level_or_prefix() -> None:
    assert config_of().process.log == LogConfig(prefix="swtpm: ")
    assert config_of("--log", "level=0").process.log == LogConfig(prefix="", level=1)
    assert config_of("--log", "file=-").process.log.path == "-"
    assert config_of("--log", "fd=-1,prefix=a b").process.log == LogConfig(prefix="a b")


def test_pid_by_descriptor(tmp_path: Path) -> None:
    with (tmp_path / "pid").open("wb") as file:
        assert config_of("--pid", f"fd={file.fileno()}").process.pid == PidConfig(fd=file.fileno())


def test_profile_from_file_and_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "profile"
    path.write_bytes(b'\n {"Name":"custom"} \n')
    by_path = config_of("--profile", f"file={path},remove-disabled=check").vtpm.profile
    by_fd = config_of("--profile", f"fd={os.open(path, os.O_RDONLY)}").vtpm.profile
    given = config_of("--profile", 'profile={"Name":"a","b":1}').vtpm.profile
    assert by_path == ProfileConfig('{"Name":"custom"}', "check")
    assert by_fd == ProfileConfig('{"Name":"custom"}')
    assert given == ProfileConfig('{"Name":"a","b":1}')


@pytest.mark.parametrize(
    ("words", "status", "reason"),
    [
        ([], 254, "Error: device name missing"),
        (["-n", ""], 254, "Error: '' cannot be the name of a device"),
        (["-n", "../x"], 254, "Error: '../x' cannot be the name of a device"),
        (["-n", "a b"], 254, "Error: 'a b' cannot be the name of a device"),
        (["-n", "a\nb"], 254, "Error: 'a\nb' cannot be the name of a device"),
        (["-n", "a", "x"], 1, "Unknown parameter 'x'"),
        (["-M", "-1"], 255, "Error: '-1' of option --maj is not a number"),
        (["-n", "a", "-M", "65536"], 255, "Error: '65536' of option --maj is not a number"),
        (["-n", "a", "-m", "x"], 255, "Error: 'x' of option --min is not a number"),
        (["-n", "a", "-r", "no-such-user"], 251, "Error: User 'no-such-user' does not exist."),
        (["-n", "a", "-r", "-1"], 251, "Error: uid -1 outside valid range."),
        (["-n", "a", "-r", "4294967295"], 251, "Error: uid 4294967295 outside valid range."),
        (["-n", "a", "--seccomp", "action=x"], 253, "Unsupported seccomp log action x"),
        (["-n", "a", "--tpmstate", "x"], 253, "Error parsing tpmstate options: Unknown option 'x'"),
        (["-n", "a", "--tpmstate", "mode=0600"], 253, "The dir or backend-uri parameters is"),
        (["-n", "a", "--log", "fd=x"], 253, "Error parsing logging options: invalid number 'x'"),
        (["-n", "a", "--flags", ""], 253, "Error parsing flags options: Unknown option ''"),
        (["-n", "a", "--locality", "5"], 253, "Error parsing locality options: Unknown option '5'"),
        (["-n", "a", "--pid", "fd=-1"], 253, "The file or fd parameter is required for the pid"),
        (["-n", "a", "--pid", "fd=77"], 253, "Bad filedescriptor 77 for pid file"),
        (["-n", "a", "--profile", "name=a,fd=0"], 253, "Only one profile option parameter of"),
        (["-n", "a", "--profile", "remove-disabled=check"], 253, "No profile option parameter"),
        (["-n", "a", "--profile", "remove-disabled=x"], 253, "Error parsing profile options: 'x'"),
        (["-n", "a", "--profile", "file=/nowhere"], 253, "Could not read the profile from"),
        (["-n", "a", "--profile", "file=/usr/bin/env"], 253, "Could not read the profile from"),
    ],
)
def test_errors(words: list[str], status: int, reason: str) -> None:
    message, exit_status = error_of(*words)
    assert message.startswith(reason)
    assert exit_status == status


def test_unknown_option_is_named_and_ignored(capsys: pytest.CaptureFixture[str]) -> None:
    assert config_of("--bogus") == config_of()
    assert capsys.readouterr().err == "swtpm-cuse: unrecognized option '--bogus'\n"


def test_option_without_its_value_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="Try 'swtpm-cuse --help'") as info:
        line_of("-n")
    assert info.value.exit_status == 1
    assert "requires an argument" in capsys.readouterr().err


def test_other_interfaces_have_one_exit_status() -> None:
    line = CommandLine(swtpm_socket.PROGRAM, ["--log", "fd=x"])
    with pytest.raises(UsageError) as info:
        settings.log_config(line)
    assert info.value.exit_status == 1
    with pytest.raises(UsageError):
        CommandLine(swtpm_socket.PROGRAM, ["--bogus"])


@pytest.mark.parametrize(
    ("flags", "startup"),
    [
        ("", StartupConfig(not_need_init=True, startup="clear")),
        ("not-need-init", StartupConfig(not_need_init=True, startup="clear")),
        ("startup-none", StartupConfig(not_need_init=True, startup="none")),
        ("startup-state", StartupConfig(not_need_init=True, startup="state")),
    ],
)
def test_device_of_the_kernels_is_started_for_it(flags: str, startup: StartupConfig) -> None:
    words = ["--vtpm-proxy", *(["--flags", flags] if flags else [])]
    words += ["--locality", "reject-locality-4"]
    config = settings.chardev_config(CommandLine(swtpm_chardev.PROGRAM, words))
    assert (config.proxy, config.path, config.fd) == (True, None, None)
    assert config.vtpm.startup == startup
    assert config.vtpm.locality == LocalityConfig(True, True)


def test_other_device_waits_to_be_told() -> None:
    words = ("-c", "dev/x", "-f", "3", "-d")
    config = settings.chardev_config(CommandLine(swtpm_chardev.PROGRAM, words))
    assert (config.proxy, config.path, config.fd) == (False, "/usr/dev/x", None)
    assert config.vtpm == VtpmConfig()
    assert config.process.background


@pytest.mark.parametrize(
    ("name", "managed"),
    [("vtpm0", "vtpmrm0"), ("tpm12", "tpmrm12"), ("a/vtpm1", "a/vtpmrm1"), ("mine", "minerm")],
)
def test_the_device_with_a_resource_manager_is_named_as_the_kernels(
    name: str, managed: str
) -> None:
    assert settings.cuse_config(line_of("-n", name)).managed == managed
    words = ("--tpm2", "--tpmstate", "dir=s")
    assert settings.cuse_config(line_of("-n", name, *words)).managed is None
    asked = settings.cuse_config(line_of("-n", name, *words, "--resource-manager"))
    assert asked.managed == managed
    named = settings.cuse_config(line_of("-n", name, *words, "--resource-manager=/dev/other"))
    assert named.managed == "other"


LIMITS = "objects=10,sessions=64,sessions-of-a-user=63,abandoned=0,clients-of-a-user=5,clients=900"
LIMITED = {
    "objects": 10,
    "sessions": 64,
    "sessions_of_a_user": 63,
    "abandoned": 0,
    "clients_of_a_user": 5,
    "clients": 900,
}


def test_limits_of_the_resource_manager_on_every_way() -> None:
    words = ("--managed-limits", LIMITS)
    managed = ("--managed", "type=unixio,path=m", "--tpm2", *words)
    socket = CommandLine(swtpm_socket.PROGRAM, ("--tpmstate", "dir=s", *managed))
    chardev = CommandLine(swtpm_chardev.PROGRAM, ("-c", "x", *managed))
    fuse = CommandLine(swtpm_fuse.PROGRAM, ("-n", "tpm", "--mount", "m", *words))
    chip = ("--tpm", "/dev/tpm0", "-n", "tpm", *words)
    made = (
        settings.cuse_config(line_of("-n", "vtpm0", *words)),
        settings.socket_config(socket),
        settings.chardev_config(chardev),
        settings.fuse_config(fuse),
        manager_config(CommandLine(swtpm_resource_manager.PROGRAM, chip)),
    )
    assert [dict(config.vtpm.limits) for config in made] == [LIMITED] * 5
    assert Limits(**LIMITED)._asdict() == LIMITED


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--managed-limits", "objects=2"), "objects=2 of --managed-limits is not from 3 to 256"),
        (("--managed-limits", "sessions=65"), "is not from 3 to 64"),
        (("--managed-limits", "clients=0"), "is not from 1 to 900"),
        (("--managed-limits", "clients=-1"), "positive number '-1'"),
        (("--managed-limits", "keys=7"), "Unknown option 'keys=7'"),
        (
            ("--managed-limits", "objects=9", "--tpm2", "--tpmstate", "dir=s"),
            "--managed-limits is for a resource manager: give --resource-manager",
        ),
    ],
)
def test_limits_that_are_refused(words: tuple[str, ...], says: str) -> None:
    assert says in error_of("-n", "vtpm0", *words)[0]


def test_processes_as_clients() -> None:
    unix, tcp = "type=unixio,path=m,per-process", "type=tcp,port=1,per-process"
    words = ("--tpmstate", "dir=s", "--tpm2", "--managed")
    managed = settings.socket_config(CommandLine(swtpm_socket.PROGRAM, (*words, unix))).managed
    assert managed is not None
    assert managed.per_process
    with pytest.raises(UsageError, match="per-process is for type=unixio"):
        settings.socket_config(CommandLine(swtpm_socket.PROGRAM, (*words, tcp)))
