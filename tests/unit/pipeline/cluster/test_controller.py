"""Reasons for the end of a group of workers, from Ray's own errors."""

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, OutOfMemoryError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.controller.state import ResizingState, RestartingState, ShuttingDownState
from ray.train.v2._internal.execution.scaling_policy import ResizeDecision
from ray.train.v2.api.exceptions import PreemptionError, WorkerGroupError
from ray.train.v2.api.preemption import PreemptionInfo

from pipeline.cluster import controller
from pipeline.cluster.controller import GroupEndCallback, explain
from pipeline.cluster.notes import attempts
from pipeline.cluster.notes.notes import Notes

KILLED = "Worker unexpectedly exits with a connection error code 2. End of file."
GUESS = " Some common causes include: (1) the process was killed by the OOM killer due to high memory usage, (2) more."
RAY = "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: "
REASON = "Worker unexpectedly exits with a connection error code 2. End of file"


def died(text: str) -> WorkerHealthCheckFailedError:
    error = ActorDiedError()
    error.error_msg = f"{ActorDiedError.BASE_ERROR_MSG}\n\tclass_name: RayTrainWorker\n\tpid: 17\n{text}"
    return WorkerHealthCheckFailedError("A worker health check failed.\nWorker info: ...", error)


def test_a_death_is_reported_and_not_the_errors_of_the_others() -> None:
    failures: dict[int, Exception] = {0: RuntimeError("gloo: closed"), 1: died(RAY + KILLED)}
    assert explain(WorkerGroupError("much", failures)) == (f"worker 1 died: {REASON}", True)


def test_guesses_of_ray_are_shortened() -> None:
    why, _ = explain(WorkerGroupError("", {1: died(RAY + KILLED + GUESS)}))
    assert (
        why
        == f"worker 1 died: {KILLED} It was killed, it crashed, or its machine ran out of memory (dmesg there says so)"
    )


def test_a_kill_by_rays_memory_monitor_is_reported() -> None:
    message = "Task was killed due to the node running low on memory."
    killed = WorkerHealthCheckFailedError("failed", OutOfMemoryError(message))
    assert explain(WorkerGroupError("", {0: killed})) == (f"worker 0 died: {message[:-1]}", True)


def test_a_lost_node_is_reported_without_network_details() -> None:
    gone = WorkerHealthCheckFailedError("failed", ActorUnavailableError("RpcError: rpc_code: 14", b"1" * 16))
    assert explain(WorkerGroupError("", {2: gone})) == ("worker 2 died: its process or its node does not answer", True)


def test_an_exception_of_a_worker_is_not_certainly_the_cause() -> None:
    assert explain(WorkerGroupError("", {1: RuntimeError("a\nb")})) == ("worker 1 failed: b", False)


def test_a_preempted_node_is_reported() -> None:
    error = PreemptionError(PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"n": [0, 2]}))
    assert explain(error) == ("the node of worker 0, 2 was taken away", True)


@pytest.mark.parametrize("final", [False, True])
def test_the_end_of_a_group_is_recorded(notes: Notes, final: bool) -> None:
    attempts.start_attempt(notes, 2)
    error = WorkerGroupError("", {1: died(RAY + KILLED)})
    state: Any = RestartingState(training_failed_error=error)
    if final:
        state = ShuttingDownState(next_state=SimpleNamespace(training_failed_error=error))  # type: ignore[arg-type]
    GroupEndCallback(notes).after_controller_state_update(None, state)
    reason = attempts.end_reason(notes)
    assert reason is not None
    assert reason.why == f"worker 1 died: {REASON}"


@pytest.mark.parametrize("certain", [False, True])
def test_a_death_that_ray_has_not_noticed_is_found_by_asking(
    notes: Notes, monkeypatch: pytest.MonkeyPatch, certain: bool
) -> None:
    attempts.start_attempt(notes, 2)
    if certain:
        attempts.record_end(notes, "worker 0 failed: gloo is mentioned here")
    actors = {0: "alive", 1: "dead"}
    monkeypatch.setattr(controller, "find_dead", lambda asked: {1: died(RAY + KILLED)} if asked == actors else {})
    workers = [SimpleNamespace(actor=actors[r], distributed_context=SimpleNamespace(world_rank=r)) for r in (1, 0)]
    callback = GroupEndCallback(notes)
    callback.after_worker_group_start(SimpleNamespace(get_workers=lambda: workers))
    error = WorkerGroupError("", {0: RuntimeError("gloo: Connection closed by peer")})
    callback.after_controller_state_update(None, RestartingState(training_failed_error=error))
    reason = attempts.end_reason(notes)
    assert reason is not None
    assert reason.why == ("worker 0 failed: gloo is mentioned here" if certain else f"worker 1 died: {REASON}")


def test_workers_save_before_they_are_replaced(notes: Notes) -> None:
    attempts.start_attempt(notes, 2)
    saved = []

    def work() -> None:
        while not attempts.asked_to_return(notes):
            time.sleep(0.02)
        saved.append(True)
        attempts.finish_handover(notes)

    thread = threading.Thread(target=work)
    thread.start()
    resizing = ResizingState(ResizeDecision(num_workers=3, resources_per_worker={"CPU": 1}))
    GroupEndCallback(notes).after_controller_state_update(None, resizing)
    assert saved
    thread.join()
    restart = attempts.start_attempt(notes, 3)
    assert restart is not None
    assert restart.ended.wanted
    assert "2 -> 3 workers" in restart.message(7, time.time())


def test_workers_that_do_not_answer_are_replaced(notes: Notes) -> None:
    attempts.start_attempt(notes, 2)
    resizing = ResizingState(ResizeDecision(num_workers=3, resources_per_worker={"CPU": 1}))
    before = time.monotonic()
    GroupEndCallback(notes, handover_s=0.3).after_controller_state_update(None, resizing)
    assert time.monotonic() - before < 20
    attempts.start_attempt(notes, 3)
    assert not attempts.asked_to_return(notes), "the next group would stop at once"
