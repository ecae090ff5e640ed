"""Record of a sweep, `sweep.json` at STORAGE/NAME: its trials, and those that were ended early.

The trials themselves are runs with records of their own. This one is read by the same command when it comes again, which
leaves ended trials alone and continues the others.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from pipeline.checkpoint.location import Location
from pipeline.driver.record import read_record
from pipeline.errors import RunConfigError
from pipeline.sweep.trials import Trial
from shards.store import storage

SWEEP = "sweep.json"


class Stopped(msgspec.Struct, frozen=True):
    """Position at which a trial was ended early."""

    epoch: float
    value: float
    """The metric there."""


class SweepRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Content of `sweep.json`."""

    name: str
    recipe: str
    metric: str
    mode: str
    trials: dict[str, tuple[str, ...]]
    """Words of each trial's command line, by its name."""
    stopped: dict[str, Stopped] = {}
    run_id: str = ""
    """MLflow's id of the parent run; empty until it exists."""

    def but(self, **changes: object) -> SweepRecord:
        """Return the record with these fields changed."""
        return msgspec.structs.replace(self, **changes)


def open_record(
    folder: Location, name: str, recipe: str, metric: str, mode: str, trials: Sequence[Trial]
) -> SweepRecord:
    """Return the record of the sweep at `folder`, a new one if there is none.

    Raise `RunConfigError` if the name belongs to a run, or to a sweep with other trials. Trials may be added.
    """
    if read_record(folder) is not None:
        raise RunConfigError(f"{folder} is a run; expected a name that no run has: give the sweep another one")
    wanted = {trial.name: trial.options for trial in trials}
    try:
        known = msgspec.json.decode(storage.read(str(folder / SWEEP)), type=SweepRecord)
    except FileNotFoundError:
        return SweepRecord(name=name, recipe=recipe, metric=metric, mode=mode, trials=wanted)
    except msgspec.DecodeError as error:
        raise RunConfigError(f"{folder / SWEEP} cannot be read ({error}); expected the record of a sweep") from None
    if (known.recipe, known.metric, known.mode) != (recipe, metric, mode):
        raise RunConfigError(
            f"sweep {name} was started with {known.recipe}, --metric {known.metric} and --mode {known.mode}; expected the "
            "same, or another name"
        )
    changed = [trial for trial, options in wanted.items() if known.trials.get(trial, options) != options]
    if changed:
        raise RunConfigError(
            f"trial {changed[0]} was started with {' '.join(known.trials[changed[0]])}; expected the same options, or "
            "another name for the sweep"
        )
    return known.but(trials={**known.trials, **wanted})


def write_sweep(folder: Location, record: SweepRecord) -> None:
    """Write the record of the sweep at `folder`, whole or not at all."""
    storage.write(str(folder / SWEEP), msgspec.json.format(msgspec.json.encode(record), indent=2))
