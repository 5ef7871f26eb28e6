"""One life of a TPM whose NVRAM counts: ``crash_child.py 2|1.2 URI [backup] [key=FILE]``.

Says ``begin``, ``powered``, then ``start N`` with what it found, 0 in a new TPM. Then, for each
line it is given, writes N+1 and says so; for the line ``run`` it goes on by itself until somebody
ends it.
"""

from __future__ import annotations

import sys

from tests.support import commands as tpm
from vtpm_cuse.config import KeySource, StartupConfig, StateConfig, VtpmConfig
from vtpm_cuse.service.compose import make_vtpm, power_on

SIZE = 1024
INDEX_12 = 0x1101


class Counter:
    """A number in NVRAM, written many times over so that a torn write shows."""

    def __init__(
        self, uri: str, *, tpm2: bool, backup: bool = False, key: str | None = None
    ) -> None:
        self._tpm2 = tpm2
        config = VtpmConfig(
            tpm2=tpm2,
            state=StateConfig(uri=uri, backup=backup),
            startup=StartupConfig(not_need_init=True, startup="clear"),
            key=None if key is None else KeySource(file=key),
        )
        self._vtpm = make_vtpm(config)
        power_on(self._vtpm, config)

    def close(self) -> None:
        self._vtpm.close()

    def run(self, command: bytes) -> bytes:
        response = self._vtpm.process(command)
        assert tpm.code_of(response) == 0, response.hex()
        return response

    def prepare(self) -> None:
        """Where nothing was ever written. A life may have ended between the two steps."""
        if self._tpm2:
            if tpm.code_of(self._vtpm.process(tpm.nv_read(tpm.NV_INDEX, SIZE))) == 0:
                return
            self._vtpm.process(tpm.nv_define(tpm.NV_INDEX, SIZE))
        else:
            self.run(tpm.TPM12_CONTINUE_SELF_TEST)
            if tpm.code_of(self._vtpm.process(tpm.tpm12_nv_read(INDEX_12, SIZE))) == 0:
                return
            self.run(tpm.TPM12_PHYSICAL_PRESENCE_CMD_ENABLE)
            self.run(tpm.TPM12_PHYSICAL_PRESENCE_PRESENT)
            self._vtpm.process(tpm.tpm12_nv_define(INDEX_12, SIZE))
        self.write(0)

    def read(self) -> int:
        """The number, after a check that it is whole."""
        if self._tpm2:
            data = tpm.nv_data(self.run(tpm.nv_read(tpm.NV_INDEX, SIZE)))
        else:
            data = tpm.tpm12_nv_data(self.run(tpm.tpm12_nv_read(INDEX_12, SIZE)))
        numbers = {data[at : at + 8] for at in range(0, SIZE, 8)}
        assert len(data) == SIZE
        assert len(numbers) == 1, f"torn: {numbers}"
        return int.from_bytes(numbers.pop(), "big")

    def write(self, number: int) -> None:
        data = number.to_bytes(8, "big") * (SIZE // 8)
        if self._tpm2:
            self.run(tpm.nv_write(tpm.NV_INDEX, data))
        else:
            self.run(tpm.tpm12_nv_write(INDEX_12, data))


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> None:
    version, uri, *options = sys.argv[1:]
    key = next((word[4:] for word in options if word.startswith("key=")), None)
    say("begin")
    counter = Counter(uri, tpm2=version == "2", backup="backup" in options, key=key)
    say("powered")
    counter.prepare()
    number = counter.read()
    say(f"start {number}")
    while line := sys.stdin.readline():
        number += 1
        counter.write(number)
        say(str(number))
        while line.strip() == "run":
            number += 1
            counter.write(number)
            say(str(number))


if __name__ == "__main__":
    main()
