"""A proxy before an S3 that fails as real ones do, when it is told to."""

import http.client
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code></Error>"

# (method, path) -> None: let it pass; a status: answer that; "cut": half of the answer;
# "flip": one bit of the answer turned; "drop": no answer at all.
Fault = Callable[[str, str], "int | str | None"]


class Proxy:
    """Faults are chosen by `fault`, which may be set at any time."""

    def __init__(self, upstream_port: int) -> None:
        self.fault: Fault = lambda method, path: None
        self.requests: list[tuple[str, str]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: object) -> None:
                return

            def _any(self) -> None:
                size = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(size)
                outer.requests.append((self.command, self.path))
                fault = outer.fault(self.command, self.path)
                if isinstance(fault, int):
                    self._answer(fault, [("Content-Type", "application/xml")], SLOW_DOWN)
                    return
                if fault == "drop":
                    self.close_connection = True
                    return
                upstream = http.client.HTTPConnection("127.0.0.1", upstream_port, timeout=60)
                try:
                    headers = dict(self.headers.items()) | {"Connection": "close"}
                    upstream.request(self.command, self.path, body, headers)
                    reply = upstream.getresponse()
                    data = reply.read()
                    kept = [
                        (name, value)
                        for name, value in reply.getheaders()
                        if name.lower()
                        not in ("content-length", "transfer-encoding", "connection", "date")
                    ]
                    length = int(reply.headers.get("Content-Length") or len(data))
                    self._answer(reply.status, kept, data, length, str(fault or ""))
                finally:
                    upstream.close()

            def _answer(
                self,
                status: int,
                headers: list[tuple[str, str]],
                data: bytes,
                length: int | None = None,
                fault: str = "",
            ) -> None:
                self.send_response(status)
                for name, value in headers:
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data) if length is None else length))
                self.end_headers()
                if self.command == "HEAD":
                    return
                if fault == "flip" and data:
                    data = data[:-1] + bytes([data[-1] ^ 1])
                if fault == "cut":
                    data = data[: len(data) // 2]
                    self.close_connection = True
                self.wfile.write(data)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _any  # noqa: N815

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port: int = self._server.server_port

    def start(self) -> None:
        """Serve until `stop`."""
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        """Let go of the port."""
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def proxy_before(port: int) -> Iterator[Proxy]:
    """A running proxy."""
    proxy = Proxy(port)
    proxy.start()
    try:
        yield proxy
    finally:
        proxy.stop()
