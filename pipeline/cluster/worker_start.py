"""Start of a worker's process, before Ray gives it anything to run."""

from __future__ import annotations

import importlib
from contextlib import suppress

_IMPORTED = (
    "ray.train.torch",
    "pipeline.training.loop",
    "pipeline.cluster.controller",
    "pipeline.tracking.mlflow_sender",
)


def prepare_process() -> None:
    """Choose the network interface of this process, and import what training needs.

    Ray calls it in each process that it starts for a run (`worker_process_setup_hook`). An import that fails here fails
    again where it is needed, with an error that reaches the user.
    """
    import ray

    from pipeline.cluster.interfaces import choose_interface

    here = ray.get_runtime_context().get_node_id()
    choose_interface(next(node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] == here))
    for name in _IMPORTED:
        with suppress(Exception):
            importlib.import_module(name)
