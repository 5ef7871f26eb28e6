"""What all tests with arbitrary input stand on."""

from __future__ import annotations

import tests.support.untimed  # noqa: F401
