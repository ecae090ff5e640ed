import dataclasses
import json
import subprocess
import sys
from typing import Any

import pytest

import detr
from detr.config import ConfigError, LossConfig, ModelConfig, TransformConfig


@pytest.mark.parametrize("config", [ModelConfig(), LossConfig(), TransformConfig()])
def test_configs_survive_json(config: Any) -> None:
    fields = json.loads(json.dumps(dataclasses.asdict(config)))
    tuples = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    assert type(config)(**tuples) == config


@pytest.mark.parametrize(
    ("build", "changes"),
    [
        (ModelConfig, {"backbone": "resnet152"}),
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
