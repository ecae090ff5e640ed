"""The script for SkyPilot, with programs in the place of Python and Ray and the variables that SkyPilot sets."""

import os
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from jobs.clusters import find_cluster
from jobs.code import Code
from jobs.engines.sky import SkyEngine
from jobs.plan import make_plan
from jobs.refusals import read_request
from tests.support.in_process import ROOT

PYTHON = """#!/bin/bash
trap 'sleep 1; exit 75' TERM
echo "driver $* at $RAY_ADDRESS" >>"$WORK/log"
while [ ! -e "$WORK/status" ]; do sleep 0.1; done
exit "$(cat "$WORK/status")"
"""
RAY = """#!/bin/bash
echo "ray $*" >>"$WORK/log"
[ "$1" = health-check ] && exit 0
[ "$2" = --head ] && exec sleep 600
exit 1
"""


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> "Start":
    return Start(monkeypatch, tmp_path)


class Start:
    """Starts the script of a node."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        monkeypatch.chdir(folder)
        (folder / "venv").mkdir()
        for name, text in (("python", PYTHON), ("ray", RAY)):
            (folder / "venv" / name).write_text(text)
            (folder / "venv" / name).chmod(0o755)
        (folder / "detr.toml").write_text(f"""
            [clusters.cloud]
            launcher = "sky"
            nodes = {{count = 2, gpus = 8, accelerator = "H100"}}
            python = "{folder}/venv/python"
            """)
        cluster = find_cluster("cloud")
        request = read_request(cluster, ["train", "demo", "--run", "it"])
        plan = make_plan(cluster, request, Code(ROOT, "c", ("jobs/code.py",)), "12ab34cd", "")
        self._script = yaml.safe_load(SkyEngine().render(plan))["run"]
        self._folder = folder

    def __call__(self, rank: int) -> "subprocess.Popen[bytes]":
        variables = {"SKYPILOT_NODE_RANK": str(rank), "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}
        variables |= {"SKYPILOT_NUM_GPUS_PER_NODE": "8", "WORK": str(self._folder), "HOME": str(self._folder)}
        return subprocess.Popen(["bash", "-c", self._script], env=os.environ | variables)

    def log(self) -> str:
        """What the programs were asked."""
        path = self._folder / "log"
        return path.read_text() if path.exists() else ""

    def wait_for(self, text: str) -> None:
        """Wait until the log holds it."""
        end = time.monotonic() + 120
        while text not in self.log():
            assert time.monotonic() < end, self.log()
            time.sleep(0.05)


def test_a_node_joins_the_head_and_ends_well_when_it_is_gone(start: Start) -> None:
    assert start(1).wait(120) == 0
    asked = start.log().splitlines()
    assert asked == [
        "ray health-check --address 10.0.0.1:6379",
        "ray start --address 10.0.0.1:6379 --num-gpus 8 --disable-usage-stats --block",
    ]


def test_the_first_node_runs_the_driver_and_ends_with_its_status(start: Start, tmp_path: Path) -> None:
    script = start(0)
    start.wait_for("driver -P -m jobs.cli train demo --run it at 10.0.0.1:6379")
    start.wait_for("ray start --head --node-ip-address 10.0.0.1 --port 6379")
    (tmp_path / "status").write_text("3")
    assert script.wait(120) == 3


def test_a_stop_lets_the_driver_save_and_ends_with_75(start: Start) -> None:
    script = start(0)
    start.wait_for("driver ")
    script.terminate()
    assert script.wait(120) == 75
