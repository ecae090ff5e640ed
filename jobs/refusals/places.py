"""Checks of places: the folder of the command, data, files and storage, as far as this machine sees them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from jobs.clusters.entries import Cluster, KubeRay, Ray
from jobs.clusters.file import LOCAL, is_loopback
from jobs.errors import JobError
from jobs.plan import Request
from pipeline.checkpoint import location
from pipeline.config import RunConfig
from pipeline.errors import USER_ERRORS
from pipeline.recipes import uses_built_in
from shards.store import storage


def check_places(cluster: Cluster, request: Request) -> None:
    """Raise for what must be there and is not."""
    _check_start(cluster)
    config = request.config
    if config is not None:
        _check_training(cluster, config)
    for url in request.reads:
        _check_read(cluster, url)


def is_here(cluster: Cluster) -> bool:
    """Return True if jobs of the entry start in this machine's folders."""
    return cluster.name == LOCAL and isinstance(cluster, Ray) and is_loopback(cluster.address)


def _check_start(cluster: Cluster) -> None:
    """Check interpreter and folder of an entry whose jobs run on this machine."""
    if not (isinstance(cluster, Ray) and is_loopback(cluster.address)) or cluster.code != "installed":
        return
    if cluster.directory and not cluster.sees_alone(cluster.directory) and not Path(cluster.directory).is_dir():
        raise JobError(
            f"directory {cluster.directory} of {cluster.name} is no folder; expected the folder where jobs start"
        )
    if "/" in cluster.python and shutil.which(cluster.python) is None and not cluster.sees_alone(cluster.python):
        raise JobError(f"python {cluster.python} of {cluster.name} is no program; expected a Python with this project")


def _check_training(cluster: Cluster, config: RunConfig) -> None:
    from pipeline.driver import preflight

    places = {"storage": config.storage}
    if config.checkpoint.store:
        places["checkpoint.store"] = config.checkpoint.store
    files = {} if config.initial.startswith("models:/") or not config.initial else {"initial": config.initial}
    if config.model.backbone_weights not in ("imagenet", "random") and not uses_built_in(config):
        files["model.backbone_weights"] = config.model.backbone_weights
    data = {} if config.data.built_in else {"data.train": config.data.train, "data.val": config.data.val}
    for option, url in {**places, **data, **files}.items():
        _check_shared(cluster, option, url)
    looked_at = not any(cluster.sees_alone(url) for url in data.values())
    try:
        preflight.check(config, data=looked_at)
    except USER_ERRORS as error:
        if is_here(cluster) or not looked_at or not data:
            raise
        raise type(error)(
            f"{error}; if only {cluster.name} sees it, name its folder in `on_cluster` of the entry"
        ) from None
    for option, url in places.items():
        if not cluster.sees_alone(url):
            _check_written(cluster, option, url)
    for option, path in files.items():
        if not cluster.sees_alone(path) and not storage.exists(path):
            raise JobError(
                f"--{option.replace('_', '-')} {path}: no such file; expected one, or on_cluster of {cluster.name}"
            )


def _check_shared(cluster: Cluster, option: str, url: str) -> None:
    """Check that a place means the same on every node of another machine."""
    storage.refuse_unknown(url)
    path = storage.local_path(url)
    if path is None or is_here(cluster):
        return
    flag = f"--{option.replace('_', '-')}"
    if not path.is_absolute() and not (cluster.directory and cluster.code == "installed"):
        extra = ", or `storage` of the entry" if option == "storage" else ""
        raise JobError(
            f"{flag} {url} is a relative folder, which every node of {cluster.name} looks for in another place; expected an "
            f"absolute folder that all nodes share, or a URL{extra}"
        )
    if isinstance(cluster, KubeRay) and not any(
        str(path).startswith(folder.rstrip("/") + "/") or str(path) == folder for folder in cluster.volumes.values()
    ):
        mounted = ", ".join(cluster.volumes.values()) or "none"
        raise JobError(
            f"{flag} {url} is on no volume of {cluster.name} (its volumes: {mounted}), so pods do not share it; expected a "
            "URL, or a folder on one of `volumes`"
        )


def _check_written(cluster: Cluster, option: str, url: str) -> None:
    """Check that this machine may write to a place; nothing is created."""
    hint = "" if is_here(cluster) else f", or, if only {cluster.name} sees it, name it in `on_cluster` of the entry"
    path = storage.local_path(url)
    if path is None:
        try:
            location.check(url, option)
        except USER_ERRORS as error:
            raise JobError(f"{error}{hint}") from None
        return
    there = path.absolute()
    while not there.exists():
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK):
        problem = "is a file" if there.is_file() else "cannot be written"
        raise JobError(f"{option} {url}: {there} {problem}; expected a folder that every worker may write{hint}")


def _check_read(cluster: Cluster, url: str) -> None:
    """Check that a folder or file that the command reads is there."""
    if cluster.sees_alone(url):
        return
    _check_shared(cluster, "path", url) if storage.local_path(url) is not None else None
    if not storage.exists(url):
        hint = "" if is_here(cluster) else f", or, if only {cluster.name} sees it, `on_cluster` of the entry"
        raise JobError(f"{url}: nothing is there; expected a folder or file that the command can read{hint}")
