"""A registered version lists the packages that serving it imports, and no others."""

import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from detr.config import ModelConfig, TransformConfig
from detr.model import build_model
from pipeline.registry import publish
from pipeline.registry.card import Card, write_folder
from shards.dataset.categories import Category

ROOT = Path(publish.__file__).resolve().parents[2]
SERVE = """
import builtins, json, sys
from pathlib import Path
from types import SimpleNamespace

allowed, own, used = set(sys.argv[2].split()), {"detr", "shards", "pipeline"}, set()
original = builtins.__import__

def guarded(name, globals=None, locals=None, fromlist=(), level=0):
    importer, package = ((globals or {}).get("__name__") or "").partition(".")[0], name.partition(".")[0]
    if importer in own and not level and package not in own | set(sys.stdlib_module_names):
        if package not in allowed:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        used.add(package)
    return original(name, globals, locals, fromlist, level)

builtins.__import__ = guarded
from PIL import Image
import pipeline.inference.serve as serve
from pipeline.inference.detector import coco_results

model = serve.DetrModel()
model.load_context(SimpleNamespace(artifacts={serve.ARTIFACT: sys.argv[1]}))
found = model._detector([Image.new("RGB", (48, 32))], 0.0)[0]
print(json.dumps({"used": sorted(used), "results": coco_results(1, found)}))
"""


@pytest.fixture(scope="module")
def version(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small model with masks, as a version holds it."""
    folder = tmp_path_factory.mktemp("version") / "detector"
    torch.manual_seed(0)
    layers = {"encoder_layers": 1, "decoder_layers": 1, "feedforward_dim": 32, "num_queries": 3}
    config = ModelConfig(backbone="tiny", hidden_dim=128, masks=True, **layers)
    origin = {"recipe": "", "run_id": "", "checkpoint": "", "train_digest": "", "val_digest": "", "code_commit": ""}
    card = Card(
        model=config,
        transform=TransformConfig(),
        categories=(Category(1, "cat"),),
        evaluate_batch_size=1,
        channels_last=True,
        step=0,
        epoch=0.0,
        metrics={},
        **origin,
    )
    write_folder(folder, build_model(config, 1), card)
    return folder


def serve(version: Path, packages: Iterable[str]) -> subprocess.CompletedProcess[str]:
    """Detect on an image with the code of a version, in which only `packages` can be imported."""
    allowed = [
        module for module, names in importlib.metadata.packages_distributions().items() if set(names) & set(packages)
    ]
    command = [sys.executable, "-W", "ignore", "-c", SERVE, str(version), " ".join(allowed)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_serving_imports_exactly_the_packages_that_a_version_lists(version: Path) -> None:
    served = serve(version, publish._PACKAGES)
    assert served.returncode == 0, served.stderr
    answer = json.loads(served.stdout)
    assert len(answer["results"]) == 3
    assert answer["results"][0]["segmentation"]["size"] == [32, 48]
    assert answer["used"] == sorted({"pillow": "PIL"}.get(name, name) for name in publish._PACKAGES)


def test_a_package_missing_from_the_list_is_noticed(version: Path) -> None:
    served = serve(version, set(publish._PACKAGES) - {"safetensors"})
    assert "No module named 'safetensors" in served.stderr
