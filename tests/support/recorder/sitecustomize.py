"""Python imports this at its start where this folder is on PYTHONPATH: notes what every training step of a worker used.

Only where DETR_RECORD names a folder. Each process writes lines there, `STEP RANK RANKS GROUP LOSS ID,ID,...`, one for each
step that was taken; `pace`, a file beside them, says how many seconds a step is to take at least. `hang-R` makes rank R sleep
before its next step, and `fail-R` makes it raise the error that the file holds.
"""

import os
import sys
import time
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_MODULE = "pipeline.training.loop"


class _Wrapping(Loader):
    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)  # type: ignore[no-any-return]

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        module.train_step = _recorded(module.train_step)  # type: ignore[attr-defined]


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != _MODULE:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None:
            spec.loader = _Wrapping(spec.loader)
        return spec


def _recorded(train_step: Any) -> Any:
    folder = os.environ["DETR_RECORD"]
    # Rank 0's address is another one for each group of workers.
    group = f"{time.time():.3f}"

    def wrapped(model: Any, batches: Any, optimizer: Any, config: Any, ranks: Any, step: int, *rest: Any) -> Any:
        while os.path.exists(f"{folder}/hang-{ranks.rank}"):
            time.sleep(0.1)
        if os.path.exists(f"{folder}/fail-{ranks.rank}"):
            with open(f"{folder}/fail-{ranks.rank}") as file:
                raise RuntimeError(file.read())
        start = time.monotonic()
        result = train_step(model, batches, optimizer, config, ranks, step, *rest)
        ids = ",".join(str(target.image_id) for batch in batches for target in batch.targets)
        port = os.environ.get("MASTER_PORT", "0")
        with open(f"{folder}/{os.getpid()}", "a") as file:
            file.write(f"{step} {ranks.rank} {ranks.world_size} {port} {group} {float(result.losses.total)!r} {ids}\n")
        try:
            with open(f"{folder}/pace") as file:
                time.sleep(max(0.0, float(file.read() or 0) - (time.monotonic() - start)))
        except FileNotFoundError:
            pass
        return result

    return wrapped


if os.environ.get("DETR_RECORD"):
    sys.meta_path.insert(0, _Finder())
