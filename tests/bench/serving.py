"""Latency of each kind of request to MLflow's server of a version: `python -m tests.bench.serving`.

One request at a time, over loopback, with random weights: a picture costs what it would cost with trained ones, except that
the answers are short. Figures belong in `BENCHMARKS.md`.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from mlflow.models import Model

from detr.model import build_model
from pipeline.recipes import RECIPES
from pipeline.registry.card import write_folder
from pipeline.registry.mlflow_model import write_mlflow_model
from shards.dataset.categories import Category
from tests.support.cards import make_card
from tests.support.pictures import kinds
from tests.support.serving import serving

CATEGORIES = tuple(Category(number, f"category {number}") for number in range(1, 81))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.serving", description=__doc__)
    parser.add_argument("--recipe", choices=sorted(RECIPES), default="demo", help="model and transform")
    parser.add_argument("--rounds", type=int, default=10, help="requests of each kind, after one to warm up")
    options = parser.parse_args()
    config = RECIPES[options.recipe]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(0)
        card = make_card(config.model, config.transform, CATEGORIES)
        write_folder(folder / "detector", build_model(config.model, len(CATEGORIES)), card)
        write_mlflow_model(folder / "model", folder / "detector", Model())
        start = time.perf_counter()
        with serving(str(folder / "model"), folder) as server:
            print(f"{options.recipe}, {os.cpu_count()} cores: the server is ready after {_since(start):.1f} s")
            for kind in kinds(640, 480):
                status, _ = server.ask(kind.rows)
                seconds = []
                for _ in range(options.rounds):
                    start = time.perf_counter()
                    server.ask(kind.rows)
                    seconds.append(_since(start))
                milliseconds = f"{1000 * statistics.median(seconds):.1f} ms, at most {1000 * max(seconds):.1f} ms"
                print(f"{kind.name:24} {status}  {milliseconds}", flush=True)


def _since(start: float) -> float:
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
