"""Engines: launchers that run jobs, one module each.

A module has one class with the methods of `Engine` (`jobs.engines.engine`). To add a launcher, add an entry class in
`jobs.clusters.entries`, a module here and a line in `ENGINES`. Engines are thin: they render a plan and call the
launcher's own client; checks are in `jobs.refusals`.
"""

from __future__ import annotations

from importlib import import_module

from jobs.clusters.entries import Cluster
from jobs.engines.engine import Engine, Job

__all__ = ["ENGINES", "Engine", "Job", "engine_of"]

ENGINES: dict[str, str] = {
    "ray": "jobs.engines.ray:RayEngine",
    "kuberay": "jobs.engines.kuberay:KubeRayEngine",
    "slurm": "jobs.engines.slurm:SlurmEngine",
    "sky": "jobs.engines.sky:SkyEngine",
    "ray_up": "jobs.engines.ray_up:RayUpEngine",
}
"""Module and class of the engine of each launcher."""


def engine_of(cluster: Cluster) -> Engine:
    """Return the engine of a cluster's launcher; only its module is imported."""
    module, _, name = ENGINES[cluster.launcher].partition(":")
    made: Engine = getattr(import_module(module), name)()
    return made
