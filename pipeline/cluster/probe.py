"""Probe of every node before a run exists: code, versions, storage, data, MLflow, GPUs and an all-reduce.

What it finds would otherwise end the run minutes later with a traceback that names no node, or worse, would not: a node
with other code takes part without a complaint.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from pipeline.checkpoint.location import Location
from pipeline.cluster import node_check
from pipeline.cluster.capacity import Node, resources_of_a_worker, workers_that_fit
from pipeline.cluster.node_check import NodeCheck, Question, code_digest, file_digests, versions
from pipeline.cluster.ray_session import BARE
from pipeline.config import RunConfig
from pipeline.errors import Postponed, RunConfigError
from pipeline.tracking.server.address import LOGIN_REMEDY, tracking_uri, without_secret
from shards.dataset.manifest import MANIFEST_NAME
from shards.errors import ShardError, one_line
from shards.store import storage

_ANSWER_S = 60.0  # for a node to start a process and answer; a busy one takes ten seconds
_INSTALL_S = 3600  # for a node to install the libraries of the job before that, where the job brings its own
_MEET_S = 20.0  # for the all-reduce
_SHOWN = 3  # nodes in a line

Say = Callable[[str], None]


def probe(config: RunConfig, folder: Location, nodes: Sequence[Node], gpu: bool, say: Say) -> None:
    """Check that each node can run workers of the run at `folder`; say every problem in a line that names the node.

    Nodes that hold no worker are left alone. Raise `RunConfigError` with the first problem, `Postponed` if a node,
    a store or MLflow does not answer.
    """
    each = resources_of_a_worker(config.cluster, gpu)
    nodes = [node for node in nodes if workers_that_fit([node], each)]
    token = f".detr-{secrets.token_hex(8)}"
    storages = _storages(config, folder)
    installs = _installs()
    if installs:
        say("nodes without the libraries of this job install them first, for an hour at most")
    manifests = tuple(storage.join(url, MANIFEST_NAME) for url in (config.data.train, config.data.val))
    with _written(storages, token, nodes), _node_checks(nodes, installs) as checks:
        here = file_digests(manifests)
        # Data that is made on this machine later is compared by the workers.
        data = tuple(url for url in manifests if not here[url].startswith("cannot"))
        code, tracking = code_digest(), tracking_uri()
        questions = [
            Question(code, storages, token, data, tracking, int(node.resources.get("GPU", 0)) if gpu else 0)
            for node in nodes
        ]
        asked = [check.report.remote(question) for check, question in zip(checks, questions, strict=True)]
        if len(nodes) > 1:
            for check in checks:
                check.prepare.remote()
        reports = answers(asked, nodes, _ANSWER_S + _INSTALL_S if installs else _ANSWER_S)
        problems = problems_of(reports, nodes, questions, here)
        problems += _unseen_answers(storages, token, reports, nodes)
        if not problems and len(nodes) > 1:
            problems = _all_reduce(checks, reports, nodes)
    raise_problems(problems, say)


def _storages(config: RunConfig, folder: Location) -> tuple[str, ...]:
    """Return the folders and URLs that hold the run and its checkpoints."""
    parents = [str(folder).rpartition("/")[0] or "/"]
    if config.checkpoint.store:
        parents.append(config.checkpoint.store)
    return tuple(dict.fromkeys(parents))


@contextmanager
def _written(storages: Sequence[str], token: str, nodes: Sequence[Node]) -> Iterator[None]:
    """Write a file into each storage, for the nodes to read, and remove it and their answers afterwards."""
    try:
        for url in storages:
            storage.write(storage.join(url, token), token.encode())
        yield
    finally:
        for url in storages:
            for name in (token, *(f"{token}-{node.address}" for node in nodes)):
                with suppress(OSError, ShardError):
                    storage.remove(storage.join(url, name))


def _installs() -> bool:
    """Return whether a node installs libraries for this job before the first process of the job starts there."""
    import ray

    runtime_env = ray.get_runtime_context().runtime_env
    return any(runtime_env.get(installer) for installer in ("pip", "uv", "conda"))


@contextmanager
def _node_checks(nodes: Sequence[Node], installs: bool) -> Iterator[list[Any]]:
    """Start a process on each node that can be asked, and end them after the block."""
    import ray
    from ray import cloudpickle
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    cloudpickle.register_pickle_by_value(node_check)  # a node without this package must be able to report that
    checks: list[Any] = []
    runtime_env: dict[str, Any] = {"env_vars": BARE}
    if installs:  # an actor inherits the job's libraries, but not the limit of their installation
        runtime_env["config"] = {"setup_timeout_seconds": _INSTALL_S}
    try:
        actor = ray.remote(NodeCheck)
        for node in nodes:
            there = NodeAffinitySchedulingStrategy(node_id=node.id, soft=False)
            options = {"num_cpus": 0, "scheduling_strategy": there, "runtime_env": runtime_env}
            checks.append(actor.options(**options).remote(node.address))
        yield checks
    finally:
        cloudpickle.unregister_pickle_by_value(node_check)
        for check in checks:
            ray.kill(check)


def answers(asked: list[Any], nodes: Sequence[Node], seconds: float = _ANSWER_S) -> list[Any]:
    """Return what each node answered.

    Raise `Postponed` with the name of one that did not, and `RunConfigError` where the check itself failed.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError

    until, found = time.monotonic() + seconds, []
    for reference, node in zip(asked, nodes, strict=True):
        try:
            found.append(ray.get(reference, timeout=max(1.0, until - time.monotonic())))
        except RayTaskError as error:
            cause = f"{type(error.cause).__name__}: {one_line(error.cause)}"
            raise RunConfigError(
                f"node {node.address}: the probe failed there ({cause}); expected an answer: install the same release "
                "there with all that it needs, or start its Ray in the right environment"
            ) from None
        except RayError as error:  # GetTimeoutError is one
            raise Postponed(
                f"node {node.address} does not answer a probe ({one_line(error)}); expected it within {seconds:.0f} s: "
                "look at Ray's logs there, or take it out of the cluster"
            ) from None
    return found


def problems_of(
    reports: Sequence[Mapping[str, Any]],
    nodes: Sequence[Node],
    questions: Sequence[Question],
    data: Mapping[str, str],
) -> list[tuple[str, str]]:
    """Return (node, problem) for everything in which a node differs from this machine."""
    found = []
    own_versions = versions()
    for report, node, question in zip(reports, nodes, questions, strict=True):
        name = f"{node.address} ({report['host']})"
        found += [(name, problem) for problem in _code_problems(report, own_versions, question.code)]
        if report["tracking"]:
            uri = without_secret(tracking_uri())
            found.append(
                (name, f"does not reach MLflow at {uri} ({report['tracking']}); expected a server that it reaches")
            )
        if report.get("login"):
            uri = without_secret(tracking_uri())
            found.append(
                (
                    name,
                    f"cannot use MLflow at {uri}: {report['login']}; expected a user that it knows: {LOGIN_REMEDY} there",
                )
            )
        if report.get("scratch"):
            found.append((name, report["scratch"]))
        for url, problem in report.get("storages", {}).items():
            if problem:
                found.append(
                    (name, f"storage {url} {problem}; expected a folder that all nodes share, or a store by URL")
                )
        for url, digest in report.get("data", {}).items():
            if digest != data[url]:
                differs = digest if digest.startswith("cannot") else "is another data set than here"
                found.append((name, f"{url} {differs}; expected the data at the same place on every node, or by URL"))
        if report.get("gpus", question.gpus) < question.gpus:
            torch = report["versions"]["torch"]
            found.append(
                (
                    name,
                    f"torch {torch} finds {report['gpus']} of {question.gpus} GPUs; expected a build and a driver for them",
                )
            )
    return found


def _code_problems(report: Mapping[str, Any], own_versions: Mapping[str, str], own_digest: str) -> list[str]:
    install = "install the same release there, or start its Ray in the right environment"
    if not report["digest"]:
        return [f"has no detr-cluster package; {install}"]
    differing = [
        f"{library} {report['versions'][library] or 'missing'} instead of {version}"
        for library, version in own_versions.items()
        if report["versions"][library] != version
    ]
    if differing:
        return [f"has {', '.join(differing)}; {install}"]
    if report["digest"] != own_digest:
        return [f"has other code ({report['digest']} instead of {own_digest}); {install}"]
    return []


def _unseen_answers(
    storages: Sequence[str], token: str, reports: Sequence[Mapping[str, Any]], nodes: Sequence[Node]
) -> list[tuple[str, str]]:
    """Return (node, problem) for what nodes wrote and this machine cannot read."""
    found = []
    for report, node in zip(reports, nodes, strict=True):
        for url in storages:
            if report.get("storages", {}).get(url) != "":
                continue
            try:
                storage.read(storage.join(url, f"{token}-{node.address}"))
            except (OSError, ShardError):
                name = f"{node.address} ({report['host']})"
                found.append(
                    (name, f"wrote into storage {url}, and this machine does not see it; expected shared storage")
                )
    return found


def _all_reduce(
    checks: Sequence[Any], reports: Sequence[Mapping[str, Any]], nodes: Sequence[Node]
) -> list[tuple[str, str]]:
    """Let all nodes sum a number; return (node, problem) for those that could not."""
    (port,) = answers([checks[0].listen.remote(len(nodes))], nodes[:1])
    asked = [
        check.all_reduce.remote(nodes[0].address, port, rank, len(nodes), _MEET_S) for rank, check in enumerate(checks)
    ]
    return [
        (
            f"{node.address} ({report['host']})",
            f"an all-reduce with the other nodes over the interface {report['interface']} failed ({reason}); expected "
            "open ports between all nodes: check the firewall, or choose GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME",
        )
        for reason, report, node in zip(answers(asked, nodes), reports, nodes, strict=True)
        if reason
    ]


def raise_problems(problems: Sequence[tuple[str, str]], say: Say) -> None:
    """Raise the first problem after all have been said, each with the nodes that have it.

    It is a `Postponed` if a later attempt may succeed, since a store or MLflow does not answer and all else is right.
    """
    nodes: dict[str, list[str]] = {}
    for node, problem in problems:
        nodes.setdefault(problem, []).append(node)
    lines = []
    for problem, names in nodes.items():
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        lines.append(f"node{'s' if len(names) > 1 else ''} {', '.join(names[:_SHOWN])}{more}: {problem}")
    for line in lines[1:]:
        say(line)
    if lines:
        away = all(node_check.AWAY in problem for problem in nodes)
        raise (Postponed if away else RunConfigError)(lines[0])
