"""Targets: what servers and TPMs answer to the programs that ask them."""

from __future__ import annotations

import contextlib
import io
import socket
from types import SimpleNamespace
from typing import TYPE_CHECKING, Final, cast
from unittest import mock

from tests.fuzz.pieces import pieces
from tests.support.certificates import CERTS
from tests.support.setup_tpms import MadeUpTpm
from vtpm_cuse.ca.certificates import CertificateKind
from vtpm_cuse.cli import swtpm_bios
from vtpm_cuse.cli.bios_steps import Wanted, steps
from vtpm_cuse.cli.ca.options import point_key, rsa_key
from vtpm_cuse.client import ioctl as ioctl_client
from vtpm_cuse.client.channel import SocketControl
from vtpm_cuse.client.ioctl import DeviceControl
from vtpm_cuse.manufacture.plan import EccKey, KeyAlgorithm, Ownership, RsaKey, SetupPlan
from vtpm_cuse.manufacture.tpm2 import Tpm2Setup
from vtpm_cuse.manufacture.tpm12 import Tpm12Setup
from vtpm_cuse.wire.ptm import PtmBlobType, PtmStateFlag

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vtpm_cuse.client.base import Control
    from vtpm_cuse.client.commands import TpmAddress
    from vtpm_cuse.manufacture.plan import TpmFacts, TpmKey

_REQUESTS: Final[tuple[Callable[[Control], object], ...]] = (
    lambda tpm: tpm.capability(),
    lambda tpm: tpm.config(),
    lambda tpm: tpm.info(7),
    lambda tpm: tpm.established(),
    lambda tpm: tpm.set_buffer_size(0),
    lambda tpm: tpm.get_state(PtmBlobType.PTM_BLOB_TYPE_PERMANENT, PtmStateFlag(0)),
    lambda tpm: tpm.set_state(PtmBlobType.PTM_BLOB_TYPE_PERMANENT, bytes(9000)),
    lambda tpm: tpm.hash([b"abc"]),
    lambda tpm: tpm.shutdown(),
)


def channel(data: bytes) -> None:
    """A hostile server at the other end of a control channel; the same answer to each request."""
    with contextlib.ExitStack() as stack:

        def connect() -> socket.socket:
            ours, theirs = socket.socketpair()
            stack.enter_context(theirs)
            theirs.sendall(data[1:])
            theirs.shutdown(socket.SHUT_WR)
            return ours

        tpm = stack.enter_context(SocketControl(connect))
        answer = _REQUESTS[sum(data[:1]) % len(_REQUESTS)](tpm)
        assert answer is None or len(repr(answer)) < 1 << 21


def ioctl(data: bytes) -> None:
    """A hostile device: it fills the argument of each ioctl anew, and reads never end."""
    answers = list(pieces(data[2:])) or [b""]
    count = 0

    def fake_ioctl(_fd: int, _number: int, argument: bytearray) -> int:
        nonlocal count
        answer = answers[count % len(answers)][: len(argument)]
        argument[: len(answer)] = answer
        count += 1
        return 0

    with (
        mock.patch.object(ioctl_client, "fcntl", SimpleNamespace(ioctl=fake_ioctl)),
        DeviceControl("/dev/zero", sum(data[1:2]) << 5) as tpm,
    ):
        answer = _REQUESTS[sum(data[:1]) % len(_REQUESTS)](tpm)
    assert answer is None or len(repr(answer)) < 1 << 23


class _Address:
    """Each connection to it gets the next of some answers."""

    def __init__(self, answers: Iterator[bytes]) -> None:
        self._answers = answers

    @contextlib.contextmanager
    def opened(self) -> Iterator[int]:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            theirs.sendall(next(self._answers, b""))
            theirs.shutdown(socket.SHUT_WR)
            yield ours.fileno()


def bios(data: bytes) -> None:
    """A TPM that answers swtpm_bios anything."""
    is_tpm2 = data[:1] < b"\x80"
    wanted = Wanted(self_test=True, ensure_activated=True, give_up=True)
    address = cast("TpmAddress", _Address(pieces(data[1:])))
    todo = list(steps(wanted, tpm2_=is_tpm2))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert swtpm_bios._send(address, todo, tpm2=is_tpm2) in {0, 128, 129}


_CERTIFICATE: Final = (CERTS / "tpm2-ek-rsa2048.der").read_bytes()


class _Certifier:
    def certify(
        self, kind: CertificateKind, key: TpmKey, facts: TpmFacts, tpm_serial: str = ""
    ) -> bytes:
        """As far as the options of a certificate tool, which take what the TPM said."""
        assert kind is not CertificateKind.AIK
        assert facts.specification.family
        assert tpm_serial.isprintable()
        assert bool(tpm_serial) is kind.is_identity
        match key:
            case RsaKey():
                rsa_key(key.text, "--ek")
            case EccKey():
                point_key(key.curve, key.x.hex(), key.y.hex(), "--ek")
        return _CERTIFICATE

    def begin(self) -> None:
        pass

    cancel = close = begin


class _Quiet:
    def line(self, text: str) -> None:
        assert text

    step = line


class _Tpm(MadeUpTpm):
    """Answers anything; *facts* by turns good and as given."""

    def __init__(self, info: bytes, answers: Iterator[bytes], *, tpm2: bool) -> None:
        self._info, self._answers, self.tpm2 = info, answers, tpm2

    def process(self, command: bytes) -> bytes:
        assert command[2:6] == len(command).to_bytes(4, "big")
        return next(self._answers, b"")

    def info(self, flags: int) -> str:
        assert flags
        return self._info.decode(errors="replace")


_USUAL: Final = (KeyAlgorithm.RSA2048, KeyAlgorithm.P384)
_RSA_3072: Final = (KeyAlgorithm.RSA3072,)


def setup_tpm2(data: bytes) -> None:
    """A TPM 2.0 that answers swtpm_setup anything."""
    which = sum(data[:1])
    plan = SetupPlan(
        tpm2=True,
        create_ek=bool(which & 1),
        allow_signing=bool(which & 2),
        ek_algorithms=_RSA_3072 if which & 16 else _USUAL,
        spk=KeyAlgorithm.P384 if which & 4 else KeyAlgorithm.RSA2048 if which & 8 else None,
        iak=KeyAlgorithm.P256 if which & 64 else None,
        idevid=KeyAlgorithm.RSA2048 if which & 128 else None,
        ek_certificate=True,
        platform_certificate=True,
        lock_nvram=True,
        pcr_banks=("sha256", "sha3-256") if which & 32 else None,
    )
    info, *answers = (*pieces(data[1:]), b"")
    Tpm2Setup(_Tpm(info, iter(answers), tpm2=True), plan, _Certifier(), _Quiet()).run()


def setup_tpm12(data: bytes) -> None:
    """A TPM 1.2 that answers swtpm_setup anything."""
    which = sum(data[:1])
    plan = SetupPlan(
        tpm2=False,
        create_ek=True,
        ek_certificate=bool(which & 1),
        platform_certificate=True,
        lock_nvram=True,
        ownership=Ownership(bytes(20), bytes(20)) if which & 2 else None,
    )
    info, *answers = (*pieces(data[1:]), b"")
    Tpm12Setup(_Tpm(info, iter(answers), tpm2=False), plan, _Certifier(), _Quiet()).run()
