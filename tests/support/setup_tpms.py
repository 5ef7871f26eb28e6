"""What set-ups work with, made up: a TPM, and who hears how it goes on."""

from __future__ import annotations


class MadeUpTpm:
    """All of a `SetupTpm` but its answers."""

    tpm2 = True

    def info(self, flags: int) -> str:
        assert flags
        return "{}"

    def start(self) -> None:
        pass

    def cancel(self) -> int:
        return 0

    def finish(self) -> dict[str, bytes]:
        return {}

    def close(self) -> None:
        pass


class Lines:
    """Keeps what is reported as done."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def line(self, text: str) -> None:
        self.said.append(text)

    def step(self, text: str) -> None:
        assert text
