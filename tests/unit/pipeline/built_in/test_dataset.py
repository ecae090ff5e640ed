from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.built_in import dataset
from pipeline.built_in.dataset import is_made, make_built_in
from pipeline.config import DataConfig
from pipeline.recipes import RECIPES
from shards.dataset.manifest import load_manifest
from shards.panoptic.built_in import write_synthetic_panoptic


def test_a_run_on_other_data_gets_the_demo_s_backbone_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made: list[str] = []

    def pretrain(manifest: Any, model: Any, transform: Any, path: Path, **_: Any) -> Any:
        assert (model, transform) == (RECIPES["demo"].model, RECIPES["demo"].transform)
        path.parent.mkdir(parents=True)
        path.write_bytes(b"weights")
        return SimpleNamespace(steps=1, accuracy=1.0)

    monkeypatch.setattr(dataset, "make_data", lambda config, say: made.append(config.data.train))
    monkeypatch.setattr(dataset, "load_manifest", lambda url: None)
    monkeypatch.setattr(dataset, "pretrain_backbone", pretrain)
    config = replace(RECIPES["small"], data=DataConfig(train="mine/train", val="mine/val"))
    said: list[str] = []
    assert not is_made(config)
    for _ in range(2):
        make_built_in(config, said.append)
        assert is_made(config)
    assert made == ["runs/demo/data/train"]
    assert len(said) == 2
    assert "is made once" in said[0]


def test_the_panoptic_demo_has_things_on_stuff(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    draw = partial(write_synthetic_panoptic, train=3, val=2, size=64)
    monkeypatch.setattr(dataset, "write_synthetic_panoptic", draw)
    said: list[str] = []
    config = RECIPES["demo-panoptic"]
    dataset.make_data(config, said.append)
    train, val = load_manifest(config.data.train), load_manifest(config.data.val)
    assert (train.images, val.images, train.panoptic) == (3, 2, True)
    assert {category.isthing for category in val.categories} == {True, False}
    assert "drew and sharded 5 images" in said[0]
