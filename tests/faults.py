"""A door before a real tracking server that refuses, fails, hangs, or loses an answer."""

from __future__ import annotations

import contextlib
import http.client
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

HANG_SECONDS = 60.0
HEADERS = ("Content-Type", "Content-Length", "Authorization")
# (method, path) -> a status to answer with, "hang", "lose" (do it and hang), or nothing: pass it on
Fault = Callable[[str, str], int | str | None]


class Door:
    """``fault`` is asked of every request and may be changed at any time."""

    def __init__(self, behind: str) -> None:
        self.behind = urlsplit(behind).netloc
        self.fault: Fault = lambda method, path: None
        self.asked: list[tuple[str, str]] = []
        self.uri = ""
        self.open_again = threading.Event()


@contextlib.contextmanager
def door(behind: str) -> Iterator[Door]:
    made = Door(behind)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            made.asked.append((self.command, self.path))
            fault = made.fault(self.command, self.path)
            if fault == "hang":
                made.open_again.wait(HANG_SECONDS)
                return
            code, data = (fault, b"<html>\n<h1>no</h1>\n</html>") if fault else (0, b"")
            if not isinstance(fault, int):
                onward = http.client.HTTPConnection(made.behind, timeout=HANG_SECONDS)
                kept = {name: self.headers[name] for name in HEADERS if self.headers[name]}
                onward.request(self.command, self.path, body, kept)
                answer = onward.getresponse()
                code, data = answer.status, answer.read()
                onward.close()
            if fault == "lose":
                made.open_again.wait(HANG_SECONDS)
                return
            self.send_response(code)
            self.send_header("Content-Type", "text/html" if fault else "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

        def log_message(self, format: str, *args: object) -> None:
            return None

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    made.uri = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield made
    finally:
        made.open_again.set()
        server.shutdown()
        thread.join()
        server.server_close()
