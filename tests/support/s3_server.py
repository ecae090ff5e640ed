"""An S3 server on loopback that checks credentials and keeps real files, for tests of remote data sets."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from tests.support.ray_nodes import free_port

KEY, SECRET = "test-key", "test-secret-0123456789"
_STORE_VARIABLES = ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_CONFIG_FILE", "AWS_REGION")


class S3Server:
    """`rclone serve s3` over a folder, whose subfolders are the buckets."""

    def __init__(self, folder: Path, *, written: bool = False, host: str = "127.0.0.1") -> None:
        """Start a server over `folder` at an address of this machine.

        `written`: files are written through the server; into its folder only before the first request, since it would
        not notice later. Otherwise it reads the folder at each request, which may never end while files are written.
        """
        self._flags = ["-vv"] if written else ["--dir-cache-time", "0s", "-vv"]
        self._host = host
        self.root = folder / "buckets"
        (self.root / "sets").mkdir(parents=True)
        self.log = folder / "s3.log"
        self.port = free_port(host)
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def environment(self) -> dict[str, str]:
        """Variables that a client needs; tests must not inherit another store's."""
        return {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_ENDPOINT_URL_S3": f"http://{self._host}:{self.port}",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def put(self, folder: Path, name: str) -> str:
        """Copy a data set into the bucket; its URL."""
        shutil.copytree(folder, self.root / "sets" / name)
        return f"s3://sets/{name}"

    def start(self) -> None:
        """Serve, on the same port each time; returns when it answers."""
        rclone = Path(sys.executable).with_name("rclone")
        words = ["serve", "s3", str(self.root), "--addr", f"{self._host}:{self.port}", "--auth-key", f"{KEY},{SECRET}"]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [str(rclone), *words, "--config", os.devnull, *self._flags], stderr=log, stdout=log
            )
        until = time.monotonic() + 120
        while time.monotonic() < until:
            with socket.socket() as probe:
                if probe.connect_ex((self._host, self.port)) == 0:
                    return
            time.sleep(0.02)
        raise AssertionError(f"the S3 server did not start: {self.log.read_text()}")

    def stop(self) -> None:
        """Gone at once, as after a power cut."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def gets(self, ending: str) -> list[str]:
        """The objects with this ending that were asked for, once for each request, in order."""
        found = re.findall(r"GET OBJECT Bucket: \S+ Object: (\S+)", self.log.read_text())
        return [name for name in found if name.endswith(ending)]
