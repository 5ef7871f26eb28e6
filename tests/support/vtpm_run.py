"""`vtpm run` in a runtime folder of a test's own."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from tests.support.waiting import PATIENCE_SECONDS, wait_until
from vtpm_cuse.client.child import program_words

if TYPE_CHECKING:
    from collections.abc import Iterator

VTPM: Final = program_words("vtpm_cuse.cli.vtpm.vtpm")


class Place(NamedTuple):
    """A runtime folder of a test's own.

    Attributes:
        folder: Its path.
        env: The environment in which it is one.
    """

    folder: Path
    env: dict[str, str]

    # Any: the options are those of Popen, here and below.
    def run(self, *words: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:  # noqa: ANN401
        """``vtpm run`` to its end."""
        return self.vtpm("run", *words, **options)

    def vtpm(self, *words: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:  # noqa: ANN401
        return subprocess.run(
            [*VTPM, *words],
            **{"env": self.env, "stdin": subprocess.DEVNULL, **options},
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            check=False,
        )

    @contextlib.contextmanager
    def started(self, *words: str | Path, **options: Any) -> Iterator[subprocess.Popen[str]]:  # noqa: ANN401
        """``vtpm run`` with pipes; it is killed in the end."""
        with subprocess.Popen(
            [*VTPM, "run", *words],
            env=self.env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        ) as process:
            try:
                yield process
            finally:
                process.kill()

    def wait_empty(self) -> None:
        """Nothing is left: no socket, folder or mount."""
        wait_until(lambda: not os.listdir(self.folder), "all is removed")


@contextlib.contextmanager
def place_of_its_own() -> Iterator[Place]:
    """Its path is short, for sockets are in it; in the end nothing may be."""
    folder = Path(tempfile.mkdtemp(prefix="vr-"))
    env = {**os.environ, "XDG_RUNTIME_DIR": str(folder), "TMPDIR": str(folder)}
    try:
        found = Place(folder, env)
        yield found
        found.wait_empty()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
