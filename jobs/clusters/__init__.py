"""Clusters that jobs run on: entries of the user's own file, `detr.toml` or `~/.config/detr/clusters.toml`.

`entries` has the typed entries, one class per launcher; `secret` references to secrets; `file` finds and reads the
files. `find_cluster(name)` returns an entry; `local` exists without any file. Imports no torch, Ray or MLflow.
"""

from jobs.clusters.entries import Cluster, Head, KubeRay, Nodes, Ray, RayUp, Sky, Slurm
from jobs.clusters.file import find_cluster, read_clusters
from jobs.clusters.secret import Secret

__all__ = [
    "Cluster",
    "Head",
    "KubeRay",
    "Nodes",
    "Ray",
    "RayUp",
    "Secret",
    "Sky",
    "Slurm",
    "find_cluster",
    "read_clusters",
]
