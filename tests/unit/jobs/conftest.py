"""The command in the test's own process."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from jobs import cli
from jobs.cli import run

ROOT = Path(cli.__file__).parent.parent


@dataclass(frozen=True)
class Said:
    status: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """What was said on stderr, which must be exactly one line."""
        assert self.err.endswith("\n")
        assert self.err.count("\n") == 1, self.err
        return self.err.strip()


Detr = Callable[..., Said]


@pytest.fixture
def detr(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Detr:
    """The command in this process, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "_quiet", lambda: None)  # it would silence the warnings of the tests that follow

    def call(*argv: object) -> Said:
        try:
            status = run([str(word) for word in argv])
        except SystemExit as exit_:
            status = int(exit_.code or 0)
        return Said(status, *capsys.readouterr())

    return call
