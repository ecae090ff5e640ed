"""The programs of launchers, such as kubectl: run with their errors as one line."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from typing import TextIO

from jobs.errors import JobError

_ANSWER_S = 60.0


def run(
    *command: str, input_text: str = "", environment: Mapping[str, str] | None = None, seconds: float = _ANSWER_S
) -> str:
    """Return the output of a program; raise `JobError` if it is missing, fails, or takes too long."""
    _require(command[0])
    try:
        done = subprocess.run(
            command,
            input=input_text,
            env=None if environment is None else {**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        raise JobError(
            f"`{_shown(command)}` did not answer within {seconds:g} s; expected an answer: try it by hand"
        ) from None
    if done.returncode:
        lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise JobError(
            f"`{_shown(command)}` failed ({lines[-1][:300] if lines else f'exit {done.returncode}'}); expected success"
        )
    return done.stdout


def stream(output: TextIO, *command: str) -> int:
    """Copy the output of a program to `output` until it ends; return its exit status."""
    _require(command[0])
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            output.write(line)
            output.flush()
    return process.returncode


def _require(program: str) -> None:
    if shutil.which(program) is None:
        raise JobError(f"the command `{program}` is not installed here; expected it: install it, or use --write FILE")


def _shown(command: tuple[str, ...]) -> str:
    return " ".join(command[:4]) + (" ..." if len(command) > 4 else "")
