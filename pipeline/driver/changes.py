"""Changes of a run's configuration when it continues: by the options of `detr resume`, or by another `detr train`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.config import RunConfig, flatten
from pipeline.driver.record import RunRecord
from pipeline.errors import RunConfigError
from shards.store import storage

_NOT_COMPARED = ("storage", "track.run_name")  # the run was found by them
_LOCATIONS = ("data.train", "data.val", "data.built_in", "data.built_in_stuff")  # their digests are compared instead
_FREE = (
    *("cluster.", "compute.", "data.reader_threads", "data.cache", "data.cache_gib", "data.max_bad_samples"),
    *("checkpoint.every_steps", "checkpoint.every_minutes", "checkpoint.keep", "checkpoint.keep_every_epochs"),
    *("evaluate.every", "evaluate.batch_size", "evaluate.asynchronous", "evaluate.pictures"),
    *("evaluate.explain", "evaluate.scorer"),
    *("track.log_every", "track.register", "track.system_every_s", "track.wait_s"),
)
_ACCEPTABLE = (
    *("optim.epochs", "optim.max_steps", "optim.batch_size", "seed", "guard."),
    *("data.sort_window", "data.shuffle_shards", "data.epoch_tail"),
)
_PER_RANK = ("cluster.workers", "cluster.min_workers")
"""Not free with `optim.normalise per_rank`, where the losses depend on the number of workers."""


@dataclass(frozen=True)
class ResumeOptions:
    """Changes of the configuration when a run is resumed; None keeps a value."""

    epochs: int | None = None
    """New total number of epochs, not below the old one."""
    batch_size: int | None = None
    """New global batch size."""
    data: str | None = None
    """Folder or URL of new training data."""
    accept: bool = False
    """Continue although the stream of samples is another one, because data or batch size changed."""
    cluster: Mapping[str, Any] = field(default_factory=dict)
    """New options of the cluster, by name."""
    compute: Mapping[str, Any] = field(default_factory=dict)
    """New options of the computation, by name."""

    def of(self, config: RunConfig) -> RunConfig:
        """Return the configuration with these changes; raise `RunConfigError` for one that is impossible."""
        optim, data = config.optim, config.data
        if self.epochs is not None:
            _check_epochs(optim.epochs, self.epochs)
            optim = replace(optim, epochs=self.epochs, max_steps=0)
        if self.batch_size is not None:
            optim = replace(optim, batch_size=self.batch_size)
        if self.data is not None:
            data = replace(data, train=storage.absolute(self.data), built_in=False)
        cluster, compute = replace(config.cluster, **self.cluster), replace(config.compute, **self.compute)
        changed = replace(config, optim=optim, data=data, cluster=cluster, compute=compute)
        if not self.accept and _normalised_otherwise(config, changed):
            raise RunConfigError(
                "the number of workers changes the losses of a run with optim.normalise per_rank; expected the same "
                "number, or --accept-change to continue with the new one"
            )
        return changed


@dataclass(frozen=True)
class Differences:
    """Options that differ between a run and the command that continues it, each with the old and the new value."""

    free: Mapping[str, tuple[str, str]]
    """Not part of what is trained."""
    acceptable: Mapping[str, tuple[str, str]]
    """Options with which the run can continue as another one."""
    refused: Mapping[str, tuple[str, str]]

    def __str__(self) -> str:
        return _listed(self.free)

    def check(self, name: str, accept: bool) -> None:
        """Raise `RunConfigError` with every differing option unless the run may continue with them."""
        if self.refused:
            raise RunConfigError(
                f"run {name} was started with another configuration: {_listed({**self.refused, **self.acceptable})}; "
                "expected the same: leave out what differs, or give another --run"
            )
        if "optim.epochs" in self.acceptable:
            before, now = self.acceptable["optim.epochs"]
            _check_epochs(int(before), int(now))
        if self.acceptable and not accept:
            raise RunConfigError(
                f"run {name} was started with another configuration: {_listed(self.acceptable)}; expected the same, or "
                "--accept-change to continue with the new one"
            )


def differences(before: RunConfig, now: RunConfig) -> Differences:
    """Return the options that differ between two configurations, as their commands gave them."""
    old, new = flatten(before), flatten(now)
    free: dict[str, tuple[str, str]] = {}
    acceptable: dict[str, tuple[str, str]] = {}
    refused: dict[str, tuple[str, str]] = {}
    for name, value in new.items():
        if name in _NOT_COMPARED or name in _LOCATIONS or old[name] == value:
            continue
        if name in _PER_RANK and _normalised_otherwise(before, now):
            kind = acceptable
        elif name.startswith(_FREE):
            kind = free
        else:
            kind = acceptable if name.startswith(_ACCEPTABLE) else refused
        kind[name] = old[name], value
    return Differences(free, acceptable, refused)


def continued(record: RunRecord, now: RunConfig, differing: Differences) -> RunConfig:
    """Return the configuration that a run trains on with when a command asks for `now`; data may lie elsewhere."""
    config = record.run_config
    wanted = {name: _option(now, name) for name in (*differing.free, *differing.acceptable)}
    wanted |= {
        "data.train": storage.absolute(now.data.train),
        "data.val": storage.absolute(now.data.val),
        "data.built_in": now.data.built_in,
    }
    if "data.cache" in wanted:
        wanted["data.cache"] = absolute_cache(now.data.cache)
    return _with(config, wanted)


def kept(before: RunConfig, now: RunConfig, given: Collection[str]) -> RunConfig:
    """Return the configuration `before` of a run with the options of `now` that a command gave, by their paths."""
    own = ("recipe", *_NOT_COMPARED, *given)
    return _with(before, {name: _option(now, name) for name in flatten(now) if name in own})


def agreed(record: RunRecord, now: RunConfig, accept: bool, say: Callable[[str], None]) -> RunConfig:
    """Return the configuration that the run of `record` trains with when a command asks for `now`, and name changes.

    Raise `RunConfigError` if the run cannot continue so.
    """
    differing = differences(record.asked_config, now)
    differing.check(record.name, accept)
    if differing.free:
        say(f"run {record.name} continues with {differing}")
    return continued(record, now, differing)


def absolute_cache(folder: str) -> str:
    """Return the folder of the cache as an absolute path, except for `~`, which is expanded on each node."""
    return folder if folder in ("", "off") or folder.startswith("~") else str(Path(folder).absolute())


def _with(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """Return the configuration with options changed, by their paths."""
    sections: dict[str, dict[str, Any]] = {}
    whole: dict[str, Any] = {}
    for name, value in values.items():
        section, _, option = name.rpartition(".")
        (sections.setdefault(section, {}) if section else whole)[option] = value
    return replace(
        config, **whole, **{name: replace(getattr(config, name), **options) for name, options in sections.items()}
    )


def _option(config: RunConfig, name: str) -> Any:
    value: Any = config
    for field_name in name.split("."):
        value = getattr(value, field_name)
    return value


def _normalised_otherwise(before: RunConfig, now: RunConfig) -> bool:
    """Return True if another number of workers changes the losses."""
    numbers = [(config.cluster.workers, config.cluster.fewest) for config in (before, now)]
    return before.optim.normalise == "per_rank" and numbers[0] != numbers[1]


def _check_epochs(before: int, now: int) -> None:
    if now < before:
        raise RunConfigError(
            f"--epochs {now} is less than the run's {before}; expected as many or more: start a new run for a shorter "
            "schedule"
        )


def _listed(options: Mapping[str, tuple[str, str]]) -> str:
    return ", ".join(f"{name} {before or 'none'} -> {now or 'none'}" for name, (before, now) in options.items())
