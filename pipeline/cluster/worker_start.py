"""Start of a process that Ray makes for a run, before it gets anything to do."""

from __future__ import annotations

import importlib
from contextlib import suppress

from pipeline.timeline import mark

_IMPORTED = (
    "ray.train.torch",
    "pipeline.training.loop",
    "pipeline.cluster.controller",
    "pipeline.tracking.mlflow_sender",
)


def prepare_process() -> None:
    """Choose the network interface of this process, and import what training needs."""
    import ray

    from pipeline.cluster.interfaces import choose_interface

    here = ray.get_runtime_context().get_node_id()
    choose_interface(next(node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] == here))
    for name in _IMPORTED:
        with suppress(Exception):
            importlib.import_module(name)
    mark("imports of rank 0 done")
