"""The end of a trained run: send what MLflow has not taken, register the best checkpoint, record that it is finished."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from pipeline.checkpoint import catalog
from pipeline.checkpoint.location import Location, checkpoint_root
from pipeline.checkpoint.metadata import read_meta
from pipeline.config import RunConfig
from pipeline.driver.position import Position
from pipeline.driver.record import Outcome
from pipeline.driver.recorded import RecordedRun
from pipeline.errors import Postponed, RunConfigError, TrainingError
from pipeline.figures import DECIDING, deciding_name
from pipeline.tracking.mlflow_client import tracking_uri, translated_errors
from pipeline.tracking.mlflow_runs import set_final_status
from pipeline.tracking.pages.checkpoints import drop_deleted
from pipeline.tracking.run_spools import anything_left, send_left
from pipeline.tracking.server.outage import outlast
from pipeline.tracking.tags import TAG_LEFT_OUT, TAG_PHASE

T = TypeVar("T")


class ConcludedRun(RecordedRun):
    """A run that this driver brings to its end in MLflow, in the registry and in the store."""

    _sent = True
    """False if MLflow has not taken everything that the workers reported."""

    @property
    def _label(self) -> str:
        return f"run {self.record.run_config.run_name} ({self.record.run_id[:8]})"

    @property
    def _root(self) -> Location:
        return checkpoint_root(self.record.run_config.checkpoint.store, self.folder)

    def _patiently(self, act: Callable[[], T]) -> T:
        """Return what `act` returns; wait for an MLflow that does not answer, as long as `track.wait_s` allows."""

        def translated() -> T:
            with translated_errors("the run is trained and everything is kept"):
                return act()

        patience_s = self.record.run_config.track.wait_s
        return outlast(translated, "the registration", patience_s, self._launch.say)

    def _send_left(self) -> None:
        if self._lease.lost:  # the driver that has the run now sends, and its workers do
            return
        self._sent = send_left(self.folder, self.record.run_id, tracking_uri(), self._launch.say)

    def _conclude(self, config: RunConfig, total: int, began_at: int) -> Outcome:
        """Register the best checkpoint of a run that was trained to its last step, unless it is not to be registered."""
        from pipeline.registry.registration import register

        newest, client, run_id, say = catalog.newest(self._root), self._client, self.record.run_id, self._launch.say
        step = 0 if newest is None else read_meta(newest).step
        if step < total:
            kind = Postponed if step > began_at else TrainingError
            raise kind(f"the workers ended at step {step} of {total} without a reason")
        found = catalog.best(self._root)
        if found is None:
            raise TrainingError(
                f"the run ended without an evaluated checkpoint in {self._root}; expected one at its last step"
            )
        best, metrics = found
        experiment = self._patiently(lambda: client.get_run(run_id)).info.experiment_id
        drop_deleted(client, experiment, run_id)
        if config.track.register == "never":
            say(
                f"nothing is registered, as track.register asks: `detr register {self.record.handle} --name NAME` does it"
            )
            return Outcome(run_id, self.folder, best, metrics, "", "", False, self.record.experiment_id)
        self._patiently(lambda: client.set_tag(run_id, TAG_PHASE, "registering"))
        left_out = self._patiently(lambda: client.get_run(run_id)).data.tags.get(TAG_LEFT_OUT)
        if left_out:
            say(f"warning: left out {left_out}")
        better = config.track.register == "best"
        registered = self._patiently(
            lambda: register(
                client, run_id, config, best, metrics, name=config.model_name, alias="best", only_if_better=better
            )
        )
        if registered.note:
            say(registered.note)
        if not registered.alias_moved:
            figure = DECIDING[deciding_name(metrics)]
            say(f"models:/{config.model_name}@best stays on another version, whose {figure} is higher")
        return Outcome(
            run_id,
            self.folder,
            best,
            metrics,
            registered.version,
            config.model_name,
            registered.alias_moved,
            self.record.experiment_id,
        )

    def _finish(self, outcome: Outcome) -> Outcome:
        """Record in MLflow and then in the store that the run is finished; a kill in between repeats the first."""
        told = set_final_status(self._client, self.record.run_id, "finished", "FINISHED", self._launch.say)
        self.record = self.record.with_outcome(outcome, unsent=not (self._sent and told))
        self.save()
        return outcome

    def _finished(self, position: Position) -> Outcome:
        """Return the result of a run that is finished already; send first what MLflow had not taken."""
        self.send_unsent()
        outcome = self.record.outcome(self.folder)
        if outcome is None:  # a run of a release without records
            raise RunConfigError(
                f"{self._label} is finished: {position.step} steps, registered; expected one that has steps left: give "
                "--epochs N to train it further"
            )
        return outcome

    def send_unsent(self) -> None:
        """Send what MLflow had not taken when the run finished, if there is anything."""
        if self.record.unsent or anything_left(self.folder, self.record.run_id):
            self._launch.say("sending what MLflow had not taken when the run ended")
            self._send_left()
            told = set_final_status(self._client, self.record.run_id, "finished", "FINISHED", self._launch.say)
            if self.record.result is not None:
                self.save(unsent=not (self._sent and told))
