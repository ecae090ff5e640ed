"""An HTTP server on loopback that answers every request with one status, and keeps what it was asked."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Answering:
    """A server that answers with `status`, or with 200 to requests that hold `login` if there is one."""

    def __init__(self, status: int, login: str = "") -> None:
        self.status, self.login = status, login
        self.asked: list[str] = []
        """Path of each request, and its header Authorization."""
        answering = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                given = self.headers.get("Authorization") or ""
                answering.asked.append(f"{self.path} {given}")
                status = 200 if answering.login and given == answering.login else answering.status
                body = b"{}" if status == 200 else b"no"
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_GET

            def log_message(self, *_: object) -> None:
                """Print nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        """Address of the server."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        """Stop the server."""
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def answering(status: int, login: str = "") -> Iterator[Answering]:
    """Yield a server that ends with the block."""
    server = Answering(status, login)
    try:
        yield server
    finally:
        server.close()
