"""Fixture that runs the command in the test's own process."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from jobs import cli
from jobs.cli import run

ROOT = Path(cli.__file__).parent.parent


@dataclass(frozen=True)
class Result:
    status: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """The text on stderr, which must be exactly one line."""
        assert self.err.endswith("\n")
        assert self.err.count("\n") == 1, self.err
        return self.err.strip()


Detr = Callable[..., Result]


@pytest.fixture
def detr(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Detr:
    """Return a function that runs a command line in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "_quiet", lambda: None)  # it would hide the warnings of later tests

    def call(*argv: object) -> Result:
        try:
            status = run([str(argument) for argument in argv])
        except SystemExit as exit_:
            status = int(exit_.code or 0)
        return Result(status, *capsys.readouterr())

    return call
