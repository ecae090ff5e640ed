"""Checks of words: commands that cannot run on a cluster, secrets, addresses."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress

import msgspec

from jobs.clusters.entries import Cluster, KubeRay, Ray, Sky
from jobs.clusters.file import LOCAL, is_loopback
from jobs.clusters.secret import is_sensitive
from jobs.errors import JobError
from jobs.nearest import nearest
from jobs.plan import SUBMITTABLE, Request
from jobs.training import fitted, known_config, parse_train, smoke
from pipeline.config import RunConfig
from pipeline.errors import Postponed
from pipeline.tracking.server.address import tracking_uri
from shards.errors import ShardError
from shards.store.storage import refuse_secret

_LOCAL_ONLY = (
    "submit", "jobs", "ui", "clusters", "runs", "show", "show-batch", "sync", "compare", "promote", "lineage",
)  # fmt: skip
_SHORTEST_SECRET = 8


def check_words(cluster: Cluster, argv: Sequence[str]) -> None:
    """Raise for a command that no cluster can run, and for secrets: launchers show a job's words to everyone."""
    for text in (*argv, cluster.storage, *(cluster.mounts.values() if isinstance(cluster, Sky) else ())):
        refuse_secret(text)
    places = [*(("the command", argument) for argument in argv)]
    places += [(f"environment.{name} of {cluster.name}", value) for name, value in cluster.environment.items()]
    _refuse_values(places, cluster)
    name = argv[0]
    if name in _LOCAL_ONLY:
        raise JobError(f"`detr {name}` runs on this machine, not as a job; expected one of: {', '.join(SUBMITTABLE)}")
    if name not in SUBMITTABLE:
        raise JobError(
            f"there is no command {name!r} to submit; did you mean {nearest(name, SUBMITTABLE)}? Expected one of: "
            + ", ".join(SUBMITTABLE)
        )
    if any(word in ("-h", "--help") for word in argv[1:]):
        raise JobError(f"`{name} --help` needs no cluster; expected a command to run: ask `detr {name} --help`")


def check_file(cluster: Cluster, text: str) -> None:
    """Raise for a secret of this machine in the file that describes a job, which may come from any key of the entry."""
    _refuse_values([(f"the job's file, by the entry {cluster.name},", text)], cluster)


def _refuse_values(places: Sequence[tuple[str, str]], cluster: Cluster) -> None:
    """Raise for the value of a secret variable of this machine, wherever it would be shown; never repeat it."""
    for name, value in os.environ.items():
        if len(value) < _SHORTEST_SECRET or not is_sensitive(name):
            continue
        for place, text in places:
            if value in text:
                raise JobError(
                    f"{place} holds the value of {name}, which everyone who sees the job would see; expected a reference: "
                    f"secrets.{name} of the cluster's entry"
                )


def read_request(cluster: Cluster, argv: Sequence[str]) -> Request:
    """Return the parsed command, with the defaults of the cluster; only a training is parsed."""
    check_words(cluster, argv)
    if argv[0] != "train":
        return Request(tuple(argv))
    words = with_storage(cluster, argv[1:])
    options = parse_train(words, "detr train")
    assert options is not None  # it would have asked for help
    config = seen_fitted(cluster, options.config, words, options.run or "")
    config = smoke(config) if options.smoke else config
    model = config.initial if config.initial.startswith("models:/") else ""
    return Request(("train", *words), config, options.run or "", options.smoke, model=model)


def seen_fitted(cluster: Cluster, config: RunConfig, argv: Sequence[str], run: str) -> RunConfig:
    """Return the configuration that the data chooses, as `train` does where the job runs, if this machine sees the data.

    What cannot be read here is left to the checks of places, which name the way out.
    """
    known = None
    with suppress(Postponed, ShardError, OSError):
        if not cluster.sees_alone(config.storage):
            known = known_config(config, run)
        if known or not cluster.sees_alone(config.data.train):
            return fitted(config, argv, lambda reason: None, known)
    return config


def with_storage(cluster: Cluster, words: Sequence[str]) -> list[str]:
    """Return the words with the storage of the entry, unless they name another."""
    given = any(re.match("--storage(=|$)", word) for word in words)
    return [*words, *(["--storage", cluster.storage] if cluster.storage and not given else [])]


def at_address(cluster: Cluster, address: str) -> Cluster:
    """Return the entry with another address; raise `JobError` if a token would go there."""
    if not isinstance(cluster, Ray):
        raise JobError(f"--address is for Ray clusters, and {cluster.name} is {cluster.launcher}; expected none")
    if cluster.token:
        raise JobError(
            f"the token of {cluster.name} belongs to {cluster.address}, and --address {address} is another server; expected "
            "an entry of its own for that cluster"
        )
    if cluster.name == LOCAL and not is_loopback(address) and address != cluster.address:
        # This machine's token is for its own cluster, so it stays here.
        return msgspec.structs.replace(cluster, address=address, name=f"{LOCAL}-at-address")
    return msgspec.structs.replace(cluster, address=address)


def warnings_of(cluster: Cluster) -> Iterator[str]:
    """Yield a line for each address beyond this machine that is not encrypted, and for an image that may change."""
    addresses = {"MLflow": cluster.mlflow or tracking_uri()}
    if isinstance(cluster, Ray):
        addresses["Ray's job server"] = cluster.address
    for what, address in addresses.items():
        if address.startswith("http://") and not is_loopback(address):
            yield (
                f"warning: {what} at {address} is not encrypted: tokens, passwords and code can be read and changed on the "
                "way; https, a VPN or `ssh -L` protects them"
            )

    if isinstance(cluster, KubeRay) and "@sha256:" not in cluster.image:
        yield (
            f"warning: image {cluster.image} of {cluster.name} is a tag, so a retry may get other code; a digest, "
            "NAME@sha256:..., does not change"
        )
