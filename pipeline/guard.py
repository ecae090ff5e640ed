"""What happens when a step would spoil the weights: a loss or gradient that is not finite, or a norm past a bound.

Every rank knows it before the update, from the same total norm, and all do the same (`RunConfig.guard`):

- `stop` ends the run with an error that names step, part and images.
- `skip` leaves this update out; the stream of samples goes on.
- `rollback` takes weights and optimizer back to the newest checkpoint; the stream goes on as well, so that the batches
  since then are not met again at once, a bad one among them perhaps.

Each event is kept beside the checkpoints and told to MLflow. More than `guard.max_events` of them end the run: then it
is not a batch that is bad.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn

from pipeline import checkpoint
from pipeline.config import GuardConfig
from pipeline.errors import TrainingError
from pipeline.parallel import Ranks
from pipeline.saving import Saver
from pipeline.step import Diverged
from pipeline.track import TAG_WARNING, Tracker


class Guard:
    """Decides for every rank alike; rank 0 notes and tells."""

    def __init__(
        self, run_folder: Path, config: GuardConfig, ranks: Ranks, tracker: Tracker | None, saver: Saver
    ) -> None:
        self._config, self._ranks, self._tracker = config, ranks, tracker
        self._saver = saver
        self._folder = run_folder / "events"

    def handle(
        self,
        event: Diverged,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        averages: checkpoint.Averages | None = None,
    ) -> None:
        """Note the event, and leave model, optimizer and averages so that the next step can follow; a collective call.

        Raises `TrainingError` where the run has to end.
        """
        policy, allowed = self._config.policy, self._config.max_events
        if self._ranks.first:
            self._note(event)
        self._ranks.barrier()
        count = self._ranks.broadcast(len(self._records(event.step)))
        if self._tracker:
            self._tell(event, count)
        if policy == "stop":
            raise Diverged(f"{event}; {self._kept(event)}", event.step, event.record, event.asked)
        if count > allowed:
            raise TrainingError(
                f"{event}; this is event {count}, and guard.max_events allows {allowed}; {self._kept(event)}"
            )
        if policy == "rollback":
            self._saver.finish()
            home = self._saver.home
            newest = self._ranks.broadcast(checkpoint.newest(home) if self._ranks.first else None)
            if newest is None:
                raise TrainingError(
                    f"{event}, or leave such steps out (--guard.policy skip): there is no checkpoint to go back to yet; "
                    f"{self._kept(event)}"
                )
            checkpoint.load(newest, model, optimizer, self._ranks, averages)

    def _path(self, event: Diverged) -> Path:
        # One file per step: a step that a resumed run meets again is the same event.
        return self._folder / f"step-{event.step:08d}.json"

    def _kept(self, event: Diverged) -> str:
        return f"kept in {self._path(event)}"

    def _note(self, event: Diverged) -> None:
        self._folder.mkdir(exist_ok=True)
        record = {"step": event.step, "policy": self._config.policy, "said": str(event)} | event.record
        path = self._path(event)
        aside = path.with_suffix(".partial")
        aside.write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=2))
        aside.rename(path)

    def _tell(self, event: Diverged, count: int) -> None:
        assert self._tracker
        self._tracker.metrics({"guard/events": float(count)}, event.step)
        self._tracker.tags({"detr.guard": f"{count} {self._config.policy}: {event}"[:500]})
        if self._config.policy != "stop" and count <= self._config.max_events:
            done = "left out" if self._config.policy == "skip" else "left out and the newest checkpoint taken"
            # A tag for each, so that none is lost between two looks of who watches.
            name = f"{TAG_WARNING}.guard.{count}"
            told = f"step {event.step} {done}: {event.reason[:400]} ({count} of {self._config.max_events})"
            self._tracker.tags({name: told})
        rows = self._records(event.step)
        columns = {name: [str(row.get(name, "")) for row in rows] for name in ("step", "policy", "grad_norm", "said")}
        self._tracker.table("guard_events.json", columns)

    def _records(self, step: int) -> list[dict[str, Any]]:
        """The events up to a step; later ones were met before the run went on from an earlier checkpoint."""
        records = [
            msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
            for path in sorted(self._folder.glob("step-*.json"))
        ]
        return [record for record in records if record["step"] <= step]
