"""The tests marked `gpu`."""

import os
import subprocess
import sys

from tests.gpu.results import Results
from tests.gpu.work import Setting

_TESTS = (
    "tests/unit/detr",
    "tests/unit/pipeline/training/test_step.py",
    "tests/unit/pipeline/training/graphs",
    "tests/unit/pipeline/tracking/test_step_timer.py",
)


def run(results: Results, setting: Setting) -> None:
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", *_TESTS]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    print(done.stdout, done.stderr)
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    results.put("tests marked gpu", status=done.returncode, summary=lines[-1] if lines else done.stderr[-200:])
    for line in lines:
        if line.startswith(("FAILED", "ERROR")):
            results.put("failed", test=line)
