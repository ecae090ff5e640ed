"""Private interfaces of Ray that this package uses. Nothing else imports from `ray._private` or `ray.*._internal`.

Any release of Ray may change them: `TESTED_RAY` is the release that they were checked with, and a unit test fails when
another one is installed or an interface is missing.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
import ray
from ray._common.constants import RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR
from ray._common.network_utils import build_address
from ray._private import client_mode_hook, node, services, state, utils
from ray._private.grpc_utils import init_grpc_channel
from ray._private.utils import get_runtime_env_info
from ray.core.generated import common_pb2, node_manager_pb2, node_manager_pb2_grpc
from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator as coordinator
from ray.experimental import internal_kv
from ray.train.v2._internal.constants import (
    DEFAULT_RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_VALUE,
    get_env_vars_to_propagate,
)
from ray.train.v2._internal.execution import context
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.scaling_policy.fixed import FixedScalingPolicy

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

__all__ = [
    "TESTED_RAY",
    "ControllerCallback",
    "RayNotes",
    "WorkerGroupCallback",
    "cancel_resource_request",
    "fewest_servers",
    "jobs_alive",
    "preemption_context",
    "scaling_limits",
    "servers_in_own_groups",
    "start_processes",
    "trainer_class",
]

TESTED_RAY = "2.60"
_NAMESPACE = b"detr"
_ANSWER_S = 3.0
_KEPT_S = 120  # a started process that nothing takes
T = TypeVar("T")


class RayNotes:
    """Key-value store of the Ray cluster that this process belongs to, for `pipeline.cluster.notes`.

    Raise `ConnectionError` if the cluster does not answer within a few seconds.
    """

    def put(self, key: str, value: bytes, overwrite: bool) -> None:
        """Store a value; without `overwrite` only if the key has none."""
        _ask(lambda gcs: gcs.internal_kv_put(key.encode(), value, overwrite, _NAMESPACE, timeout=_ANSWER_S))

    def get(self, key: str) -> bytes | None:
        """Return the value of a key, or None."""
        value: bytes | None = _ask(lambda gcs: gcs.internal_kv_get(key.encode(), _NAMESPACE, timeout=_ANSWER_S))
        return value

    def get_all(self, prefix: str) -> dict[str, bytes]:
        """Return the values of all keys with this prefix."""

        def read(gcs: Any) -> dict[str, bytes]:
            keys = gcs.internal_kv_keys(prefix.encode(), _NAMESPACE, timeout=_ANSWER_S)
            found = gcs.internal_kv_multi_get(keys, _NAMESPACE, timeout=_ANSWER_S) if keys else {}
            return {key.decode(): value for key, value in found.items()}

        return _ask(read)

    def delete(self, key: str) -> None:
        """Delete a key, if it exists."""
        _ask(lambda gcs: gcs.internal_kv_del(key.encode(), False, _NAMESPACE, timeout=_ANSWER_S))

    def delete_all(self, prefix: str) -> None:
        """Delete all keys with this prefix."""
        _ask(lambda gcs: gcs.internal_kv_del(prefix.encode(), True, _NAMESPACE, timeout=_ANSWER_S))


def _ask(act: Callable[[Any], T]) -> T:
    """Return what `act` returns with the client of the cluster's head; raise `ConnectionError` if it does not answer."""
    gcs = _RayClient() if ray.util.client.ray.is_connected() else internal_kv.internal_kv_get_gcs_client()
    if gcs is None:
        raise ConnectionError("this process is not connected to Ray")
    try:
        return act(gcs)
    except (ray.exceptions.RayError, RuntimeError) as error:
        raise ConnectionError(str(error)) from error


class _RayClient:
    """The same calls through an address `ray://`, without a timeout of their own."""

    def internal_kv_put(self, key: bytes, value: bytes, overwrite: bool, namespace: bytes, timeout: float) -> None:
        internal_kv._internal_kv_put(key, value, overwrite, namespace=namespace)

    def internal_kv_get(self, key: bytes, namespace: bytes, timeout: float) -> bytes | None:
        value: bytes | None = internal_kv._internal_kv_get(key, namespace=namespace)
        return value

    def internal_kv_keys(self, prefix: bytes, namespace: bytes, timeout: float) -> list[bytes]:
        return list(internal_kv._internal_kv_list(prefix, namespace=namespace))

    def internal_kv_multi_get(self, keys: list[bytes], namespace: bytes, timeout: float) -> dict[bytes, bytes]:
        found = {key: self.internal_kv_get(key, namespace, timeout) for key in keys}
        return {key: value for key, value in found.items() if value is not None}

    def internal_kv_del(self, key: bytes, by_prefix: bool, namespace: bytes, timeout: float) -> None:
        internal_kv._internal_kv_del(key, del_by_prefix=by_prefix, namespace=namespace)

    def get_all_job_info(self, **_: Any) -> dict[Any, Any]:
        raise RuntimeError("the jobs are not known through ray://")


def jobs_alive() -> set[str]:
    """Return the ids of the Ray jobs that have not ended; raise `ConnectionError` if the cluster does not answer."""
    jobs = _ask(
        lambda gcs: gcs.get_all_job_info(
            skip_submission_job_info_field=True, skip_is_running_tasks_field=True, timeout=_ANSWER_S
        )
    )
    return {job_id.hex() for job_id, job in jobs.items() if not job.is_dead}


def cancel_resource_request(requester: str) -> None:
    """Free what Ray's autoscaling coordinator reserves for a requester; raise `ConnectionError` if it does not answer."""
    try:
        actor = coordinator.get_or_create_autoscaling_coordinator()
        ray.get(actor.cancel_request.remote(requester_id=requester), timeout=_ANSWER_S)
    except ray.exceptions.RayError as error:
        raise ConnectionError(str(error)) from error


def scaling_limits() -> dict[str, float] | None:
    """Return all resources that the autoscaler may add up to, or None where there is no autoscaler."""
    try:
        limits: dict[str, float] | None = state.state.get_max_resources_from_cluster_config()
    except ray.exceptions.RaySystemError:  # through ray://, where the cluster's state is not known
        return None
    return limits


def start_processes(node: dict[str, Any], count: int, environment: Mapping[str, str]) -> None:
    """Let a node of `ray.nodes()` start so many processes that actors of Ray Train with this environment take later.

    They end by themselves if nothing takes them. Ray gives a worker only a process that was started in exactly the
    environment which the worker asks for, so this composes it as Ray Train does.
    """
    if not count or client_mode_hook.is_client_mode_enabled:
        return
    runtime_env = ray.get_runtime_context().runtime_env
    variables = {RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR: DEFAULT_RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_VALUE}
    variables |= get_env_vars_to_propagate() | dict(environment)
    merged = dict(runtime_env) | {"env_vars": runtime_env.get("env_vars", {}) | variables}
    info = get_runtime_env_info(type(runtime_env)(**merged))
    info.serialized_runtime_env = json.dumps(merged, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    request = node_manager_pb2.PrestartWorkersRequest(
        language=common_pb2.Language.PYTHON,
        job_id=bytes.fromhex(ray.get_runtime_context().get_job_id()),
        runtime_env_info=info,
        keep_alive_duration_secs=_KEPT_S,
        num_workers=count,
    )
    channel = init_grpc_channel(build_address(node["NodeManagerAddress"], node["NodeManagerPort"]))
    with suppress(grpc.RpcError), channel:  # without them the workers only start later
        node_manager_pb2_grpc.NodeManagerServiceStub(channel).PrestartWorkers(request, timeout=_ANSWER_S)


def preemption_context() -> Any:
    """Return what Ray Train knows in a worker about nodes that will be taken away (`.preemption_info`, None if none).

    `ray.train.get_preemption_info()` returns the same, but waits for all workers to call it.
    """
    return context.get_train_context().preemption_context


@contextmanager
def servers_in_own_groups(started: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Start Ray's servers inside the block as leaders of their own process groups; append them to `started`.

    Ray has no setting for it, so the class that it starts them with is replaced inside the block.
    """
    original = services.ConsolePopen

    class GroupLeader(original):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options, process_group=0)
            started.append(self)

    with _replaced(services, "ConsolePopen", GroupLeader):
        yield


@contextmanager
def fewest_servers(*, output: bool) -> Iterator[None]:
    """Start inside the block only those of Ray's servers that a run needs, and with `output` the one that passes output on.

    Ray starts its API server before all others and waits until it answers, also without a dashboard. That one, the
    autoscaler's monitor and the reporter of each node serve clusters that people look at; each imports Ray for itself.
    """
    with ExitStack() as stack:
        stack.enter_context(_replaced(node.Node, "start_api_server", _start_no_api_server))
        stack.enter_context(_replaced(node.Node, "start_monitor", lambda self: None))
        if not output:
            stack.enter_context(_replaced(node.Node, "start_log_monitor", lambda self: None))
        # As where Ray is installed without its dashboard: the agent of a node then has neither server nor reporter.
        stack.enter_context(_replaced(utils, "get_dashboard_dependency_error", lambda: ImportError("not asked for")))
        yield


def _start_no_api_server(self: Any, **_: Any) -> None:
    self._webui_url = ""


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


class _OwnResources(FixedScalingPolicy):  # type: ignore[misc]
    """Number of workers of a Ray that has this run alone and no autoscaler, so that nobody is asked for resources."""

    def _send_resource_request(self) -> None:
        pass

    def _maybe_send_resource_request(self) -> None:
        pass

    def _cancel_resource_request(self) -> None:
        pass


class _ByValue:
    """A function for the controller and the workers, sent with their calls; what Ray Train wraps is read by `get`.

    Ray Train puts it into the object store. A driver whose node's servers end first, as where a scheduler signals all
    processes, would be ended by Ray while it tries to save that object, within 0.1 s and without a word.
    """

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function

    def get(self) -> Callable[[], Any]:
        return self._function


def trainer_class(*, alone: bool) -> type[TorchTrainer]:
    """Return Ray's `TorchTrainer` without the actors that no run of ours uses; each is a process that imports Ray Train.

    These are the manager of Ray's data sets, and the one that removes the placement group of a controller which has died:
    the driver ends then, and Ray removes what its job has. A run that is `alone` on its Ray needs no coordinator of
    requests for resources either, unless it is elastic.
    """
    from ray.train.v2._internal.callbacks import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
    from ray.train.v2.api import data_parallel_trainer
    from ray.train.v2.torch.torch_trainer import TorchTrainer

    class RunTrainer(TorchTrainer):  # type: ignore[misc]
        def fit(self) -> Any:
            with _replaced(data_parallel_trainer, "ObjectRefWrapper", _ByValue):
                return super().fit()

        def _create_default_callbacks(self) -> list[Any]:
            unused = (DatasetsCallback, PlacementGroupCleanerCallback)
            return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, unused)]

        def _initialize_and_run_controller(self, **options: Any) -> Any:
            if alone and type(options["scaling_policy"]) is FixedScalingPolicy:
                options["scaling_policy"] = _OwnResources(self.scaling_config)
            return super()._initialize_and_run_controller(**options)

    return RunTrainer
