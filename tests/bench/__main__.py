"""Comparison of this package with the original, as ratios: `python -m tests.bench`; `--help` lists the options.

`PEER_DETR` names a checkout of the original; without one, only this package is timed. Figures belong in
`BENCHMARKS.md`, with the device and the command.
"""

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.bench import cases, deformable, peer, throughput
from tests.bench.cases import Options, Work
from tests.bench.timing import PeakMemory, side_by_side

Row = dict[str, Any]
OURS, PLAIN, PEER = "ours", "ours, channels first", "original"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--case", choices=CASES, action="append", help="only these; all that fit the device by default")
    parser.add_argument("--rounds", type=int, default=5, help="how often each side is timed, in turn")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--memory", metavar="SIDE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        print(_peak_here(options.memory, options.device))
        return
    if why := peer.missing():
        print(f"without the original: {why}")
    rows: list[Row] = []
    for name in options.case or [name for name in CASES if name not in LEFT_OUT[options.device]]:
        rows += CASES[name](options.device, options.rounds)
    machine = _machine(options.device)
    print("\n".join(f"{key}: {value}" for key, value in machine.items()))
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")


def criterion(device: str, rounds: int) -> list[Row]:
    """Measure matching and losses, forward and backward, at 6 layers and 100 queries."""
    rows = []
    for images, boxes in ((8, 7), (8, 30), (32, 7), (64, 7)):
        works = {OURS: cases.criterion_ours(images, boxes, device)}
        if not peer.missing():
            works[PEER] = cases.criterion_peer(images, boxes, device)
        rows += _compare(f"criterion, {images} images, {boxes} boxes", works, 2 * rounds, device, calls=10)
    return rows


def step(device: str, rounds: int) -> list[Row]:
    """Measure a training step of R50 on 4 images of 640 x 640, and its peak memory."""
    return _add_peaks(_compare("training step, R50, 4 x 640 x 640", _steps(device), rounds, device), device)


def inference(device: str, rounds: int) -> list[Row]:
    """Measure inference of R50 on one image of 800 x 1066."""
    images = torch.randn(1, 3, 800, 1066, generator=torch.Generator().manual_seed(0)).to(device)
    works = {
        OURS: cases.inference_ours(images, None, Options()),
        PLAIN: cases.inference_ours(images, None, Options(channels_last=False)),
    }
    if not peer.missing():
        works[PEER] = cases.inference_peer(images, None)
    return _compare("inference, R50, 1 x 800 x 1066", works, rounds, device)


def recompute(device: str, rounds: int) -> list[Row]:
    """Measure the time and memory of activation checkpointing in a training step of R50 on 4 images of 640 x 640."""
    images = _images(device)
    works = {
        f"recompute {modules}": cases.step_ours(images, None, 7, Options(recompute=modules)) for modules in RECOMPUTE
    }
    return _add_peaks(_compare("activation checkpointing, R50, 4 x 640 x 640", works, rounds, device), device)


def _steps(device: str) -> dict[str, Work]:
    images = _images(device)
    works = {
        OURS: cases.step_ours(images, None, 7, Options()),
        PLAIN: cases.step_ours(images, None, 7, Options(channels_last=False)),
    }
    if not peer.missing():
        works[PEER] = cases.step_peer(images, None, 7)
    return works


def _images(device: str) -> torch.Tensor:
    return torch.randn(4, 3, 640, 640, generator=torch.Generator().manual_seed(0)).to(device)


def _compare(title: str, works: dict[str, Work], rounds: int, device: str, calls: int = 1) -> list[Row]:
    timings = side_by_side(works, rounds=rounds, calls=calls, device=device)
    reference = timings.get(PEER, next(iter(timings.values())))
    rows = []
    for side, timing in timings.items():
        ratio = reference.ratio_to(timing)
        rows.append(
            {"case": title, "side": side, "median_s": timing.median_s, "best_s": timing.best_s, "speed_ratio": ratio}
        )
        print(
            f"{title:45} {side:22} median {timing.median_s * 1e3:8.1f} ms, best {timing.best_s * 1e3:8.1f} ms, "
            f"{ratio:.2f} times as fast",
            flush=True,
        )
    return rows


def _add_peaks(rows: list[Row], device: str) -> list[Row]:
    for row in rows:
        row["peak_bytes"] = _peak(row["side"], device)
    reference = next((row for row in rows if row["side"] == PEER), rows[0])["peak_bytes"]
    for row in rows:
        row["peak_ratio"] = row["peak_bytes"] / reference
        print(f"{row['case']:45} {row['side']:22} peak {row['peak_bytes'] / 2**20:.0f} MiB, x{row['peak_ratio']:.2f}")
    return rows


def _peak(side: str, device: str) -> int:
    """Return the peak memory of one side's training step, measured in a process of its own."""
    command = [sys.executable, "-m", "tests.bench", "--device", device, "--memory", side]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def _peak_here(side: str, device: str) -> int:
    images = _images(device)
    if side == PEER:
        work = cases.step_peer(images, None, 7)
    elif side.startswith("recompute "):
        work = cases.step_ours(images, None, 7, Options(recompute=side.removeprefix("recompute ")))  # type: ignore[arg-type]
    else:
        work = cases.step_ours(images, None, 7, Options(channels_last=side == OURS))
    work()  # the first step makes the optimizer's state
    peak = PeakMemory(device)
    work()
    return peak.bytes()


def _machine(device: str) -> dict[str, str]:
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    if device == "cpu" and Path("/proc/cpuinfo").exists():
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    return {
        "device": f"{name}, {torch.get_num_threads()} threads" if device == "cpu" else name,
        "load": f"{os.getloadavg()[0]:.1f}",
        "torch": torch.__version__,
        "command": f"python -m tests.bench {' '.join(sys.argv[1:])}",
    }


RECOMPUTE = ("none", "encoder", "backbone", "both")


def _data(module: str, function: str) -> Callable[[str, int], list[Row]]:
    """Return a case that imports its packages when it runs; a machine that trains only `detr` may lack them."""
    return lambda device, rounds: getattr(importlib.import_module(f"tests.bench.{module}"), function)(device, rounds)


CASES: dict[str, Callable[[str, int], list[Row]]] = {
    "criterion": criterion,
    "step": step,
    "inference": inference,
    "recompute": recompute,
    "train": throughput.train,
    "sampling": deformable.sampling,
    "matching": deformable.matching,
    "parsing": _data("writing", "parsing"),
    "writing": _data("writing", "writing"),
    "loading": _data("loading", "loading"),
    "planning": _data("planning", "planning"),
    "padding": _data("planning", "padding"),
    "streaming": _data("streaming", "streaming"),
    "scoring": _data("scoring", "scoring"),
    "masks": _data("scoring", "masks"),
    "segments": _data("panoptic", "segments"),
    "quality": _data("panoptic", "scored"),
    "explaining": _data("scoring", "explaining"),
    "comparing": _data("comparing", "comparing"),
    "promotion": _data("comparing", "promotion"),
    "describing": _data("describing", "describing"),
    "evaluating": _data("evaluating", "evaluating"),
    "orchestration": _data("orchestration", "orchestration"),
    "checkpointing": _data("checkpointing", "checkpointing"),
}
# Cases that measure nothing useful on a device; they still run if asked for.
LEFT_OUT = {
    "cuda": (
        "parsing",
        "writing",
        "loading",
        "planning",
        "padding",
        "streaming",
        "scoring",
        "masks",
        "quality",
        "explaining",
        "comparing",
        "promotion",
        "describing",
        "evaluating",
        "orchestration",
    ),
    "cpu": ("train",),
}

if __name__ == "__main__":
    main()
