"""The MLflow model of a version: the packages that serving it imports and no others, its code, its signature."""

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from detr.config import ModelConfig, TransformConfig
from detr.model import build_model
from pipeline.inference.requests import Options
from pipeline.registry import mlflow_model
from pipeline.registry.card import Card, write_folder
from pipeline.registry.mlflow_model import PACKAGES, requirements, signature, write_code
from shards.dataset.categories import Category

ROOT = mlflow_model.ROOT
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
    served = serve(version, PACKAGES)
    assert served.returncode == 0, served.stderr
    answer = json.loads(served.stdout)
    assert len(answer["results"]) == 3
    assert answer["results"][0]["segmentation"]["size"] == [32, 48]
    assert answer["used"] == sorted({"pillow": "PIL"}.get(name, name) for name in PACKAGES)


def test_a_package_missing_from_the_list_is_noticed(version: Path) -> None:
    served = serve(version, set(PACKAGES) - {"safetensors"})
    assert "No module named 'safetensors" in served.stderr


def test_versions_are_pinned_as_the_package_index_knows_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.15.0+cpu" if name == "torch" else "1.2")
    assert requirements()[:2] == ["torch==2.15.0", "numpy==1.2"]


def test_the_code_is_one_archive_from_which_python_imports(version: Path, tmp_path: Path) -> None:
    for name in ("one.zip", "two.zip"):
        write_code(tmp_path / name)
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()
    detect = (
        "import sys; from pathlib import Path; import pipeline.inference.detector as module; "
        "assert '.zip' in module.__file__, module.__file__; module.Detector(Path(sys.argv[1]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "one.zip")}
    command = [sys.executable, "-W", "ignore", "-c", detect, str(version)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_signature_has_the_parameters_of_a_request_and_their_defaults() -> None:
    schema = signature().params
    assert {spec.name: spec.default for spec in schema.params} == asdict(Options())
