"""Real clusters of several nodes on this machine that lose nodes, and get them back, while a run goes on."""

import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.run_folder import INITIAL_NAME
from tests.support.command import TINY, Command, config_of, until
from tests.support.ray_nodes import Node, free_port, node
from tests.support.recording import Kept, Recording, seen_per_epoch

pytestmark = pytest.mark.slow
IMAGES, BATCH_SIZE, STEPS = 24, 6, 72
TRAIN = ["train", "overfit", "--data.train", "data/train", "--data.val", "data/val", *TINY]
TRAIN += ["--optim.batch-size", str(BATCH_SIZE), "--optim.max-steps", str(STEPS), "--evaluate.every", "100"]
# So that rounding, which differs between numbers of workers, changes no assignment of queries to objects.
TRAIN += ["--model.dropout", "0", "--model.num-queries", "49", "--optim.lr", "1e-5", "--optim.lr-backbone", "1e-6"]


@dataclass
class Cluster:
    """Nodes of one CPU each; the head is not to be lost."""

    address: str
    folder: Path
    environment: dict[str, str]
    stack: ExitStack

    def add(self) -> Node:
        """Another node, once it has joined. One by one: two that start at a time choose the same ports."""
        return self.stack.enter_context(node(self.folder, self.environment, "--address", self.address))

    def drain(self, deadline_s: int) -> None:
        """Tell Ray that the one node beside the head is about to be taken away, as a cloud tells of a spot machine."""
        environment = self.environment | {"RAY_ADDRESS": self.address}
        code = (
            "import ray; ray.init(logging_level='ERROR'); print([node['NodeID'] for node in ray.nodes() "
            "if node['Alive'] and 'node:__internal_head__' not in node['Resources']][0])"
        )
        found = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
        )
        ray = Path(sys.executable).with_name("ray")
        words = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        words += ["--deadline-remaining-seconds", str(deadline_s), "--node-id", found.stdout.split()[-1]]
        subprocess.run([str(ray), "drain-node", "--address", self.address, *words], env=environment, check=True)


@pytest.fixture
def cluster(detr: Command, recording: Recording) -> Iterator[Cluster]:
    port = free_port()
    (detr.folder / "token").write_text("a-token-of-this-test-alone-0123456789abcdef")
    detr.env |= {"RAY_AUTH_TOKEN_PATH": str(detr.folder / "token"), "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "1"}
    environment = detr.env | {"RAY_AUTH_MODE": "token"}
    address = f"127.0.0.1:{port}"
    with ExitStack() as stack:
        head = ["--head", "--port", str(port), "--include-dashboard", "false"]
        stack.enter_context(node(detr.folder, environment, *head))
        yield Cluster(address, detr.folder, environment, stack)


def test_a_run_continues_with_the_nodes_that_are_left(
    detr: Command, cluster: Cluster, recording: Recording, tmp_path: Path
) -> None:
    lost = cluster.add()
    cluster.add()
    recording.pace(0.3)
    driver = detr.start(
        *TRAIN,
        *("--cluster.workers", "3", "--cluster.min-workers", "1", "--address", cluster.address),
        *("--track.run-name", "elastic"),
    )
    until(lambda: recording.last() >= (12, 3) or driver.poll() is not None, "12 steps with 3 workers")
    assert driver.poll() is None, driver.communicate()[0]
    detr.wait_for_checkpoint("elastic", 1)  # so that steps of 3 workers are kept
    lost.kill()
    recording.pace(2)  # so that the run does not end before the node comes
    until(lambda: recording.last()[1] == 2 or driver.poll() is not None, "a step with 2 workers")
    cluster.add()
    until(lambda: recording.last()[1] == 3 or driver.poll() is not None, "a step with 3 workers again")
    recording.pace(0)
    output, _ = driver.communicate(timeout=600)
    assert driver.returncode == 0, output
    lost = r"warning: worker \d died: .+; restart 1, 3 -> 2 workers, resumed after \d+ s at step \d+"
    assert re.search(lost, output), output
    back = r"resources for 3 workers.*; restart 2, 2 -> 3 workers, resumed after \d+ s at step \d+"
    assert re.search(back, output), output

    kept = recording.kept()
    assert len(kept) == STEPS
    sizes = [one.ranks for one in kept]
    assert [size for size, before in zip(sizes, [0, *sizes[:-1]], strict=True) if size != before] == [3, 2, 3]
    assert all(set(count.values()) == {1} and len(count) == IMAGES for count in seen_per_epoch(kept, IMAGES))

    expected = alone(detr.folder, "elastic", tmp_path)
    assert [sorted(one.ids) for one in kept] == [sorted(one.ids) for one in expected]
    assert [one.loss for one in kept] == pytest.approx([one.loss for one in expected], rel=1e-5)


def alone(folder: Path, run: str, empty: Path) -> list[Kept]:
    """The steps of the run of this name as one process takes them in the folder `empty`, undisturbed."""
    from pipeline.config import ClusterConfig
    from pipeline.distributed.ranks import Ranks
    from pipeline.training import loop
    from pipeline.training.state import RunInfo

    config = replace(config_of(folder, run), cluster=ClusterConfig())
    (weights,) = folder.glob(f"runs/{run}-*/{INITIAL_NAME}")
    shutil.copy(weights, empty)
    taken: list[Kept] = []
    train_step = loop.train_step

    def recorded(model: Any, batches: Any, *rest: Any) -> Any:
        result = train_step(model, batches, *rest)
        ids = [target.image_id for batch in batches for target in batch.targets]
        taken.append(Kept(1, ids, float(result.losses.total.detach())))
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", recorded)
        loop.run(config, RunInfo("run", empty, "commit"), Ranks(), None)
    return taken


def test_a_node_that_is_taken_away_with_notice_costs_no_failure(
    detr: Command, cluster: Cluster, recording: Recording
) -> None:
    leaving = cluster.add()
    recording.pace(1)
    driver = detr.start(
        *TRAIN,
        *("--cluster.workers", "2", "--cluster.min-workers", "1", "--cluster.max-failures", "0"),
        *("--checkpoint.every-steps", "0", "--address", cluster.address, "--track.run-name", "drained"),
    )
    until(lambda: recording.last() >= (6, 2) or driver.poll() is not None, "6 steps with 2 workers")
    recording.pace(2)  # so that the run does not end before its node has gone
    cluster.drain(deadline_s=90)  # of which a busy machine takes ten to tell the workers
    told_at = recording.last()[0]
    detr.wait_for_checkpoint("drained", told_at, timeout_s=75)
    until(lambda: recording.last()[1] == 1 or driver.poll() is not None, "a step with 1 worker")
    leaving.kill()
    recording.pace(0)
    output, _ = driver.communicate(timeout=600)
    assert driver.returncode == 0, output
    assert re.search(r"the node of worker \d was taken away; restart 1, 2 -> 1 workers, resumed after", output)
    kept = recording.kept()
    assert len(kept) == STEPS
    assert all(set(count.values()) == {1} and len(count) == IMAGES for count in seen_per_epoch(kept, IMAGES))
    # The last checkpoint before the node went is of its last seconds, so that few steps were taken twice.
    twice = Counter(line.step for line in recording.lines() if line.rank == 0)
    assert sum(count > 1 for count in twice.values()) * 1 < 30
