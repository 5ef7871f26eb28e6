"""What tests of several folders stand on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support import zygote as started

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def zygote() -> Iterator[started.Zygote]:
    """Starts programs of ours without the price of a new interpreter."""
    starter = started.Zygote()
    yield starter
    starter.close()


@pytest.fixture(scope="module")
def warm(zygote: started.Zygote) -> Iterator[None]:
    """For modules about a TPM or its device: programs of ours that they run begin in the zygote."""
    started.warm.append(zygote)
    yield
    started.warm.pop()
