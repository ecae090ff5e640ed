"""Sweeps in files: trials that are no grid, with the figures that somebody has published for them.

The paper's ablations are in the folder `ablations` beside this module.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

import msgspec

from pipeline.errors import RunConfigError
from pipeline.sweep.trials import Trial

_SHIPPED = Path(__file__).parent / "ablations"


class FileTrial(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A trial in a file."""

    name: str
    """Added to the name of the sweep."""
    options: tuple[str, ...] = ()
    """Words of the command line, such as ["--model.encoder-layers", "3"]."""
    published: dict[str, float] = {}
    """Published figures by metric, such as { AP = 40.1 }, in percent."""
    note: str = ""
    """Remark about the trial, such as a difference from what was published."""


class SweepFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Content of a file of a sweep."""

    title: str
    recipe: str
    trials: tuple[FileTrial, ...]
    source: str = ""
    """Publication of the figures."""
    options: tuple[str, ...] = ()
    """Words of the command line of all trials."""
    missing: tuple[str, ...] = ()
    """Published trials that this code has no options for, each with its figure."""

    def trials_of(self, sweep: str) -> list[Trial]:
        """Return the trials of the sweep with this name."""
        return [
            Trial(f"{sweep}-{trial.name}", (*self.options, *trial.options), {"trial": trial.name}, trial.published)
            for trial in self.trials
        ]


def shipped() -> dict[str, SweepFile]:
    """Return the sweeps of this package by name."""
    return {path.stem: _read(path) for path in sorted(_SHIPPED.glob("*.toml"))}


def find_sweep_file(name: str) -> SweepFile | None:
    """Return the sweep of a file, of this package by name or of the user by path; None for any other word."""
    if name.endswith(".toml"):
        return _read(Path(name))
    return shipped().get(name)


def _read(path: Path) -> SweepFile:
    try:
        return msgspec.convert(tomllib.loads(path.read_text()), SweepFile)
    except (OSError, tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise RunConfigError(
            f"{path} is no file of a sweep ({reason}); expected title, recipe and [[trials]]: `detr sweep --show "
            "encoder-layers` prints one"
        ) from None
