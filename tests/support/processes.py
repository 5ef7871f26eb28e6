"""Tests in a process of their own: libtpms is process-wide, and a mistake there is a SIGSEGV."""

from __future__ import annotations

import functools
import os
import pickle
import sys
import traceback
from typing import TYPE_CHECKING, NoReturn, ParamSpec

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

P = ParamSpec("P")


def in_child(test: Callable[P, None]) -> Callable[P, None]:
    """Runs the test in a forked process; its failure, or its death by a signal, is reported here."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read_end)
            _run_and_leave(write_end, lambda: test(*args, **kwargs))
        os.close(write_end)
        with open(read_end, "rb") as pipe:
            report = pipe.read()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status:
            pytest.fail(f"the process was ended by signal {-status}", pytrace=False)
        skipped, text = pickle.loads(report)  # noqa: S301 - from our own child
        if skipped:
            pytest.skip(text)
        if text:
            pytest.fail(text, pytrace=False)

    return run


def _run_and_leave(write_end: int, test: Callable[[], None]) -> NoReturn:
    report = (False, "")
    try:
        test()
    except pytest.skip.Exception as exc:
        report = (True, str(exc))
    except BaseException:
        report = (False, traceback.format_exc())
    with open(write_end, "wb") as pipe:
        pipe.write(pickle.dumps(report))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
