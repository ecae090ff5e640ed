"""Handling of divergence: a loss or gradient that is not finite, or a gradient norm above the bound.

Every rank detects it before the update, from the same total norm, and applies the same policy (`RunConfig.guard`):

- `stop` ends the run with an error that names the step, the loss and the images.
- `skip` leaves this update out and continues with the next batch.
- `rollback` restores weights and optimizer from the newest checkpoint and continues with the next batch; the batches
  since that checkpoint are not repeated, since one of them may be bad.

Each event is written to the run's folder and to MLflow. More than `guard.max_events` events end the run: the cause is
then not a single batch.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import msgspec
import torch
from torch import nn

from pipeline.checkpoint import catalog
from pipeline.checkpoint import state as checkpoint_state
from pipeline.checkpoint.location import Location
from pipeline.checkpoint.patience import patiently
from pipeline.checkpoint.saver import Saver
from pipeline.config import GuardConfig
from pipeline.distributed.ranks import Ranks, on_first
from pipeline.errors import TrainingError
from pipeline.run_folder import EVENTS
from pipeline.tracking.tags import TAG_GUARD, TAG_WARNING
from pipeline.tracking.tracker import Tracker
from pipeline.training.divergence import Diverged
from shards.store import storage


class Guard:
    """Policy for diverged steps, the same on every rank; rank 0 records and reports the events."""

    def __init__(
        self, folder: Location, config: GuardConfig, ranks: Ranks, tracker: Tracker | None, saver: Saver
    ) -> None:
        self._config, self._ranks, self._tracker = config, ranks, tracker
        self._saver = saver
        self._folder = folder / EVENTS
        self._events: list[dict[str, Any]] = []

    def handle(
        self,
        event: Diverged,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        averages: checkpoint_state.Averages | None = None,
    ) -> None:
        """Record the event and prepare model, optimizer and averages for the next step; a collective call.

        Raise `TrainingError` if the run must end.
        """
        policy, allowed = self._config.policy, self._config.max_events
        count = patiently(self._ranks, lambda: on_first(self._ranks, lambda: self._record(event)))
        if self._tracker:
            self._report(event, count)
        if policy == "stop":
            raise Diverged(f"{event}; {self._kept(event)}", event.step, event.record, event.request)
        if count > allowed:
            raise TrainingError(
                f"{event}; this is event {count}, and guard.max_events allows {allowed}; {self._kept(event)}"
            )
        if policy == "rollback":
            self._saver.finish()
            root = self._saver.root
            newest = patiently(self._ranks, lambda: on_first(self._ranks, lambda: catalog.newest(root)))
            if newest is None:
                raise TrainingError(
                    f"{event}, or skip such steps (--guard.policy skip): there is no checkpoint to return to yet; "
                    f"{self._kept(event)}"
                )
            load = partial(checkpoint_state.load, newest, model, optimizer, self._ranks, averages)
            patiently(self._ranks, load)

    def _path(self, event: Diverged) -> Location:
        # One file per step: a step that a resumed run repeats is the same event.
        return self._folder / f"step-{event.step:08d}.json"

    def _kept(self, event: Diverged) -> str:
        return f"kept in {self._path(event)}"

    def _record(self, event: Diverged) -> int:
        """Write the event, read those up to it and return their number; on rank 0."""
        record = {"step": event.step, "policy": self._config.policy, "message": str(event)} | event.record
        storage.write(str(self._path(event)), msgspec.json.format(msgspec.json.encode(record), indent=2))
        self._events = self._records(event.step)
        return len(self._events)

    def _report(self, event: Diverged, count: int) -> None:
        assert self._tracker
        self._tracker.metrics({"guard/events": float(count)}, event.step)
        self._tracker.tags({TAG_GUARD: f"{count} {self._config.policy}: {event}"[:500]})
        if self._config.policy != "stop" and count <= self._config.max_events:
            action = "skipped" if self._config.policy == "skip" else "skipped and the newest checkpoint restored"
            # One tag for each event: a follower polls the tags and would miss overwritten ones.
            name = f"{TAG_WARNING}.guard.{count}"
            text = f"step {event.step} {action}: {event.reason[:400]} ({count} of {self._config.max_events})"
            self._tracker.tags({name: text})
        rows = self._events
        columns = {name: [str(row.get(name, "")) for row in rows] for name in ("step", "policy", "grad_norm")}
        # Records written before the key was renamed have the message under "said".
        columns["message"] = [str(row.get("message", row.get("said", ""))) for row in rows]
        self._tracker.table("guard_events.json", columns)

    def _records(self, step: int) -> list[dict[str, Any]]:
        """Return the events up to a step; later ones happened before the run was resumed from an earlier checkpoint."""
        names = [name for name in storage.listing(str(self._folder)) if re.fullmatch(r"step-\d+\.json", name)]
        contents = [storage.read(str(self._folder / name)) for name in sorted(names)]
        records = [msgspec.json.decode(content, type=dict[str, Any]) for content in contents]
        return [record for record in records if record["step"] <= step]
