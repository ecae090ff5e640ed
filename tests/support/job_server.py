"""A stand-in for Ray's job server and MLflow's health check that keeps every byte it was sent."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

CPU_NODE = {"CPU": 8.0}


class JobServer:
    """Server on a free port of the loopback interface; `nodes` are the resources of those that it says the cluster has."""

    def __init__(self) -> None:
        self.nodes: list[dict[str, float]] = [CPU_NODE, CPU_NODE]
        self.token = ""
        self.missing = ""
        """Path that it does not know."""
        self.requests: list[str] = []
        self.tokens: set[str] = set()
        self.bodies: list[bytes] = []
        self.job: dict[str, Any] = {}
        """The request of the newest job."""
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.answer(self)

            do_PUT = do_POST = do_GET

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        """Answer one request."""
        self.requests.append(f"{request.command} {request.path}")
        self.tokens.add(request.headers.get("authorization", ""))
        body = request.rfile.read(int(request.headers.get("content-length") or 0))
        self.bodies.append(body)
        path = request.path.partition("?")[0]
        status, content = 200, b"OK"
        if self.token and path != "/health" and request.headers.get("authorization") != f"Bearer {self.token}":
            status, content = 401, b"Unauthorized"
        elif path == self.missing:
            status = 404
        elif path == "/api/version":
            content = json.dumps(
                {"version": "4", "ray_version": "2.60.0", "ray_commit": "x", "session_name": "s"}
            ).encode()
        elif path == "/api/v0/nodes":
            listed = [{"resources_total": node, "state": "ALIVE"} for node in self.nodes]
            content = json.dumps({"result": True, "msg": "", "data": {"result": {"result": listed}}}).encode()
        elif path.startswith("/api/packages") and request.command == "GET":
            status = 404
        elif path == "/api/jobs/" and request.command == "POST":
            self.job = json.loads(body)
            content = json.dumps({"job_id": "1", "submission_id": self.job["submission_id"]}).encode()
        request.send_response(status)
        request.send_header("content-length", str(len(content)))
        request.end_headers()
        request.wfile.write(content)

    def sent(self) -> bytes:
        """Everything that was sent, addresses and bodies."""
        return b"\n".join([*(line.encode() for line in self.requests), *self.bodies])

    def stop(self) -> None:
        """End it."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextmanager
def job_server() -> Iterator[JobServer]:
    """Yield a server that ends with the block."""
    server = JobServer()
    try:
        yield server
    finally:
        server.stop()
