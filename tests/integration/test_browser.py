"""A web page that somebody else has written, in a real browser, against the TCP ports of a TPM."""

from __future__ import annotations

import contextlib
import http.server
import os
import shutil
import subprocess
import tempfile
import threading
from typing import TYPE_CHECKING

import pytest

from tests.support import commands as tpm
from tests.support import sockets as s
from tests.support.sockets import RUNNING, Server, u32
from tests.support.waiting import PATIENCE_SECONDS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BROWSER = shutil.which("chromium")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="apt-get install chromium")

INDEX = 0x01800001
CLEAR = bytes.fromhex("80020000001b000001264000000c00000009400000090000000000")
TIMES = 8000
"""The server's reads cut the body anywhere, and some of so many just before a command."""

PAGE = """<!doctype html><title>page</title>
<form id=form method=post enctype=text/plain target=frame><textarea name=x></textarea></form>
<iframe name=frame></iframe>
<script>
const ports = [DATA, CONTROL], bodies = [BODIES].map(body => Array(TIMES).fill(body).flat());
const say = what => fetch('/said/' + what, {method: 'POST'});
async function attack() {
  for (const port of ports) for (const body of bodies) {
    const stop = AbortSignal.timeout(5000);
    await fetch(`http://127.0.0.1:${port}/`,
      {method: 'POST', mode: 'no-cors', body: Uint8Array.from(body), signal: stop})
      .then(() => say('answered'), error => say('ended'));
    form.action = `http://127.0.0.1:${port}/`;
    form.firstChild.value = 'x' + String.fromCharCode(...body.slice(0, 900).filter(byte => byte < 128)).repeat(9);
    form.submit();
  }
  await say('done');
}
addEventListener('load', attack);
</script>"""


class Page:
    """Serves the page, and hears what it says."""

    def __init__(self, text: str) -> None:
        self.said: list[str] = []
        self.done = threading.Event()
        page = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._reply(text.encode())

            def do_POST(self) -> None:
                page.said.append(self.path.removeprefix("/said/"))
                self._reply(b"")
                if page.said[-1] == "done":
                    page.done.set()

            def _reply(self, body: bytes) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "text/html")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/"


@contextlib.contextmanager
def served(text: str) -> Iterator[Page]:
    page = Page(text)
    thread = threading.Thread(target=page.server.serve_forever)
    thread.start()
    try:
        yield page
    finally:
        page.server.shutdown()
        page.server.server_close()
        thread.join()


def visit(page: Page) -> None:
    """Until the page says that it has done its work."""
    options = ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run")
    null = subprocess.DEVNULL
    # Not below pytest's folder: the browser has a socket in there, whose path must be short.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        own = {"PATH": os.environ["PATH"], "HOME": home, "TMPDIR": home}
        words = [str(BROWSER), *options, f"--user-data-dir={home}", page.url]
        with subprocess.Popen(words, stdin=null, stdout=null, stderr=null, env=own) as browser:
            try:
                assert page.done.wait(PATIENCE_SECONDS), f"the page has said {page.said}"
            finally:
                browser.terminate()


def test_a_page_reaches_neither_the_tpm_nor_its_control(tmp_path: Path) -> None:
    """By fetch() and by forms, with commands and requests in their bodies."""
    with Server(tmp_path, *RUNNING, data="tcp", control="tcp") as server:
        with server.data() as data:
            assert tpm.code_of(data.command(tpm.nv_define(INDEX, 8))) == 0
            assert tpm.code_of(data.command(tpm.nv_write(INDEX, b"12345678"))) == 0
        bodies = [list(body) for body in (CLEAR, u32(s.SHUTDOWN), u32(s.STOP))]
        text = PAGE.replace("DATA", str(server.data_address))
        text = text.replace("CONTROL", str(server.control_address)).replace("TIMES", str(TIMES))
        with served(text.replace("BODIES", ",".join(map(str, bodies)))) as page:
            visit(page)
        assert page.said == ["ended"] * 6 + ["done"]
        assert "does not speak this protocol" in server.log_text(), "the page has reached it"
        with server.control() as control, server.data() as data:
            assert control.control(s.GET_CAPABILITY, size=8) == u32(0, 0x1FFFF)
            assert tpm.nv_data(data.command(tpm.nv_read(INDEX, 8))) == b"12345678"
