"""Work of a driver on a run whose lease it holds: create or continue it, and run its workers."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pipeline.checkpoint import catalog
from pipeline.checkpoint.location import Location
from pipeline.cluster.launch import connected, connecting
from pipeline.cluster.ray_session import Connection
from pipeline.cluster.worker_start import import_all
from pipeline.config import RunConfig, to_json
from pipeline.driver.changes import agreed
from pipeline.driver.conclusion import ConcludedRun
from pipeline.driver.forecasting import compare, forecast_tags
from pipeline.driver.job import job_tags, keep_output
from pipeline.driver.launch import Launch
from pipeline.driver.lease import Lease
from pipeline.driver.position import Position, position_after
from pipeline.driver.preflight import PreparedRun, check_data, prepare
from pipeline.driver.record import Outcome, RunRecord, new_record
from pipeline.errors import CheckpointError, RunConfigError
from pipeline.recipes import uses_built_in
from pipeline.run_folder import CHECKPOINTS, INITIAL_NAME
from pipeline.signals import raise_unheard
from pipeline.tracking.mlflow_client import connect, translated_errors
from pipeline.tracking.mlflow_runs import (
    CONFIG_ARTIFACT,
    create_run,
    folder_of_other,
    run_with_key,
    set_final_status,
)
from pipeline.tracking.pages.data import data_set, dataset_input
from pipeline.tracking.pages.links import run_link
from pipeline.tracking.pages.listed import write_tags
from pipeline.tracking.tags import (
    TAG_EPOCHS,
    TAG_FOLDER,
    TAG_INITIAL_WEIGHTS,
    TAG_KEY,
    TAG_PHASE,
    TAG_TOTAL_STEPS,
    TAG_TRAIN_DIGEST,
    TAG_VAL_DIGEST,
)
from shards.dataset.manifest import Manifest
from shards.store import storage

if TYPE_CHECKING:
    from mlflow import MlflowClient


class Work(ConcludedRun):
    """A run that this driver alone works on, from its creation or its newest checkpoint to its end."""

    _gpu = False
    """True if the workers use GPUs."""

    def create(self, config: RunConfig, ready: PreparedRun, connection: Connection) -> Outcome:
        """Create the run on a cluster that can run it, and train it."""
        launch, total = self._launch, ready.schedule.total_steps
        found = catalog.newest(self._root)
        if found is not None:
            raise RunConfigError(
                f"{self._root} has a checkpoint of another run already ({found.name}); expected none for the new run "
                f"{self.record.handle}: give another --run or --checkpoint.store"
            )
        with ExitStack() as stack:
            cluster = stack.enter_context(
                connected(config, self.folder, connection, verbose=launch.verbose, say=launch.say)
            )
            with self.recorded():
                self.save()
                ready.write_initial_weights(self.folder)
                tags = self._first_tags(config, ready)
                tags |= forecast_tags(
                    self._client, config, ready, gpu=cluster.gpu, here=not connection.address, say=launch.say
                )
                run_id = create_run(self._client, config, ready.datasets, tags)
                experiment = str(self._client.get_run(run_id).info.experiment_id)
                self.save(run_id=run_id, experiment_id=experiment, status="running")
                keep_output(self._client, run_id)
                launch.say(f"{self._label}: {total} steps, checkpoints in {self._root / CHECKPOINTS}")
                launch.say(f"in MLflow: {run_link(experiment, run_id)}")
                self._run(cluster, config, stack.close, accept_change=False)
                outcome = self._conclude(config, total, 0)
                self._compare(config, ready.val, 0, total)
                return self._finish(outcome)

    def _first_tags(self, config: RunConfig, ready: PreparedRun) -> dict[str, str]:
        total = ready.schedule.total_steps
        return {
            TAG_KEY: self.record.key,
            TAG_FOLDER: str(self.folder),
            TAG_TRAIN_DIGEST: ready.train.digest,
            TAG_VAL_DIGEST: ready.val.digest,
            TAG_INITIAL_WEIGHTS: "; ".join(ready.notes),
            TAG_TOTAL_STEPS: str(total),
            TAG_EPOCHS: str(min(config.optim.epochs, ready.schedule.epoch(total))),
            TAG_PHASE: "starting",
            **job_tags(),
        }

    def go_on(self, asked: RunConfig, config: RunConfig, accept: bool, connection: Connection) -> Outcome:
        """Train the run from its newest checkpoint to its end, or do what is left of a trained one."""
        launch, before = self._launch, self.record.run_config
        run = self._client.get_run(self.record.run_id)
        self.record = self.record.but(experiment_id=str(run.info.experiment_id))
        if run.info.status == "RUNNING":  # since its lease was free, nobody does
            set_final_status(self._client, self.record.run_id, "killed", "KILLED", launch.say)
        position = self._position(before, config, accept)
        total, trained = position.schedule.total_steps, position.is_trained(self._root)
        if trained and self.record.status == "finished":
            return self._finished(position)
        keep_output(self._client, self.record.run_id)
        launch.say(f"{self._label} continues at step {position.step} of {total}")
        launch.say(f"in MLflow: {run_link(self.record.experiment_id, self.record.run_id)}")
        if position.stream.changes:
            launch.say(f"warning: {position.stream.message(position.train.images)}")
        if position.rate_change:
            launch.say(f"warning: {position.rate_change}")
        with ExitStack() as stack:
            if not trained:
                cluster = stack.enter_context(
                    connected(config, self.folder, connection, verbose=launch.verbose, say=launch.say)
                )
            with self.recorded():
                self._begin(asked, config, position, dict(run.data.tags))
                if trained:
                    self._send_left()
                else:
                    self._run(cluster, config, stack.close, accept_change=bool(position.stream.changes))
                outcome = self._conclude(config, total, position.step)
                self._compare(config, position.val, position.step, total)
                return self._finish(outcome)

    def _position(self, before: RunConfig, config: RunConfig, accept: bool) -> Position:
        """Return the position that the run continues from; raise one of `USER_ERRORS` if it cannot with this data."""
        newest = catalog.newest_of_run(self._root, self.folder, self.record.run_id)
        if newest is None and not storage.exists(str(self.folder / INITIAL_NAME)):
            raise CheckpointError(
                f"{self._root} holds no checkpoint of run {self.record.handle}; expected one: is its storage mounted here?"
            )
        if config.data.built_in:
            from pipeline.built_in.dataset import make_data

            make_data(config, self._launch.say)
        if (config.data.train, config.data.val) != (before.data.train, before.data.val):
            check_data(config)
        position = position_after(config, newest, accept)
        digests = (
            (config.data.train, self.record.train_digest, position.train.digest),
            (config.data.val, self.record.val_digest, position.val.digest),
        )
        for url, was, now in digests:
            if was not in ("", now) and not accept:
                raise RunConfigError(
                    f"{url} is not the data that run {self.record.handle} was started with (digest {was[:12]}, now "
                    f"{now[:12]}); expected the same: restore it, or give --accept-change to continue with it"
                )
        return position

    def _begin(self, asked: RunConfig, config: RunConfig, position: Position, tags: dict[str, str]) -> None:
        """Record in the store and in MLflow that the run continues, and its configuration if that has changed."""
        client, run_id = self._client, self.record.run_id
        changed, known = config != self.record.run_config, self.record
        self.record = self.record.with_configs(asked, config)
        began = self.record.began or time.time()
        self.save(
            status="running",
            message="",
            began=began,
            train_digest=position.train.digest,
            val_digest=position.val.digest,
        )
        if changed:
            # Parameters of a run cannot change in MLflow; this artifact says what is trained now.
            client.log_text(run_id, to_json(config).decode(), CONFIG_ARTIFACT)
        uses = (
            ("training", known.train_digest, position.train),
            ("validation", known.val_digest, position.val),
        )
        other = [dataset_input(use, data_set(data)) for use, was, data in uses if was not in ("", data.digest)]
        if other:
            client.log_inputs(run_id, other)
        write_tags(client, run_id, {**position.tags(tags), **job_tags()})
        client.update_run(run_id, status="RUNNING")

    def _run(self, cluster: Any, config: RunConfig, disconnect: Callable[[], None], accept_change: bool) -> None:
        """Run the workers, end the connection to Ray and so what is left of them, then send what they could not."""
        raise_unheard()
        self._gpu = cluster.gpu
        try:
            cluster.run(config, self.record.run_id, self.folder, accept_change=accept_change, began=self.record.began)
            disconnect()
            if config.track.register != "never":
                self._patiently(lambda: self._client.search_experiments(max_results=1))
        except BaseException:
            self.note_time()
            raise
        finally:
            # A worker that still lives would write on into a spool that is sent and removed under it.
            disconnect()
            self._send_left()

    def _compare(self, config: RunConfig, val: Manifest, begin: int, total: int) -> None:
        compare(
            self._client,
            self.record.run_id,
            config,
            min(val.images, config.evaluate.limit or val.images),
            gpu=self._gpu,
            begin=begin,
            total=total,
            wall_s=self.seconds,
            before_s=self.record.worked_s,
            say=self._launch.say,
        )


def create(
    config: RunConfig,
    name: str,
    accept: bool,
    folder: Location,
    launch: Launch,
    lease: Lease,
    known: RunRecord | None,
) -> Outcome:
    """Create the run `name` and train it; `known` is the record that a driver has left which was killed before it had.

    If that driver had made the run in MLflow already, it is continued with the options that it has.
    """
    asked = config
    with connecting(config, address=launch.address, verbose=launch.verbose) as connection:
        import_all(["mlflow", "pipeline.driver.initial_weights"])
        client = connect()
        with translated_errors():
            made = known if known and run_with_key(client, known.run_config, known.key) else None
            if known is None and name == config.run_name:
                _warn_of_other(client, name, folder, launch)
        if made:
            config = agreed(made, config, accept, launch.say)
        made_now, before = uses_built_in(config) and not _is_made(config), time.time()
        config, ready = prepare(config, launch.say)
        if made_now:  # for this run alone, so the times of others do not contain it
            launch = replace(launch, began=launch.began + time.time() - before)
        digests = (ready.train.digest, ready.val.digest)
        if made and digests != (made.train_digest, made.val_digest) and not accept:
            raise RunConfigError(
                f"the data of run {name} has changed since the run was made; expected the same: restore it, or give "
                "--accept-change to continue with it"
            )
        record = new_record(name, asked, config, digests)
        if known is not None:
            record = record.but(key=known.key)
        return Work(folder, launch, lease, record, client).create(config, ready, connection)


def _is_made(config: RunConfig) -> bool:
    from pipeline.built_in.dataset import is_made  # with torch, which Ray's start does not wait for

    return is_made(config)


def _warn_of_other(client: MlflowClient, name: str, folder: Location, launch: Launch) -> None:
    """Warn if another storage has a run of this name: a relative `--storage` is another one in another folder."""
    other = folder_of_other(client, name, str(folder))
    if other:
        launch.say(
            f"warning: there is a run {name} in {other} already, and this command starts another in {folder}; to continue "
            f"that run, give --storage {other.rpartition('/')[0]}"
        )


def go_on(
    record: RunRecord, asked: RunConfig, config: RunConfig, accept: bool, folder: Location, launch: Launch, lease: Lease
) -> Outcome:
    """Continue the run of `record` with another configuration or the same one."""
    with connecting(config, address=launch.address, verbose=launch.verbose) as connection:
        work = Work(folder, launch, lease, record, connect())
        with translated_errors():
            return work.go_on(asked, config, accept, connection)
