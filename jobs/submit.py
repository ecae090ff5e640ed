"""Submitting a command: read it, check it, plan it, and hand the plan to the engine of the cluster.

`prepare` returns the `Plan` without sending anything; `submit` sends it. Both take an entry of `jobs.clusters`.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence

from jobs.clusters.entries import Cluster, Ray
from jobs.code import Code, code_here
from jobs.engines import engine_of
from jobs.errors import JobError
from jobs.plan import Plan, Request, make_plan
from jobs.refusals import check, check_file, check_now, read_request

__all__ = ["JobError", "prepare", "submit"]

Say = Callable[[str], None]
Read = Callable[[Cluster, Sequence[str]], Request]


def prepare(
    spec: Cluster, argv: Sequence[str], say: Say = print, read: Read = read_request, *, ask: bool = True
) -> Plan:
    """Return the plan of `detr ARGV` on the cluster, checked on this machine; `say` gets warnings.

    read: parses the command. ask: also ask a running cluster for its nodes. Raise the error that the command would end
    with there, as far as this machine can tell.
    """
    from pipeline.tracking.server.address import tracking_uri

    request = read(spec, argv)
    check(spec, request, say)
    if ask and request.config is not None and isinstance(spec, Ray) and spec.nodes is None:
        from jobs.engines.ray import sizes_of_nodes

        sizes = sizes_of_nodes(spec)
        if sizes is not None:
            check_now(spec, request, sizes)
    code = _snapshot(say) if spec.code == "snapshot" else Code.installed()
    plan = make_plan(spec, request, code, secrets.token_hex(4), tracking_uri())
    check_file(spec, engine_of(spec).render(plan))
    return plan


def _snapshot(say: Say) -> Code:
    code = code_here()
    code.check()
    if code.untracked:
        count = len(code.untracked)
        say(
            f"warning: git does not track {count} Python file{'s' if count > 1 else ''}, such as {code.untracked[0]}: the "
            "snapshot leaves them here; `git add` takes them along"
        )
    return code


def submit(spec: Cluster, argv: Sequence[str], say: Say = print) -> str:
    """Start `detr ARGV` on the cluster and return the job's id, after all checks."""
    return send(prepare(spec, argv, say), say)


def send(plan: Plan, say: Say = print) -> str:
    """Hand a plan to the engine of its cluster and return the job's id."""
    return engine_of(plan.cluster).submit(plan, say)
