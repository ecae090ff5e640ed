"""MLflow's server of a model, as `mlflow models serve` starts it, and requests to it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.ray_nodes import free_port


@dataclass(frozen=True)
class ModelServer:
    """A server and its log."""

    port: int
    log: Path

    def post(self, body: bytes) -> tuple[int, str]:
        """Return status and text of the answer."""
        url = f"http://127.0.0.1:{self.port}/invocations"
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def ask(self, rows: Sequence[object], **parameters: object) -> tuple[int, Any]:
        """Return status and JSON of the answer to rows."""
        data = {"columns": ["image"], "data": [[row] for row in rows]}
        status, text = self.post(json.dumps({"dataframe_split": data, "params": parameters}).encode())
        return status, json.loads(text)


@contextmanager
def serving(model: str, folder: Path) -> Iterator[ModelServer]:
    """Serve a model, by URI or folder, on a free port of loopback in this environment; `folder` gets the log."""
    port = free_port()
    command = ["models", "serve", "-m", model, "--port", str(port), "--env-manager", "local"]
    # MLflow starts `uvicorn` by name.
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", *command],
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait_until_ready(process, port, log)
        yield ModelServer(port, log)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    until = time.monotonic() + 180
    while time.monotonic() < until:
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(log.read_text())
