"""A Unix socket as standard input and output: tpm2-tss' ``cmd`` TCTI starts this file.

That library has no TCTI for a stream of commands on a Unix socket: ``swtpm`` wants a control channel
and connects anew for each command, so a client would lose what it has loaded. This is started with
``-I -S``, and knows nothing but a few modules that are quickly there.
"""

import _socket  # what `socket` adds takes as long to import as all the rest of a start
import os
import select
import sys

_SIZE = 1 << 16


def main() -> int:
    """Both ways, until one side ends; the path is the first argument."""
    connection = _socket.socket(_socket.AF_UNIX)
    try:
        connection.connect(sys.argv[1])
    except OSError as exc:
        sys.stderr.write(f"{sys.argv[1]}: {exc.strerror}\n")
        return 1
    ways = {0: connection.fileno(), connection.fileno(): 1}
    poll = select.poll()
    for source in ways:
        poll.register(source, select.POLLIN)
    while True:
        for source, _ in poll.poll():
            try:
                data = os.read(source, _SIZE)
            except ConnectionResetError:
                data = b""
            if not data:
                return 0
            while data:
                data = data[os.write(ways[source], data) :]


if __name__ == "__main__":
    sys.exit(main())
