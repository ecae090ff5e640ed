"""What Ray Train runs in each worker's process: the loop, and word of how it went for those outside."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline import attempts
from pipeline.attempts import Restart
from pipeline.config import RunConfig, from_json
from pipeline.errors import USER_ERRORS, first_line
from pipeline.fitting import leave_word
from pipeline.hangs import HangWatch
from pipeline.mlflow_events import EventSender
from pipeline.spool import SpoolTracker
from pipeline.stopping import NOTHING, Asked, Overseer, yielded
from pipeline.track import TAG_PHASE, TAG_RESIZED, TAG_WARNING, Tracker

_LESS = "expected a run that fits: lower --evaluate.batch-size, --data.reader-threads or the workers of a node"
_BEFORE_S = 20.0  # a second checkpoint so long before the node goes, unless that is at once


def train_in_ray(job: dict[str, Any]) -> None:
    """The loop of one worker, with `job` as `pipeline.launch.run_workers` packs it."""
    import ray.train
    import torch
    import torch.distributed as dist

    from pipeline.memory import is_shortage
    from pipeline.parallel import Ranks
    from pipeline.state import Place
    from pipeline.telling import telling_warnings
    from pipeline.worker import run

    context = ray.train.get_context()
    config = bounded(from_json(job["config"]))
    folder = Path(job["folder"])
    torch.set_num_threads(config.cluster.cpus_per_worker)
    ranks = Ranks(
        context.get_world_rank(),
        context.get_world_size(),
        ray.train.torch.get_device(),
        timeout_s=config.cluster.collective_timeout_s,
    )
    place = Place(job["run_id"], folder, job["code_commit"], job["accept_change"])
    tracker, restart = None, None
    if ranks.first:
        restart = attempts.begin(folder, ranks.world_size)
        spool = folder / "spool"
        tracker = SpoolTracker(spool, EventSender(job["tracking_uri"], job["run_id"], spool))
        tracker.tags({TAG_PHASE: "training"} | _reason(restart))
    first_step = FirstStep(tracker, ranks.world_size, restart)
    hangs = HangWatch(folder, ranks.rank, ranks.world_size, ranks.timeout_s)

    def stepped(step: int) -> None:
        hangs.stepped(step)
        first_step(step)

    try:
        with telling_warnings(tracker) if tracker else nullcontext():
            run(config, place, ranks, tracker, Overseer(Notice().asked, stepped))
    except USER_ERRORS as error:
        # Trying again would fail again: leave word for the driver, which ends the run instead.
        leave_word(folder, str(error), ranks.rank)
        raise
    except Exception as error:
        if is_shortage(error):
            leave_word(folder, f"worker {ranks.rank} ran out of memory ({first_line(error)}); {_LESS}", ranks.rank)
        # What a collective raises is how this worker learned that another one is gone.
        met = isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "NCCL"))
        attempts.end(folder, f"worker {ranks.rank} failed: {first_line(error)}", "consequence" if met else "cause")
        raise
    finally:
        hangs.close()
        if tracker:
            tracker.close()
            yielded(folder)


def bounded(config: RunConfig) -> RunConfig:
    """A run that may go on with fewer workers: each then takes more images, but not more in one forward pass."""
    cluster = config.cluster
    if cluster.fewest == cluster.workers or config.compute.max_microbatch:
        return config
    share = -(-config.optim.batch_size // cluster.workers)
    return replace(config, compute=replace(config.compute, max_microbatch=share))


def _reason(restart: Restart | None) -> dict[str, str]:
    if restart is None or restart.ended.wanted:
        return {}
    return {TAG_WARNING: f"{restart.ended.why}; restart {restart.number}"}


class FirstStep:
    """Tells, once the first step of an attempt is done, with how many workers, and what a restart cost."""

    def __init__(self, tracker: Tracker | None, workers: int, restart: Restart | None) -> None:
        self._tracker, self._workers, self._restart = tracker, workers, restart

    def __call__(self, step: int) -> None:
        """`step` steps are done."""
        tracker, self._tracker = self._tracker, None
        if tracker is None:
            return
        tracker.metrics({"cluster/workers": float(self._workers)}, step)
        if restart := self._restart:
            now = time.time()
            tracker.metrics({"restart/seconds": restart.seconds(now)}, step)
            tracker.tags({TAG_RESIZED if restart.ended.wanted else TAG_WARNING: restart.told(step, now)})


class Notice:
    """What Ray knows of nodes that are about to be taken away, on which workers of this group run.

    Asks for a checkpoint at once, and for another shortly before the first of them goes: Ray then starts the workers
    again on what is left.
    """

    def __init__(self) -> None:
        from ray.train.v2._internal.execution.context import get_train_context

        # ray.train.get_preemption_info() reads the same, but waits for all workers to ask.
        self._context = get_train_context().preemption_context
        self._known: Any = None
        self._again_at = 0.0

    def asked(self) -> Asked:
        """Called after every step; costs nothing while there is no such node."""
        info = self._context.preemption_info
        if info is None:
            return NOTHING
        if info != self._known:
            self._known = info
            until = (info.deadline_ms or 0) / 1000 - time.time()
            self._again_at = time.time() + until - _BEFORE_S if until > 1.5 * _BEFORE_S else 0.0
            return Asked(save=True)
        if self._again_at and time.time() >= self._again_at:
            self._again_at = 0.0
            return Asked(save=True)
        return NOTHING
