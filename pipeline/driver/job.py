"""The job of a launcher that this driver runs in: its tags on the run, and its output as an artifact of the run.

A launcher forgets the output of a job, at the latest with its cluster. So this process copies all that it and its children
print, and sends it to the run's artifacts every minute and at the end.
"""

from __future__ import annotations

import os
import sys
import threading
import traceback
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from pipeline.tracking.tags import TAG_CLUSTER, TAG_JOB, TAG_JOB_ID

if TYPE_CHECKING:
    from mlflow import MlflowClient

LOGS = "logs"
"""Folder of a run's artifacts with the output of its jobs: JOB.log, and JOB.2.log of a job that was started again."""
_EVERY_S = 60.0
_HEAD, _TAIL = 1 << 20, 3 << 20  # bytes that are kept
_FLUSH_S = 2.0
_IDS = ("SLURM_JOB_ID", "SKYPILOT_TASK_ID")


def job_tags(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the tags of a run for the job that this process is; empty outside of jobs of `detr submit`."""
    known = os.environ if environment is None else environment
    if not known.get("DETR_JOB"):
        return {}
    job_id = next((known[name] for name in _IDS if known.get(name)), "")
    return {TAG_JOB: known["DETR_JOB"], TAG_JOB_ID: job_id, TAG_CLUSTER: known.get("DETR_CLUSTER", "")}


class Output:
    """Output of a process: its beginning and its end, with the middle left out where it is too long."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._head, self._tail = bytearray(), deque[bytes]()
        self._tail_bytes = self._left_out = 0
        self.size = 0

    def add(self, data: bytes) -> None:
        """Add what was printed."""
        with self._lock:
            self.size += len(data)
            fits = max(_HEAD - len(self._head), 0)
            self._head += data[:fits]
            rest = data[fits:]
            if rest:
                self._tail.append(rest)
                self._tail_bytes += len(rest)
            while self._tail_bytes > _TAIL:
                dropped = len(self._tail.popleft())
                self._tail_bytes -= dropped
                self._left_out += dropped

    def text(self) -> str:
        """Return what is kept."""
        with self._lock:
            middle = f"\n... {self._left_out} bytes left out ...\n".encode() if self._left_out else b""
            return (bytes(self._head) + middle + b"".join(self._tail)).decode(errors="replace")


class JobLog:
    """Output of this process and its way to a run's artifacts."""

    def __init__(self, job: str) -> None:
        self.output = Output()
        self._job, self._name, self._sent = job, "", 0
        self._target: tuple[MlflowClient, str] | None = None
        self._over = threading.Event()
        self._sender: threading.Thread | None = None

    def attach(self, client: MlflowClient, run_id: str) -> None:
        """Send the output to this run from now on."""
        self._target = client, run_id
        if self._sender is None:
            self._sender = threading.Thread(target=self._send_often, name="job log", daemon=True)
            self._sender.start()

    def close(self) -> None:
        """Send what is left."""
        self._over.set()
        if self._sender is not None:
            self._sender.join()
            self.send()

    def _send_often(self) -> None:
        self.send()  # at once, so that a run that has started can be read
        while not self._over.wait(_EVERY_S):
            self.send()

    def send(self) -> None:
        """Send the output if there is something new; an outage of MLflow only delays it."""
        if self._target is None or self.output.size == self._sent:
            return
        client, run_id = self._target
        size = self.output.size
        with suppress(Exception):  # whatever it is, the run's own end counts
            if not self._name:
                self._name = self._free_name(client, run_id)
            client.log_text(run_id, self.output.text(), f"{LOGS}/{self._name}")
            self._sent = size

    def _free_name(self, client: MlflowClient, run_id: str) -> str:
        """Return a name that no earlier attempt of the job has used."""
        taken = {file.path.rpartition("/")[2] for file in client.list_artifacts(run_id, LOGS)}
        name, number = f"{self._job}.log", 1
        while name in taken:
            number += 1
            name = f"{self._job}.{number}.log"
        return name


_log: JobLog | None = None


def keep_output(client: MlflowClient, run_id: str) -> None:
    """Send the output of this process to the run, if it is a job."""
    if _log is not None:
        _log.attach(client, run_id)


@contextmanager
def job_output() -> Iterator[None]:
    """Copy what this process prints in the block, if it is a job, and send it to the run that it trains."""
    global _log
    job = os.environ.get("DETR_JOB", "")
    if not job:
        yield
        return
    _log = JobLog(job)
    try:
        with _copied(1, _log.output), _copied(2, _log.output):
            try:
                yield
            except Exception:  # Python prints it after the block, too late for what is kept
                _log.output.add(traceback.format_exc().encode())
                raise
    finally:
        _log.close()
        _log = None


@contextmanager
def _copied(descriptor: int, output: Output) -> Iterator[None]:
    """Copy what is written to a file descriptor, by this process and its children, to `output`."""
    kept = os.dup(descriptor)
    reading, writing = os.pipe()
    os.dup2(writing, descriptor)
    os.close(writing)

    def copy() -> None:
        while data := os.read(reading, 1 << 16):
            output.add(data)
            view = memoryview(data)
            with suppress(OSError):  # nobody reads any more; the pipe is emptied all the same, or printing would block
                while view:
                    view = view[os.write(kept, view) :]

    thread = threading.Thread(target=copy, name=f"output {descriptor}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(kept, descriptor)
        thread.join(_FLUSH_S)  # a child may live on and hold the pipe
