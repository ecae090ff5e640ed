"""The command `detr` in the test's own process."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from jobs import cli

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
