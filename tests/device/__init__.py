"""What every device file must do, whatever serves it: tests without a device of their own.

A module elsewhere takes them over with a star import and gives them the fixture ``server``.
"""

import pytest

pytest.register_assert_rewrite("tests.device.semantics", "tests.device.tpm2_tools")
