"""Start of a process, before Ray gives it anything to do: imports, and the network interface."""

from __future__ import annotations

import importlib
import os
from contextlib import suppress

from pipeline.timeline import mark

_CONTROLLER = ("ray.train.torch", "pipeline.cluster.controller")
_WORKER = (*_CONTROLLER, "pipeline.training.loop", "pipeline.tracking.mlflow_sender", "pipeline.cluster.hang_watch")
_FIRST = "first-process"


def prepare_worker() -> None:
    """Choose the network interface of this process, and import what training needs."""
    import ray

    from pipeline.cluster.interfaces import choose_interface

    here = ray.get_runtime_context().get_node_id()
    choose_interface(next(node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] == here))
    _import(_WORKER)
    mark("imports of rank 0 done")


def prepare_controller() -> None:
    """Import what Ray Train's controller needs, if this is the first process of the driver that is not a worker.

    The controller gets the first one. Ray Train has helpers in the same environment, which need none of it.
    """
    import ray

    from pipeline.cluster.ray_internals import RayNotes

    key, own = f"{_FIRST}/{ray.get_runtime_context().get_job_id()}", os.urandom(8)
    store = RayNotes()
    store.put(key, own, overwrite=False)
    if store.get(key) == own:
        _import(_CONTROLLER)


def _import(names: tuple[str, ...]) -> None:
    for name in names:
        with suppress(Exception):
            importlib.import_module(name)
