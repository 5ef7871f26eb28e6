"""What all tests of units stand on."""

from __future__ import annotations

import tests.support.untimed  # noqa: F401
