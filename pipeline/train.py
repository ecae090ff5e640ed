"""Driver of a run: `train` and `resume`.

Both find the run's record in its store, and both continue what it describes (`pipeline.driver.work`). A run's name is
its key: the same command creates the run once, continues it when it comes again, and answers at once when the run has
ended. So neither torch nor Ray nor MLflow is imported here before it is known that there is something to do.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from pipeline.checkpoint.location import Location, location
from pipeline.config import RunConfig
from pipeline.driver.changes import ResumeOptions, agreed, differences
from pipeline.driver.launch import Launch
from pipeline.driver.record import Outcome, RunRecord, check_name, read_record
from pipeline.driver.sole_driver import sole_driver
from pipeline.errors import Interrupted, Postponed, TrackingAway, TrainingError
from shards.store.retry import may_pass

__all__ = ["Launch", "Outcome", "known_config", "resume", "train"]

Fit = Callable[[RunConfig | None], RunConfig]


def train(
    config: RunConfig,
    launch: Launch | None = None,
    *,
    run: str = "",
    accept_change: bool = False,
    fit: Fit | None = None,
) -> Outcome:
    """Train a run to its end and register it: a new one, or with the name `run` the one that has it already.

    A finished run returns its outcome at once. Raise `RunConfigError` for a run that was started with other options than
    `config`, unless they are not part of what is trained or `accept_change` allows them, `BusyError` while another
    driver works on it, and its old error if it has failed for good and no option has changed.

    fit: returns the configuration that is trained in place of `config`, chosen by the data of a new run, or for a known
    run by the configuration that its command gave, which is then its argument. Storage and name are those of `config`.
    """
    launch = launch or Launch()
    config = _named(config, run)
    check_name(config.run_name)
    name = run or f"{config.run_name}-{secrets.token_hex(4)}"
    folder = _absolute(location(config.storage)) / name
    record: RunRecord | None = None
    with _postponing(lambda: record):
        record = _read(folder) if run else None
        if fit:
            config = _named(fit(record.asked_config if record else None), run)
        if record and record.run_id:
            outcome = _ended(record, config, accept_change, folder, launch)
            if outcome:
                return outcome
        else:
            from pipeline.driver.preflight import check, check_storage

            check(config)
            check_storage(config)
        with sole_driver(folder, name, launch.say) as lease:
            from pipeline.driver.work import create, go_on

            record = _read(folder) if run else None  # another driver may have written it since
            if record is None or not record.run_id:
                return create(config, name, accept_change, folder, launch, lease, record)
            if fit:
                config = _named(fit(record.asked_config), run)
            wanted = agreed(record, config, accept_change, launch.say)
            return go_on(record, config, wanted, accept_change, folder, launch, lease)


def known_config(config: RunConfig, run: str) -> RunConfig | None:
    """Return the configuration that the command of the run `run` in the storage of `config` gave; None without a run."""
    record = _read(_absolute(location(config.storage)) / run) if run else None
    return record.asked_config if record else None


def _named(config: RunConfig, run: str) -> RunConfig:
    return replace(config, track=replace(config.track, run_name=run)) if run else config


def _ended(
    record: RunRecord, config: RunConfig, accept_change: bool, folder: Location, launch: Launch
) -> Outcome | None:
    """Return the outcome of a finished run, and None for one that has something to do; raise if it failed for good."""
    differing = differences(record.asked_config, config)
    differing.check(record.name, accept_change)
    if record.status == "failed" and not (differing.free or differing.acceptable):
        raise TrainingError(
            f"{record.message} (run {record.name} failed with this before: `detr resume {record.handle}` tries again, as "
            "does this command with another --cluster.* or --compute.* option)"
        )
    outcome = None if differing.acceptable else _finished(record, folder, launch)
    return outcome


def _finished(record: RunRecord, folder: Location, launch: Launch) -> Outcome | None:
    """Return the outcome of a run that is finished and has told MLflow everything, else None."""
    outcome = None if record.unsent else record.outcome(folder)
    if outcome:
        version = f"models:/{outcome.model_name}/{outcome.version}"
        launch.say(
            f"run {record.handle} is finished and {f'registered as {version}' if outcome.version else 'not registered'}; "
            f"`detr resume {record.handle} --epochs N` trains it further"
        )
    return outcome


def resume(name: str, changes: ResumeOptions | None = None, launch: Launch | None = None) -> Outcome:
    """Continue a run from its newest checkpoint, with these changes: the same as its command once more.

    `name` is the run's id, its name, its location or a registered version. A run that was trained to its end but not
    registered is registered, and one that failed is tried again.
    """
    launch, changes = launch or Launch(), changes or ResumeOptions()
    record: RunRecord | None = None
    with _postponing(lambda: record):
        from pipeline.driver.find import find

        try:
            folder, record = find(name)
        except (TrackingAway, OSError) as error:
            if not _passes(error):
                raise
            raise Postponed(str(error)) from error
        if not (changes.epochs or changes.batch_size or changes.data):
            outcome = _finished(record, folder, launch)
            if outcome:
                return outcome
        changes.of(record.run_config)  # raises for mistakes before anything starts
        with sole_driver(folder, record.name, launch.say) as lease:
            from pipeline.driver.work import go_on

            newer = read_record(folder)  # another driver may have written it since
            record = newer if newer and newer.run_id else record
            asked, wanted = changes.of(record.asked_config), changes.of(record.run_config)
            return go_on(record, asked, wanted, changes.accept, folder, launch, lease)


def _absolute(place: Location) -> Location:
    return place.absolute() if isinstance(place, Path) else place


def _read(folder: Location) -> RunRecord | None:
    """Return the record of the run at `folder`, or None; raise `Postponed` if the store does not answer."""
    try:
        return read_record(folder)
    except OSError as error:
        if not may_pass(error):
            raise
        raise Postponed(f"{error}; the run may exist, so the same command looks again later") from error


def _passes(error: Exception) -> bool:
    """Return True if the store or MLflow did not answer."""
    return isinstance(error, TrackingAway) or may_pass(error)


@contextmanager
def _postponing(known: Callable[[], RunRecord | None]) -> Iterator[None]:
    """Raise `Interrupted` if the block is stopped before the workers run, `Postponed` if a known run must wait.

    A run waits for its store and MLflow. For one that does not exist yet, their error may be a mistake in an address.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise Interrupted("stopped before the workers ran; give the same command again") from None
    except (TrackingAway, OSError) as error:
        record = known()
        if record is None or not _passes(error):
            raise
        raise Postponed(f"{error}; `detr resume {record.handle}` continues when it answers") from error
