"""Worker process of Ray Train: run the loop, and record for the driver how it ended."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from pipeline.checkpoint.location import Location
from pipeline.cluster.notes import attempts
from pipeline.cluster.notes.attempts import Restart
from pipeline.cluster.notes.notes import Notes
from pipeline.cluster.notes.request_watch import RequestWatch
from pipeline.cluster.startup import FirstStep
from pipeline.config import RunConfig
from pipeline.distributed.devices import device_name
from pipeline.errors import USER_ERRORS, Postponed
from pipeline.run_folder import scratch
from pipeline.timeline import mark
from pipeline.tracking.run_spools import TRAINING, open_tracker
from pipeline.tracking.server.address import tracking_uri
from pipeline.tracking.spool import SpoolTracker
from pipeline.tracking.tags import TAG_DEVICE, TAG_PHASE, TAG_RESIZED, TAG_WARNING
from pipeline.tracking.tracker import WORKERS, Tracker
from pipeline.training.requests import NO_REQUEST, LoopHooks, Request
from shards.errors import one_line
from shards.store.retry import may_pass

if TYPE_CHECKING:
    from pipeline.cluster.load.report import LoadReport
    from pipeline.distributed.ranks import Ranks

_LESS = "expected a run that fits: lower --evaluate.batch-size, --data.reader-threads or the workers of a node"
_LAST_S = 10.0  # for MLflow to take the last points of a run that has failed
_OTHERS_S = 3.0  # which they usually take
_BEFORE_S = 20.0  # time before a node is taken away at which a second checkpoint is written


@dataclass(frozen=True)
class WorkerJob:
    """Everything that the driver passes to each worker, and to each evaluation beside the workers."""

    config: RunConfig
    run_id: str
    folder: Location
    """The run's location."""
    tracking_uri: str
    """Address of MLflow; empty if it holds a secret, and each process finds it in its environment."""
    code_commit: str
    accept_change: bool
    """Continue from a checkpoint even if its stream of samples is another one."""
    notes: Notes
    began: float = 0.0
    """Time at which the run began, in seconds since the epoch."""

    @property
    def mlflow(self) -> str:
        """Address of MLflow."""
        return self.tracking_uri or tracking_uri()


def train_in_ray(job: WorkerJob) -> None:
    """Run the loop of one worker to its end; record why it ended if it fails."""
    mark("process group made")
    import ray.train
    import torch

    from pipeline.cluster.hang_watch import HangWatch  # with torch, which the driver does not wait for
    from pipeline.distributed.ranks import Ranks
    from pipeline.tracking.tracker import forward_warnings
    from pipeline.training.loop import run
    from pipeline.training.state import RunInfo

    context = ray.train.get_context()
    config = with_microbatch_limit(job.config)
    torch.set_num_threads(config.cluster.cpus_per_worker)
    ranks = Ranks(
        context.get_world_rank(),
        context.get_world_size(),
        ray.train.torch.get_device(),
        timeout_s=config.cluster.collective_timeout_s,
        node=ray.get_runtime_context().get_node_id(),
    )
    run_info = RunInfo(job.run_id, job.folder, job.code_commit, job.accept_change)
    tracker: SpoolTracker | None = None
    load: LoadReport | None = None
    failed = False
    restart = attempts.start_attempt(job.notes, ranks.world_size) if ranks.first else None
    timeline = FirstStep(job.notes) if ranks.first else None
    hangs = HangWatch(job.notes, ranks.rank, ranks.world_size, ranks.timeout_s)
    asked = RequestWatch(partial(attempts.asked_to_return, job.notes)) if ranks.first else None
    leaving = PreemptionNotice()

    def stepped(step: int) -> None:
        hangs.stepped(step)
        first_step(step)
        if timeline:
            timeline()

    def request() -> Request:
        return leaving.request()._replace(stop=asked is not None and asked.stop)

    def keep_unsent() -> None:
        if tracker:
            tracker.keep_unsent()
        attempts.record_progress(job.notes)

    try:
        tracker = open_patiently(job, ranks)
        if tracker:
            tracker.tags({TAG_PHASE: "training", TAG_DEVICE: device_name(ranks.device)} | _restart_warning(restart))
        load = _load_report(job, ranks, context.get_local_rank(), tracker)
        first_step = FirstStepReport(tracker, ranks.world_size, restart)
        with forward_warnings(tracker) if tracker else nullcontext():
            run(config, run_info, ranks, tracker, LoopHooks(request, stepped, keep_unsent))
    except Exception as error:
        failed = True
        report_failure(job.notes, ranks.rank, error, tracker)
        raise
    finally:
        hangs.close()
        if load:
            load.close()
        if asked:
            asked.close()
        if tracker:
            if not failed:
                tracker.close()
            attempts.finish_handover(job.notes)


def _load_report(job: WorkerJob, ranks: Ranks, local_rank: int, tracker: SpoolTracker | None) -> LoadReport | None:
    """Return the report of the load of this node or GPU, or None if this worker has neither to report."""
    import ray

    from pipeline.cluster.load.machine import sampler
    from pipeline.cluster.load.report import LoadReport

    every_s, first_of_node = job.config.track.system_every_s, local_rank == 0
    if not every_s or not (first_of_node or tracker or ranks.device.type == "cuda"):
        return None
    numbers = ray.get_runtime_context().get_accelerator_ids().get("GPU") or [str(local_rank)]
    sample = sampler(scratch(job.run_id), ranks.device, numbers[0], whole=first_of_node)
    return LoadReport(job.notes, ranks.rank, sample, tracker, began=job.began, every_s=every_s)


def open_patiently(job: WorkerJob, ranks: Ranks) -> SpoolTracker | None:
    """Return the tracker on rank 0, and None on the others, when the store answers; a collective call."""
    from pipeline.checkpoint.patience import patiently
    from pipeline.distributed.ranks import on_first

    opened: list[SpoolTracker] = []

    def open_first() -> None:
        opened.append(open_tracker(TRAINING, job.folder, job.run_id, job.mlflow))

    patiently(ranks, lambda: on_first(ranks, open_first))
    return opened[0] if opened else None


def report_failure(notes: Notes, rank: int, error: Exception, tracker: SpoolTracker | None) -> None:
    """Send what is left of the curves, then record the failure: the driver ends the workers when it reads that.

    All ranks may have the same error. The others give rank 0 a moment for what it has to send.
    """
    if tracker:
        tracker.close(_LAST_S)
    elif rank and isinstance(error, USER_ERRORS):
        time.sleep(_OTHERS_S)
    record_failure(notes, rank, error)


def record_failure(notes: Notes, rank: int, error: Exception) -> None:
    """Write the error for the driver: a fatal one, which would only happen again, or the end of this attempt."""
    from pipeline.distributed.ranks import is_peer_failure
    from pipeline.training.out_of_memory import is_shortage

    passes = may_pass(error) or isinstance(error, ConnectionError | TimeoutError)
    if isinstance(error, USER_ERRORS) and not passes:
        notes.write_fatal_error(str(error), postpones=isinstance(error, Postponed))
        return
    what = one_line(error)
    if is_shortage(error):
        notes.write_fatal_error(f"worker {rank} ran out of memory ({what}); {_LESS}")
    if is_peer_failure(error):
        attempts.record_end(notes, f"worker {rank} failed: {what}", "symptom")
        return
    if not passes and attempts.repeats(notes, what):
        notes.write_fatal_error(
            f"worker {rank} failed: {what}; the attempt before it ended with the same error and nothing was saved in "
            "between, so it is not tried again"
        )
    attempts.record_end(notes, f"worker {rank} failed: {what}", error="" if passes else what, passes=passes)


def with_microbatch_limit(config: RunConfig) -> RunConfig:
    """Return the configuration with a limit on images per forward pass if the number of workers may shrink.

    Each remaining worker then takes more images in a step, but not more at a time.
    """
    cluster = config.cluster
    if cluster.fewest == cluster.workers or config.compute.max_microbatch:
        return config
    share = math.ceil(config.optim.batch_size / cluster.workers)
    return replace(config, compute=replace(config.compute, max_microbatch=share))


def _restart_warning(restart: Restart | None) -> dict[str, str]:
    if restart is None or restart.ended.wanted:
        return {}
    return {TAG_WARNING: f"{restart.ended.why}; restart {restart.number}"}


class FirstStepReport:
    """Callback that reports, after the first step of an attempt, the number of workers and the cost of a restart."""

    def __init__(self, tracker: Tracker | None, workers: int, restart: Restart | None) -> None:
        self._tracker, self._workers, self._restart = tracker, workers, restart

    def __call__(self, step: int) -> None:
        """Report once, when `step` steps are done."""
        tracker, self._tracker = self._tracker, None
        if tracker is None:
            return
        tracker.metrics({WORKERS: float(self._workers)}, step)
        if restart := self._restart:
            now = time.time()
            tracker.metrics({"restart/seconds": restart.seconds(now)}, step)
            tracker.tags({TAG_RESIZED if restart.ended.wanted else TAG_WARNING: restart.message(step, now)})


class PreemptionNotice:
    """Requests for checkpoints before nodes of these workers are taken away, as Ray announces it.

    One checkpoint at once, and another shortly before the first node goes. Ray then restarts the workers on the others.
    """

    def __init__(self) -> None:
        from pipeline.cluster.ray_internals import preemption_context

        self._context = preemption_context()
        self._known: Any = None
        self._again_at = 0.0

    def request(self) -> Request:
        """Return the requests after a step; costs nothing while no node is announced."""
        info = self._context.preemption_info
        if info is None:
            return NO_REQUEST
        if info != self._known:
            self._known = info
            deadline = (info.deadline_ms or 0) / 1000
            second_pays = deadline - time.time() > 1.5 * _BEFORE_S
            self._again_at = deadline - _BEFORE_S if second_pays else 0.0
            return Request(save=True)
        if self._again_at and time.time() >= self._again_at:
            self._again_at = 0.0
            return Request(save=True)
        return NO_REQUEST
