"""Fixture that runs the command in the test's own process."""

from pathlib import Path

import pytest

from jobs import cli
from jobs.cli import run
from pipeline.tracking.server import address
from tests.support.in_process import Detr, Result


@pytest.fixture(autouse=True)
def _no_login(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the login that an earlier test had in MLflow's address."""
    for name in (address.USERNAME, address.PASSWORD):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(address._Moved, "login", False)


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
