"""Record of a run, `run.json` at the run's location: all that the same command needs to know when it comes again.

It is written before the run exists in MLflow, with a key that becomes a tag there, so a driver that is killed in between
leaves one run to find and never two. It is read without torch, Ray and MLflow: a run that has ended answers at once.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from pipeline.checkpoint.location import Location, location
from pipeline.config import RunConfig, from_json, to_json
from pipeline.errors import RunConfigError
from pipeline.run_folder import RECORD
from shards.store import storage

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]{0,127}")


def check_name(name: str) -> None:
    """Raise `RunConfigError` unless a run of this name can have a folder, an object in any store and a run in MLflow."""
    if not _NAME.fullmatch(name):
        raise RunConfigError(
            f"the run's name is {name!r}; expected 1 to 128 letters, digits and . _ + = -, the first a letter or digit: "
            "give another --run or --track.run-name"
        )


@dataclass(frozen=True)
class Outcome:
    """Result of a finished run."""

    run_id: str
    folder: Location
    best: Location
    metrics: dict[str, float]
    version: str
    """Number of the registered version; empty if `track.register` is `never`."""
    model_name: str
    is_best: bool
    """True if `@best` points at this version; an earlier one with a higher AP on the same data keeps the alias."""
    experiment_id: str = ""
    """MLflow's id of the experiment; empty for a run of a release that did not keep it."""


class _Result(msgspec.Struct, frozen=True):
    """An `Outcome` in the record."""

    best: str
    metrics: dict[str, float]
    version: str
    model_name: str
    is_best: bool


class RunRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Content of `run.json`."""

    name: str
    key: str
    """Tag of the run in MLflow that no other run has."""
    asked: dict[str, Any]
    """The configuration as the command gave it, with which the next command is compared."""
    config: dict[str, Any]
    """The configuration that is trained: with absolute paths, and the shape of the model that it starts from."""
    train_digest: str = ""
    val_digest: str = ""
    run_id: str = ""
    """MLflow's id of the run; empty until it exists."""
    experiment_id: str = ""
    """MLflow's id of the experiment of the run."""
    status: Literal["new", "running", "finished", "failed"] = "new"
    """`new`: without initial weights or a run in MLflow. `running`: to be continued. `failed`: for good."""
    message: str = ""
    """Reason for which the run failed."""
    result: _Result | None = None
    unsent: bool = False
    """True if MLflow has not taken everything that the finished run reported."""
    began: float = 0.0
    """Time at which the run was made, in seconds since the epoch; 0 for a run of a release that did not keep it."""
    worked_s: float = 0.0
    """Seconds that drivers of the run have worked, without those that were killed."""

    @property
    def run_config(self) -> RunConfig:
        """Configuration that is trained."""
        return _config(self.config)

    @property
    def asked_config(self) -> RunConfig:
        """Configuration of the command."""
        return _config(self.asked)

    @property
    def handle(self) -> str:
        """Text that `detr resume` finds the run by: its name if no other run has it, else the start of its id."""
        return self.name if self.name == self.run_config.run_name else self.run_id[:8] or self.name

    def outcome(self, folder: Location) -> Outcome | None:
        """Return the result of the run at `folder`; None unless it is finished."""
        result = self.result
        if self.status != "finished" or result is None:
            return None
        return Outcome(
            self.run_id,
            folder,
            location(result.best),
            result.metrics,
            result.version,
            result.model_name,
            result.is_best,
            self.experiment_id,
        )

    def with_outcome(self, outcome: Outcome, unsent: bool) -> RunRecord:
        """Return the record of the finished run."""
        result = _Result(str(outcome.best), dict(outcome.metrics), outcome.version, outcome.model_name, outcome.is_best)
        return self.but(status="finished", message="", result=result, unsent=unsent)

    def with_configs(self, asked: RunConfig, config: RunConfig) -> RunRecord:
        """Return the record with other configurations."""
        return self.but(asked=_fields(asked), config=_fields(config))

    def but(self, **changes: Any) -> RunRecord:
        """Return the record with these fields changed."""
        return msgspec.structs.replace(self, **changes)


def new_record(name: str, asked: RunConfig, config: RunConfig, digests: tuple[str, str]) -> RunRecord:
    """Return the record of a run that does not exist yet; `digests` are those of its training and validation data."""
    return RunRecord(
        name=name,
        key=secrets.token_hex(16),
        began=time.time(),
        asked=_fields(asked),
        config=_fields(config),
        train_digest=digests[0],
        val_digest=digests[1],
    )


def read_record(folder: Location) -> RunRecord | None:
    """Return the record of the run at `folder`, or None if there is none; raise `RunConfigError` if it is damaged."""
    try:
        return msgspec.json.decode(storage.read(str(folder / RECORD)), type=RunRecord)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as error:
        raise RunConfigError(
            f"{folder / RECORD} cannot be read ({error}); expected the record of a run: give another --run, or bring the "
            "file back"
        ) from None


def write_record(folder: Location, record: RunRecord) -> None:
    """Write the record of the run at `folder`, whole or not at all."""
    storage.write(str(folder / RECORD), msgspec.json.format(msgspec.json.encode(record), indent=2))


def _fields(config: RunConfig) -> dict[str, Any]:
    return msgspec.json.decode(to_json(config), type=dict[str, Any])


def _config(fields: Mapping[str, Any]) -> RunConfig:
    return from_json(msgspec.json.encode(fields))
