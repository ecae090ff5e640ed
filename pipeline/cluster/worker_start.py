"""Start of a process, before Ray gives it anything to do: imports, and the network interface."""

from __future__ import annotations

import gc
import importlib
import os
from collections.abc import Iterable
from contextlib import suppress

from pipeline.timeline import mark

_CONTROLLER = ("ray.train.torch", "pipeline.cluster.controller")
_WORKER = (
    *_CONTROLLER,
    "pipeline.training.loop",
    "pipeline.tracking.mlflow_sender",
    "pipeline.cluster.hang_watch",
    "torch._dynamo",  # which DDP and torch's optimizers import when they are made
)
_FIRST = "first-process"


def prepare_worker() -> None:
    """Choose the network interface of this process, and import what training needs."""
    import ray

    from pipeline.cluster.interfaces import choose_interface

    here = ray.get_runtime_context().get_node_id()
    choose_interface(next(node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] == here))
    import_all(_WORKER)
    gc.freeze()  # what is imported stays, so no later look for garbage needs to pass it
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
        import_all(_CONTROLLER)


def import_all(names: Iterable[str]) -> None:
    """Import these modules, as far as that succeeds: what fails here fails again where it is needed.

    Modules stay, so Python does not look for garbage meanwhile, which is a tenth of the time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        for name in names:
            with suppress(Exception):
                importlib.import_module(name)
    finally:
        if enabled:
            gc.enable()
