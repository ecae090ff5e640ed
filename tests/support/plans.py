"""Plans of a training for each launcher, and a lint of the scripts that engines write."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec

from jobs.clusters import Cluster, find_cluster
from jobs.code import Code
from jobs.engines import engine_of
from jobs.plan import Plan, make_plan
from jobs.refusals import read_request
from tests.support.entries import ELASTIC, FIXED, entry
from tests.support.in_process import ROOT

RECIPES = ["detr-r50-8gpu", "detr-r50-16gpu", "detr-r50-64gpu", "detr-r50-64gpu-b256"]
SIZES = [FIXED, ELASTIC]
CODE = Code(ROOT, "0" * 40, ("jobs/code.py",))
WORDS = ["--data.train", "s3://bucket/it's train", "--data.val", "s3://bucket/val"]


def plan(folder: Path, launcher: str, recipe: str = "detr-r50-16gpu", nodes: str = FIXED, **changes: Any) -> Plan:
    """Return the plan of a training on the cluster `it`; `changes` are fields of its entry."""
    (folder / "detr.toml").write_text(entry(launcher, nodes))
    cluster: Cluster = msgspec.structs.replace(find_cluster("it"), **changes)
    elastic = ["--cluster.min-workers", "8"] if nodes == ELASTIC else []
    request = read_request(cluster, ["train", recipe, *WORDS, *elastic])
    return make_plan(cluster, request, CODE, "12ab34cd", "http://unused")


def render(plan: Plan) -> str:
    """Return the file that the launcher gets."""
    return engine_of(plan.cluster).render(plan)


def shellcheck(script: str) -> None:
    """Check that a shell script has no findings."""
    done = subprocess.run(
        [Path(sys.executable).with_name("shellcheck"), "--shell=bash", "-"],
        input=script,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
