"""One stream of commands for our managed device and the kernel's: answers differ where we say so."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.kernel.proxy import Proxy
from tests.support.manager_differences import KERNEL, steps_of
from tests.support.manager_peers import Kernel
from tests.support.manager_stream import answers, differing

if TYPE_CHECKING:
    from tests.kernel.conftest import Serve

pytestmark = pytest.mark.usefixtures("warm")


def test_the_kernels(serve: Serve, tmp_path: Path) -> None:
    serve("vtpm7", more=("--resource-manager",)).start()
    with Kernel(Path("/dev/vtpmrm7")) as peer:
        ours = answers(peer)
    with Proxy(tmp_path / "proxy") as proxy, Kernel(proxy.shared) as peer:
        theirs = answers(peer)
    assert differing(ours, theirs) == steps_of(KERNEL)
