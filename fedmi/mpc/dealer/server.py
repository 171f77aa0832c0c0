"""The dealer's process: python -m fedmi.mpc.dealer.server PORT LOG.

It listens on loopback, says its port and its public key as one line of JSON on standard output, and
ends when standard input does, that is when its parent is gone.
"""

import json
import os
import select
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from fedmi.mpc.dealer.desk import Desk
from fedmi.mpc.dealer.sm2 import KeyPair

HOST = "127.0.0.1"
LOOK_SECONDS = 1.0


class Server(ThreadingHTTPServer):
    """A thread for each connection."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, port: int, desk: Desk) -> None:
        super().__init__((HOST, port), Handler)
        self.desk = desk


class Handler(BaseHTTPRequestHandler):
    """One connection of a party's engine."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    server: Server

    def do_POST(self) -> None:
        size = self.headers.get("Content-Length", "")
        if not size.isdecimal():
            self.send_error(411)
            return
        pieces = self.server.desk.answer(self.path, self.rfile.read(int(size)))
        self.send_response(200)
        self.send_header("Content-Length", str(sum(len(piece) for piece in pieces)))
        self.end_headers()
        for piece in pieces:
            self.wfile.write(piece)
        self.wfile.flush()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: what was asked is in the log of the desk."""


def main(port: int, log: Path) -> None:
    keys = KeyPair.generate()
    server = Server(port, Desk(keys, log))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    greeting = {"port": server.server_address[1], "public_key": keys.pem}
    sys.stdout.write(json.dumps(greeting) + "\n")
    sys.stdout.flush()
    _outlast(os.getppid(), sys.stdin.fileno())


def _outlast(parent: int, line: int) -> None:
    """Wait until the parent closes the line, or is gone and another process holds the line open."""
    while os.getppid() == parent:
        if select.select([line], [], [], LOOK_SECONDS)[0] and not os.read(line, 4096):
            return


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
