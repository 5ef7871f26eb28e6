"""Every exception of the package has its code, errno, exit status and sentence."""

from __future__ import annotations

import errno
import pickle

import pytest

from vtpm_cuse import errors, faults

# Exception, TPM or PTM result, errno, exit status, sentence.
TABLE: list[tuple[BaseException, int, int, int, str]] = [
    (errors.WireError("X", 8, 3), 3, errno.EINVAL, 1, "X: 8 bytes needed, 3 there"),
    (errors.PtmError(0x3D), 0x3D, errno.EIO, 1, "request failed with result 0x3d"),
    (errors.PtmError(0x3D, "no such locality"), 0x3D, errno.EIO, 1, "no such locality"),
    (errors.BlobError(0xB, "cut"), 0xB, errno.EIO, 1, "cut"),
    (errors.AnswerError(0xA, "it says no"), 0xA, errno.EIO, 1, "it says no"),
    (errors.TpmUnavailable(0x1F, "full"), 0x1F, errno.EIO, 1, "full"),
    (errors.DeviceError(errno.EBUSY), 9, errno.EBUSY, 1, "16"),
    (errors.EngineError("F", 0x1C), 0x1C, errno.EIO, 1, "F failed: 0x1c"),
    (errors.EngineUnavailable("no libtpms"), 9, errno.EIO, 1, "no libtpms"),
    (errors.EngineUnavailable("no libtpms", "get it"), 9, errno.EIO, 1, "no libtpms; get it"),
    (errors.StorageError("/x", "full"), 9, errno.EIO, 1, "/x: full"),
    (errors.StateMissing("/x", "gone"), 0x800, errno.EIO, 1, "/x: gone"),
    (errors.StateLocked("/x", "taken"), 9, errno.EIO, 1, "/x: taken"),
    (errors.StateNoRoom("/x", "small"), 0x17, errno.EIO, 1, "/x: small"),
    (errors.StateDamaged("/x", "cut", 3), 3, errno.EIO, 1, "/x: cut"),
    (errors.StateKeyRejected("/x", "no key", 0xD), 0xD, errno.EIO, 1, "/x: no key"),
    (errors.CertificateError("/x", "no key"), 9, errno.EIO, 1, "/x: no key"),
    (errors.DeviceGone("unmounted"), 9, errno.EIO, 1, "unmounted"),
    (errors.FrontendError("no device"), 9, errno.EIO, 1, "no device"),
    (errors.FrontendError("no device", "modprobe"), 9, errno.EIO, 1, "no device; modprobe"),
    (errors.LabError("no TPM"), 9, errno.EIO, 1, "no TPM"),
    (errors.LabError("no TPM", "twice\nit said so"), 9, errno.EIO, 1, "no TPM: it said so"),
    (errors.UsageError("bad option", 255), 9, errno.EIO, 255, "bad option"),
    (errors.TpmError("TPM2_Clear", 0x921), 9, errno.EIO, 1, "TPM2_Clear failed: 0x921"),
    (errors.FleetError("Busy", "web1", "it is on"), 9, errno.EIO, 1, "web1: it is on"),
    (errors.ChannelError("no message"), 9, errno.EIO, 1, "no message"),
    (errors.MessageError("no JSON"), 9, errno.EIO, 1, "no JSON"),
    (errors.VarlinkError("a.B", {}), 9, errno.EIO, 1, "a.B"),
    (errors.VarlinkError("a.B", {"method": "c.D"}), 9, errno.EIO, 1, "a.B: method c.D"),
    (errors.UsageError("bad option", hint="try -h"), 9, errno.EIO, 1, "bad option; try -h"),
]
OTHERS: list[tuple[BaseException, int, int, int]] = [
    (MemoryError(), 0x17, errno.ENOMEM, 1),
    (KeyboardInterrupt(), 9, errno.EIO, 130),
    (KeyError("bug"), 9, errno.EIO, 1),
]


def _all(cls: type[errors.VtpmError]) -> set[type[errors.VtpmError]]:
    return {cls}.union(*(_all(child) for child in cls.__subclasses__()))


def test_no_class_is_forgotten() -> None:
    assert {type(row[0]) for row in TABLE} == _all(errors.VtpmError) - {
        errors.VtpmError,
        errors.ResultError,
    }


@pytest.mark.parametrize("row", TABLE, ids=lambda row: type(row[0]).__name__)
def test_table(row: tuple[BaseException, int, int, int, str]) -> None:
    exc, result, number, status, sentence = row
    assert faults.tpm_result(exc) == result
    assert faults.errno_of(exc) == number
    assert faults.exit_status(exc) == status
    assert sentence in str(exc)
    assert "\n" not in str(exc)


@pytest.mark.parametrize("row", OTHERS, ids=lambda row: type(row[0]).__name__)
def test_others(row: tuple[BaseException, int, int, int]) -> None:
    exc, result, number, status = row
    assert faults.tpm_result(exc) == result
    assert faults.errno_of(exc) == number
    assert faults.exit_status(exc) == status


def test_only_absence_may_lead_to_a_new_tpm() -> None:
    for exc, result, *_ in TABLE:
        assert (result == 0x800) == isinstance(exc, errors.StateMissing)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: type(row[0]).__name__)
def test_exceptions_survive_a_pipe(row: tuple[BaseException, int, int, int, str]) -> None:
    copy = pickle.loads(pickle.dumps(row[0]))  # noqa: S301 - our own
    assert (type(copy), str(copy), vars(copy)) == (type(row[0]), str(row[0]), vars(row[0]))


@pytest.mark.parametrize("exc", [MemoryError(), SystemError("error return without exception set")])
def test_too_little_memory_is_said_whoever_found_none(exc: BaseException) -> None:
    assert faults.sentence(exc).startswith("There is too little memory; raise the limit")
