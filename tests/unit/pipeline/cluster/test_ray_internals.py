"""Private interfaces of Ray: the installed release is the tested one and still has them."""

import inspect

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
