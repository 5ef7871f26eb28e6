"""``relay.py PATH``: standard input and output are a connection to a Unix socket, for a TCTI that runs it."""

from __future__ import annotations

import os
import select
import socket
import sys


def main() -> None:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(sys.argv[1])
    while True:
        readable, _, _ = select.select([0, connection.fileno()], [], [])
        if connection.fileno() in readable:
            data = connection.recv(8192)
            if not data:
                return
            os.write(1, data)
        if 0 in readable:
            data = os.read(0, 8192)
            if not data:
                return
            connection.sendall(data)


if __name__ == "__main__":
    main()
