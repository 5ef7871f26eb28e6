"""The handbook's pages: nothing in them stays unread by a test, and no message without a page."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.lint.test_papers import missing
from tests.support.handbook import PAGES, boxes
from tools.manual.messages import KINDS, fitting, messages, page

if TYPE_CHECKING:
    from pathlib import Path

READ = {"{toctree}", "{eval-rst}"}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_what_is_to_be_typed_is_typed_by_a_test(path: Path) -> None:
    """A box is run, or names the test that does the same; output has no box."""
    text = path.read_text(encoding="utf-8")
    there = boxes(path)
    assert text.count("\n```") == 2 * (len(there) + sum(text.count(f"```{kind}") for kind in READ))
    for box in there:
        assert box.language == "sh" or box.tested_as
        assert missing(box.tested_as) == []


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.title)
def test_a_kind_of_message_is_there_and_says_what_to_do(kind: object) -> None:
    assert isinstance(kind, type(KINDS[0]))
    assert all(messages()[carrier] for carrier in kind.raised)
    assert kind.cause
    assert kind.cure


def test_every_message_has_a_page() -> None:
    """Whatever raises or logs it, but for what shows a fault of ours."""
    there = page()
    for carrier, texts in messages().items():
        if fitting(carrier) is None:
            continue
        assert all(" ".join(text.split()) in there for text in texts)


def test_a_message_is_found_however_it_is_written(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text(
        "def refused(name: str) -> UsageError:\n"
        "    return UsageError(f'{name} is no file')\n"
        "def use(name: str) -> None:\n"
        "    reason = f'no such {name}' + '; make it'\n"
        "    raise NewError(reason)\n"
        "def other() -> None:\n"
        "    raise refused(what='it is missing')\n"
        "    _log.error('%s is gone', 1)\n"
    )
    assert messages(tmp_path) == {
        "UsageError": {"… is no file", "it is missing"},
        "NewError": {"no such …; make it"},
        "log error": {"… is gone"},
    }
    with pytest.raises(LookupError, match="NewError"):
        fitting("NewError")
