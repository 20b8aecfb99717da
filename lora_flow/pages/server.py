"""A server for the browser of this machine alone: a few known paths, each with a function that answers it.

It listens on the loopback address, answers GET alone, and reads no file by a name that it is given. A page of another
site cannot ask it: its name would stand in the header `Host`, even where it has been made to mean this machine.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from lora_flow.checks import InputError, require_integer

LOOPBACK = "127.0.0.1"
LONGEST = 16_384  # characters of a query

Answer = Callable[[Mapping[str, str]], tuple[str, bytes]]
"""From a query to the kind of an answer, as in `Content-Type`, and its bytes. `InputError` says what is wrong."""


def server_of(answers: Mapping[str, Answer], port: int = 0) -> ThreadingHTTPServer:
    """A server that answers these paths at a port of the loopback address, 0 for a free one; `serve_forever` runs it.

    **Raises:** `InputError` for a port that is no such number, or that is in use.
    """
    require_integer("port", port, "lie between 0, for a free one, and 65535", 0, 65535)
    try:
        server = ThreadingHTTPServer((LOOPBACK, port), type("Handler", (_Handler,), {"answers": dict(answers)}))
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        raise InputError(f"port must be free, got {port}: {error.strerror}") from error
    server.daemon_threads = True
    return server


def address_of(server: ThreadingHTTPServer) -> str:
    return f"http://{LOOPBACK}:{server.server_port}/"


class _Handler(BaseHTTPRequestHandler):
    """One connection of a browser."""

    answers: Mapping[str, Answer]
    protocol_version = "HTTP/1.1"
    server: Any

    def do_GET(self) -> None:
        try:
            self._send(*self._answered())
        except (BrokenPipeError, ConnectionResetError):  # the reader has gone
            self.close_connection = True

    def _answered(self) -> tuple[int, str, bytes]:
        port = self.server.server_port
        if self.headers.get("Host") not in (f"{LOOPBACK}:{port}", f"localhost:{port}"):
            return _refused(403, f"the host must be {LOOPBACK}:{port}")
        asked = urlsplit(self.path)
        if asked.path not in self.answers:
            return _refused(404, f"the path must be one of {', '.join(self.answers)}")
        if len(asked.query) > LONGEST:
            return _refused(414, f"the query must have at most {LONGEST} characters")
        try:
            return 200, *self.answers[asked.path](dict(parse_qsl(asked.query)))
        except InputError as error:
            return _refused(400, str(error))
        except Exception as error:  # a damaged chunk, for instance, of which the page tells
            return _refused(500, f"{type(error).__name__}: {error}")

    def _send(self, status: int, kind: str, content: bytes) -> None:
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": str(len(content)), "Cache-Control": "no-store"}
        headers |= {"X-Content-Type-Options": "nosniff", "Cross-Origin-Resource-Policy": "same-origin"}
        headers |= {"X-Frame-Options": "DENY", "Referrer-Policy": "no-referrer"}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def version_string(self) -> str:
        return "lora-flow"

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


def _refused(status: int, why: str) -> tuple[int, str, bytes]:
    return status, "text/plain; charset=utf-8", " ".join(why.split())[:500].encode()
