"""An MLflow server as a process of its own, which a test can take away and bring back at the same address."""

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from tests.support.ray_nodes import free_port


class MlflowServer:
    """`mlflow server` over a store; `folder` gets its log and, by default, its artifacts."""

    def __init__(
        self, folder: Path, store: str, *flags: str, environment: Mapping[str, str] | None = None, start: bool = True
    ) -> None:
        """`store` is the address of its database; `flags` and `environment` are added to its command."""
        self._folder, self._flags = folder, flags
        self.port = free_port()
        self.log = folder / "mlflow.log"
        self._environment = os.environ | {
            "MLFLOW_BACKEND_STORE_URI": store,
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        self._environment |= environment or {}
        self._process: subprocess.Popen[bytes] | None = None
        if start:
            self.start()

    @property
    def url(self) -> str:
        """Address of the server, without a login."""
        return f"http://127.0.0.1:{self.port}"

    def start(self, timeout_s: float = 240) -> None:
        """Serve; returns when it answers."""
        hosts = f"127.0.0.1,127.0.0.1:{self.port}"
        words = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1"]
        words += ["--port", str(self.port), "--allowed-hosts", hosts]
        if not any(flag == "--artifacts-destination" for flag in self._flags):
            words += ["--artifacts-destination", str(self._folder / "artifacts")]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*words, *self._flags],
                cwd=self._folder,
                env=self._environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        until = time.monotonic() + timeout_s
        while not self._answers():
            assert self._process.poll() is None, self.log.read_text()[-2000:]
            assert time.monotonic() < until, self.log.read_text()[-2000:]
            time.sleep(0.1)

    def stop(self) -> None:
        """Gone at once with all its processes, as after a power cut."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        try:
            urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
        except (urllib.error.URLError, OSError):
            return False
        return True
