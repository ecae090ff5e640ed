import json
import subprocess
import sys
from typing import Any

import msgspec
import pytest

import detr
from detr.config import ConfigError, DeformableConfig, LossConfig, ModelConfig, TransformConfig


@pytest.mark.parametrize("config", [ModelConfig(), ModelConfig(variant="deformable"), LossConfig(), TransformConfig()])
def test_configs_survive_json(config: Any) -> None:
    assert msgspec.json.decode(msgspec.json.encode(config), type=type(config)) == config


def test_model_of_an_older_release_is_read_without_the_fields_of_variants() -> None:
    fields = json.loads(msgspec.json.encode(ModelConfig()))
    older = {name: value for name, value in fields.items() if name not in ("variant", "deformable")}
    assert msgspec.json.decode(json.dumps(older), type=ModelConfig) == ModelConfig()


@pytest.mark.parametrize(
    ("build", "changes"),
    [
        (ModelConfig, {"backbone": "resnet152"}),
        (ModelConfig, {"deformable": DeformableConfig(levels=3)}),
        (ModelConfig, {"variant": "deformable", "hidden_dim": 48}),
        (ModelConfig, {"variant": "deformable", "pre_norm": True}),
        (ModelConfig, {"variant": "deformable", "masks": True}),
        (DeformableConfig, {"levels": 2}),
        (DeformableConfig, {"two_stage": True}),
        (DeformableConfig, {"look_forward_twice": True}),
        (DeformableConfig, {"two_stage": False, "mixed_selection": True}),
        (LossConfig, {"focal_alpha": 1.5}),
        (ModelConfig, {"norm": "layer"}),
        (ModelConfig, {"position": "none"}),
        (ModelConfig, {"hidden_dim": 100}),
        (ModelConfig, {"hidden_dim": 18, "heads": 3}),
        (ModelConfig, {"decoder_layers": 0}),
        (ModelConfig, {"dropout": 1.0}),
        (ModelConfig, {"frozen_stages": 6}),
        (ModelConfig, {"dilation": True, "backbone": "resnet18"}),
        (ModelConfig, {"num_queries": 15, "query_init": "grid"}),
        (LossConfig, {"weight_bbox": -1.0}),
        (LossConfig, {"eos_coef": float("nan")}),
        (LossConfig, {"cost_class": 0, "cost_bbox": 0, "cost_giou": 0}),
        (TransformConfig, {"train_scales": ()}),
        (TransformConfig, {"max_size": 0}),
        (TransformConfig, {"flip": 1.5}),
        (TransformConfig, {"crop_range": (600, 384)}),
        (TransformConfig, {"std": (0.0, 1.0, 1.0)}),
    ],
)
def test_impossible_config_error_names_the_field(build: Any, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes))) as error:
        build(**changes)
    assert "got" in str(error.value)
    assert "expected" in str(error.value)
    assert "\n" not in str(error.value)


def test_importing_the_package_and_its_config_imports_no_torch() -> None:
    code = "import sys, detr, detr.config; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_public_name_resolves() -> None:
    for name in detr.__all__:
        assert getattr(detr, name).__name__ == name
    with pytest.raises(AttributeError, match="nothing"):
        detr.nothing  # noqa: B018
