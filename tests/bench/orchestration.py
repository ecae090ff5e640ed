"""Cost of a run beside its steps: the demo's model in a bare loop, and in a real run of `detr train`.

The bare loop is `train_step` over the loader and nothing else, in a process of its own. The full run is a Ray Train
worker with the step timer, the tracker (to a real SQLite MLflow, watched by the driver once a second) and checkpoints,
as often as the demo writes them. Both take the same steps on the same images in turn, one waiting while the other runs,
so that other load of the machine affects both. Turns begin and end half-way between two log points, and checkpoints are
written at log points, so that background work is finished within the turn. The CPU seconds of Ray's own processes and
of the driver, which run beside both, are reported separately. Waits for data that the run reports on stderr are the
bare loop's turns.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import psutil
import torch

if TYPE_CHECKING:
    from pipeline.cluster.worker import WorkerJob

Row = dict[str, Any]
TURN = 50  # steps, with a log point in their middle
ROUND = 7  # turns of each side, with one checkpoint; the demo's 3,000 steps have eight
WARM = 175  # a log point was 25 steps before, the next one is 25 steps away
# What is replaced in the real run, as `unittest.mock.patch` names it.
RAYS_WORKER, LOOPS_BATCHES = "pipeline.cluster.launch.train_in_ray", "pipeline.training.loop.training_batches"
_DRIVER = "DETR_BENCH_DRIVER"


def orchestration(device: str, rounds: int) -> list[Row]:
    """Measure milliseconds and CPU milliseconds per step of both, and their ratios."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        turns = _run(Path(folder), rounds)
    bare, full = turns["bare"], turns["full"]
    rows = []
    for unit, what in (("s", "time"), ("cpu_s", "CPU")):
        mine, its = (_per_step_ms(side, unit) for side in (full, bare))
        ratios = [a / b for a, b in zip(mine, its, strict=True)]
        rows.append(
            {
                "case": "orchestration", "side": what, "whole_ms": median(mine), "bare_ms": median(its),
                "ratio": median(ratios), "ratios": ratios,
            }
        )  # fmt: skip
        print(
            f"orchestration, {what:5} per step   bare {median(its):7.2f} ms, full {median(mine):7.2f} ms, "
            f"ratio {median(ratios):.4f} (of {len(ratios)} rounds: {', '.join(f'{ratio:.3f}' for ratio in ratios)})",
            flush=True,
        )
    rows.append({"case": "orchestration", "side": "Ray and driver", "cpu_share": turns["beside"]})
    print(
        f"orchestration, Ray's own processes and the driver beside both: {turns['beside']:.3f} CPU seconds per second"
    )
    return rows


def _per_step_ms(turns: list[dict[str, float]], unit: str) -> list[float]:
    """Return the milliseconds per step of each round."""
    sums = [sum(turn[unit] for turn in turns[at : at + ROUND]) for at in range(0, len(turns), ROUND)]
    return [seconds / (ROUND * TURN) * 1e3 for seconds in sums]


def _run(folder: Path, rounds: int) -> dict[str, Any]:
    from pipeline.recipes import RECIPES
    from pipeline.train import Launch, train
    from shards.synthetic import write_synthetic
    from shards.write.writer import write_coco

    made = write_synthetic(folder / "source", val=20)
    for name, split in (("train", made.train), ("val", made.val)):
        write_coco(split.images, split.annotations, folder / name)
    config = RECIPES["demo"]
    config = replace(
        config,
        storage=str(folder / "runs"),
        model=replace(config.model, backbone_weights="random"),
        data=replace(config.data, train=str(folder / "train"), val=str(folder / "val"), built_in=False),
        # Untrained weights stay finite.
        optim=replace(config.optim, lr=1e-7, lr_backbone=1e-7, max_steps=WARM + rounds * ROUND * TURN + 1),
        evaluate=replace(config.evaluate, every=config.optim.epochs, limit=2),
        checkpoint=replace(config.checkpoint, every_steps=ROUND * TURN),
        cluster=replace(config.cluster, workers=1, max_failures=0),
    )
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder / 'mlflow.db'}"
    os.environ[_DRIVER] = str(os.getpid())
    with patch(RAYS_WORKER, _measured_worker):
        train(config, Launch(say=lambda _: None))
    turns: dict[str, Any] = json.loads((folder / "runs" / "turns.json").read_text())
    return turns


def _measured_worker(job: "WorkerJob") -> None:
    """Run the real worker, with a gate in its stream of batches at which the bare loop has its turn."""
    from pipeline.cluster.worker import train_in_ray
    from pipeline.config import to_json
    from pipeline.training import loop

    turns: dict[str, Any] = {"full": [], "bare": []}
    original = loop.training_batches
    with _bare_loop(to_json(job.config).decode()) as bare_turn:

        def gated(*arguments: Any) -> Iterator[Any]:
            start, began_s, beside_cpu_s = _now(), 0.0, 0.0
            for number, batches in enumerate(original(*arguments)):
                if number == WARM:
                    began_s, beside_cpu_s = time.perf_counter(), _beside_cpu_s()
                    start = _now()
                elif number > WARM and (number - WARM) % TURN == 0:
                    turns["full"].append(_since(start))
                    turns["bare"].append(bare_turn())
                    turns["beside"] = (_beside_cpu_s() - beside_cpu_s) / (time.perf_counter() - began_s)
                    start = _now()
                yield batches

        with patch(LOOPS_BATCHES, gated):
            train_in_ray(job)
    (job.folder.parent / "turns.json").write_text(json.dumps(turns))


@contextmanager
def _bare_loop(config: str) -> Iterator[Callable[[], dict[str, float]]]:
    """Yield a function that gives the bare loop's process, warmed up, its turn."""
    command = [sys.executable, "-m", "tests.bench.orchestration"]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        assert process.stdin
        assert process.stdout

        def say(text: str) -> dict[str, float]:
            process.stdin.write(text + "\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
            answer: dict[str, float] = json.loads(process.stdout.readline())  # type: ignore[union-attr]
            return answer

        say(json.dumps(config))
        yield lambda: say("go")
        process.stdin.close()


def _bare() -> None:
    """Run a turn of the bare loop for each line of stdin after the first, which is the configuration."""
    from detr.compute import set_channels_last
    from pipeline.config import from_json
    from pipeline.data.loader import training_batches
    from pipeline.distributed.ranks import Ranks
    from pipeline.schedule import Schedule
    from pipeline.training.model import build_trainable_model
    from pipeline.training.optim import build_optimizer, set_learning_rates
    from pipeline.training.step import train_step
    from shards.dataset.manifest import load_manifest

    config = from_json(json.loads(sys.stdin.readline()))
    torch.set_num_threads(config.cluster.cpus_per_worker)
    manifest, ranks = load_manifest(config.data.train), Ranks()
    schedule = Schedule(config.optim, manifest.images)
    model = build_trainable_model(config, manifest.num_classes).train()
    set_channels_last(model)
    optimizer = build_optimizer(model, config.optim)
    batches = training_batches(manifest, config, schedule, ranks, 0, schedule.total_steps)
    step = 0

    def take(steps: int) -> dict[str, float]:
        nonlocal step
        start = _now()
        for _ in range(steps):
            set_learning_rates(optimizer, schedule.factor(step))
            train_step(model, next(batches), optimizer, config, ranks, step)
            step += 1
        return _since(start)

    print(json.dumps(take(WARM)), flush=True)
    for _ in sys.stdin:
        print(json.dumps(take(TURN)), flush=True)
    batches.close()


def _now() -> tuple[float, float]:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return time.perf_counter(), used.ru_utime + used.ru_stime


def _since(start: tuple[float, float]) -> dict[str, float]:
    end = _now()
    return {"s": end[0] - start[0], "cpu_s": end[1] - start[1]}


def _beside_cpu_s() -> float:
    """Return the CPU seconds of the driver and all its processes except this worker and the bare loop."""
    driver = psutil.Process(int(os.environ[_DRIVER]))
    me = psutil.Process()
    mine = {me.pid, *(child.pid for child in me.children())}
    total = 0.0
    for process in [driver, *driver.children(recursive=True)]:
        if process.pid not in mine:
            times = process.cpu_times()
            total += times.user + times.system
    return total


if __name__ == "__main__":
    _bare()
