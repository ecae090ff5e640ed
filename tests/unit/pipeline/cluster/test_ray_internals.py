"""Private interfaces of Ray: the installed release is the tested one and still has them."""

import inspect
from typing import Any

import pytest
import ray


def test_the_installed_ray_is_the_tested_release() -> None:
    from pipeline.cluster.ray_internals import TESTED_RAY

    assert ray.__version__.startswith(f"{TESTED_RAY}."), (
        f"Ray {ray.__version__} is installed, but the private interfaces in ray_internals.py were tested with {TESTED_RAY}: "
        "check each of them with the new release, then change TESTED_RAY"
    )


def test_ray_has_the_private_interfaces() -> None:
    from ray._private import services
    from ray.core.generated import node_manager_pb2
    from ray.train.v2._internal.execution import context, preemption
    from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
    from ray.train.v2._internal.execution.worker_group import worker_group
    from ray.train.v2.api import data_parallel_trainer

    assert "ConsolePopen(" in inspect.getsource(services.start_ray_process), "Ray starts its servers in another way"
    assert "process_group" not in inspect.getsource(services), "Ray sets process groups itself"
    assert hasattr(ControllerCallback, "after_controller_state_update")
    assert hasattr(WorkerGroupCallback, "after_worker_group_start")
    fields = node_manager_pb2.PrestartWorkersRequest.DESCRIPTOR.fields_by_name
    assert {"job_id", "runtime_env_info", "keep_alive_duration_secs", "num_workers"} <= set(fields)
    assert "get_env_vars_to_propagate()" in inspect.getsource(data_parallel_trainer), "workers get another environment"
    assert "get_env_vars_to_propagate()" in inspect.getsource(worker_group), "workers get another environment"
    assert "preemption_context" in inspect.signature(context.TrainContext).parameters
    assert "preemption_info" in inspect.signature(preemption.PreemptionContext).parameters


def test_ray_has_the_controller_states_that_the_callback_reads() -> None:
    from ray.train.v2._internal.execution.controller import state

    fields = {
        state.ResizingState: "scaling_decision",
        state.RestartingState: "training_failed_error",
        state.ShuttingDownState: "next_state",
    }
    for kind, field in fields.items():
        assert field in inspect.signature(kind).parameters, f"{kind.__name__} has no {field}"


def test_a_ray_of_our_own_starts_no_server_that_only_people_look_at() -> None:
    from ray._private import node, services, utils

    from pipeline.cluster.ray_internals import fewest_servers

    assert "self.start_api_server(" in inspect.getsource(node.Node.start_head_processes), "Ray starts it elsewhere"
    assert "self.start_monitor()" in inspect.getsource(node.Node.start_head_processes), "Ray starts it elsewhere"
    assert "self.start_log_monitor()" in inspect.getsource(node.Node.start_ray_processes), "Ray starts it elsewhere"
    assert "utils.get_dashboard_dependency_error()" in inspect.getsource(services.start_raylet)
    before = node.Node.start_api_server, node.Node.start_monitor, node.Node.start_log_monitor

    class Stopped(node.Node):  # type: ignore[misc]
        def __init__(self) -> None:  # a start of a server would need what the real one has
            pass

    with fewest_servers(output=False):
        Stopped().start_api_server(include_dashboard=False, raise_on_failure=False)
        Stopped().start_monitor()
        Stopped().start_log_monitor()
        assert utils.get_dashboard_dependency_error()
    with fewest_servers(output=True), pytest.raises(AttributeError):
        Stopped().start_log_monitor()
    assert before == (node.Node.start_api_server, node.Node.start_monitor, node.Node.start_log_monitor)
    assert utils.get_dashboard_dependency_error() is None


@pytest.mark.filterwarnings("ignore")  # DataContext warns of its own fields
@pytest.mark.parametrize(("alone", "workers", "asks"), [(True, 2, False), (True, (1, 2), True), (False, 2, True)])
def test_a_run_has_no_actor_of_ray_train_that_it_does_not_use(
    monkeypatch: pytest.MonkeyPatch, alone: bool, workers: int | tuple[int, int], asks: bool
) -> None:
    monkeypatch.setenv("RAY_TRAIN_V2_ENABLED", "1")
    from ray.train.v2.api.config import ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
    from ray.train.v2.torch.torch_trainer import TorchTrainer

    from pipeline.cluster.ray_internals import trainer_class

    given: dict[str, Any] = {}
    requests: list[int] = []

    def run(self: object, **options: Any) -> Any:
        given.update(options)
        return type("Result", (), {"error": None})

    def send(self: object, scaling_config: object, number: int) -> None:
        requests.append(number)

    monkeypatch.setattr(DataParallelTrainer, "_initialize_and_run_controller", run)
    monkeypatch.setattr(
        "ray.train.v2._internal.execution.scaling_policy.scaling_policy.TrainAutoscalingCoordinatorClient."
        "send_resource_request",
        send,
    )
    monkeypatch.setattr(ray, "put", lambda *_: pytest.fail("put into the object store"))
    trainer = trainer_class(alone=alone)(lambda: None, scaling_config=ScalingConfig(num_workers=workers))
    trainer.fit()
    ours, rays = ({type(callback).__name__ for callback in given["callbacks"]}, TorchTrainer._create_default_callbacks)
    assert {type(callback).__name__ for callback in rays(trainer)} - ours == {
        "DatasetsCallback",
        "PlacementGroupCleanerCallback",
    }
    assert callable(given["train_fn_ref"].get())
    given["scaling_policy"].after_controller_start(type("Context", (), {"run_id": "id"}))
    assert bool(requests) is asks
