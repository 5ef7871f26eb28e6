"""A signal during a set-up: whenever it comes, the TPM is not taken away below a command."""

from __future__ import annotations

import signal
import threading
from typing import TYPE_CHECKING, NoReturn, cast

import pytest

from tests.support.waiting import PATIENCE_SECONDS
from vtpm_cuse.manufacture import run

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vtpm_cuse.manufacture.plan import SetupTpm


class Ended(BaseException):
    """What the program raises for a signal."""


class Tpm:
    """Runs a command that nothing but `cancel` ends."""

    def __init__(self) -> None:
        self.running = threading.Event()
        self.canceled = threading.Event()
        self.ended = False

    def cancel(self) -> None:
        self.canceled.set()

    def work(self) -> None:
        self.running.set()
        assert self.canceled.wait(PATIENCE_SECONDS)
        self.ended = True
        raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """As swtpm_setup has them; the mask and the handlers are put back."""

    def end(_number: int, _frame: object) -> NoReturn:
        raise Ended

    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    before = signal.signal(signal.SIGTERM, end)
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    signal.signal(signal.SIGTERM, before)


def interrupted(tpm: Tpm) -> None:
    with pytest.raises(Ended):
        run._interruptible(tpm.work, cast("SetupTpm", tpm), None)
    assert tpm.ended


@pytest.mark.parametrize("times", [1, 3])
def test_during_a_command(times: int) -> None:
    tpm = Tpm()

    def send() -> None:
        assert tpm.running.wait(PATIENCE_SECONDS)
        for _ in range(times):
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    sender = threading.Thread(target=send)
    sender.start()
    interrupted(tpm)
    sender.join()


@pytest.mark.parametrize("after", ["__init__", "start"])
def test_around_its_beginning(after: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tpm = Tpm()
    real = getattr(threading.Thread, after)

    def then_a_signal(thread: threading.Thread, *words: object, **named: object) -> None:
        real(thread, *words, **named)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(threading.Thread, after, then_a_signal)
    interrupted(tpm)


def test_afterwards_the_handlers_are_the_old_ones() -> None:
    before = [signal.getsignal(number) for number in run._ENDING]
    done: list[int] = []
    run._interruptible(lambda: done.append(1), cast("SetupTpm", Tpm()), None)
    assert done == [1]
    assert [signal.getsignal(number) for number in run._ENDING] == before
    with pytest.raises(Ended):
        signal.raise_signal(signal.SIGTERM)
