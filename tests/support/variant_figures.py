"""Golden cases of the variants of DETR; the rules are in the README files of their folders."""

import json
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from detr.batch import Target
from detr.config import DeformableConfig, LossConfig, ModelConfig
from detr.criterion import Losses, compute_losses
from detr.model import DETR, build_model
from detr.original import load_original_state_dict, to_original_state_dict
from pipeline.config import OptimConfig
from pipeline.training.optim import build_optimizer
from tests.support.real_data import GOLDEN

LOSS = LossConfig(cost_class=2.0, weight_ce=2.0)
_DEFAULTS = {"deformable": {"feedforward_dim": 1024}, "conditional": {}}
OUTPUTS = 3e-5
_LOSSES, _LATER_LOSSES, _NORM, _PARAMETER = 2e-5, 3e-4, 2e-3, 1e-2
_OPTIONS = {
    "--backbone": "backbone",
    "--position_embedding": "position",
    "--hidden_dim": "hidden_dim",
    "--nheads": "heads",
    "--dim_feedforward": "feedforward_dim",
    "--enc_layers": "encoder_layers",
    "--dec_layers": "decoder_layers",
    "--num_queries": "num_queries",
    "--num_queries_one2one": "num_queries",
    "--dilation": "dilation",
    "--num_feature_levels": "deformable.levels",
    "--enc_n_points": "deformable.encoder_points",
    "--dec_n_points": "deformable.decoder_points",
    "--with_box_refine": "deformable.box_refine",
    "--two_stage": "deformable.two_stage",
    "--mixed_selection": "deformable.mixed_selection",
    "--look_forward_twice": "deformable.look_forward_twice",
    "--num_queries_one2many": "deformable.one_to_many_queries",
    "--k_one2many": "loss.one_to_many_copies",
    "--lambda_one2many": "loss.weight_one_to_many",
}


def rng(name: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(name.encode()))


def configs(arguments: list[str], variant: str = "deformable") -> tuple[ModelConfig, LossConfig]:
    """Return the configuration for options of the original; dropout is 0."""
    fields: dict[str, dict[str, Any]] = {
        "": {"variant": variant, "num_queries": 300, "dropout": 0.0, **_DEFAULTS[variant]},
        "deformable": {},
        "loss": {"cost_class": 2.0, "weight_ce": 2.0},
    }
    rest = list(arguments)
    while rest:
        option = rest.pop(0)
        if option == "--dataset_file":
            rest.pop(0)
            continue
        section, _, name = _OPTIONS[option].rpartition(".")
        value: Any = True
        if rest and not rest[0].startswith("--"):
            text = rest.pop(0)
            value = text if name in ("backbone", "position") else float(text) if "." in text else int(text)
        fields[section][name] = value
    model = ModelConfig(**fields[""], deformable=DeformableConfig(**fields["deformable"]))
    return model, LossConfig(**fields["loss"])


def canonical(key: str, refine: bool) -> str:
    key = re.sub(r"^transformer\.decoder\.(?=bbox_embed\.|class_embed\.)", "", key)
    return key if refine else re.sub(r"^(class_embed|bbox_embed)\.\d+", r"\1.0", key)


def filled(key: str, shape: tuple[int, ...]) -> Tensor:
    """Return the weights of a canonical key."""
    r = rng(key)
    z = r.standard_normal(shape)
    if key.endswith("running_var"):
        value = 0.5 + r.random(shape)
    elif key.endswith("running_mean"):
        value = 0.1 * z
    elif key.endswith("weight") and len(shape) == 1:
        value = 1 + 0.1 * z
    elif any(name in key for name in ("query_embed", "row_embed", "col_embed", "level_embed")):
        value = z
    elif key.endswith("sampling_offsets.bias"):
        value = 2 * z
    elif key.startswith("class_embed.") and key.endswith("bias"):
        value = 0.1 * z - 2
    elif len(shape) == 1:
        value = 0.1 * z
    else:
        gain = 1.5 if key.startswith("backbone.") else 0.5 if key.endswith("sampling_offsets.weight") else 1.0
        value = gain * z / np.sqrt(np.prod(shape[1:]))
    return torch.tensor(value, dtype=torch.float32)


def drawn_target(r: np.random.Generator, objects: int, low: int, classes: int, number: int, size: Any) -> Target:
    centres, extents = 0.25 + 0.5 * r.random((objects, 2)), 0.05 + 0.4 * r.random((objects, 2))
    labels = torch.from_numpy(r.integers(low, classes, objects))
    return Target(torch.tensor(np.concatenate([centres, extents], 1), dtype=torch.float32), labels, number, size)


class Case:
    """One golden case: the model with its filled weights, the batch and the expected figures."""

    def __init__(self, folder: str, name: str, root: Path = GOLDEN, variant: str = "deformable") -> None:
        self.name = f"{folder}/{name}"
        self.expected: dict[str, Any] = json.loads((root / folder / f"{name}.json").read_text())
        self.arrays = dict(np.load(root / folder / f"{name}.npz"))
        meta = self.expected["meta"]
        self.config, self.loss_config = configs(meta["args"], variant)
        self.classes, self.draws = meta["classes"], meta["draws_from"]
        sizes = [tuple(size) for size in meta["sizes"]]
        height, width = max(h for h, _ in sizes), max(w for _, w in sizes)
        self.images = torch.zeros(len(sizes), 3, height, width)
        self.padding = torch.ones(len(sizes), height, width, dtype=torch.bool)
        self.targets = []
        low = 1 if self.classes == 91 else 0
        for i, ((h, w), objects) in enumerate(zip(sizes, meta["targets"], strict=True)):
            image = rng(f"{self.draws}/image{i}").standard_normal((3, h, w))
            self.images[i, :, :h, :w] = torch.tensor(image, dtype=torch.float32)
            self.padding[i, :h, :w] = False
            r = rng(f"{self.draws}/target{i}")
            self.targets.append(drawn_target(r, objects, low, self.classes, i, (2 * h, 2 * w)))
        self.num_boxes = float(max(sum(meta["targets"]), 1))

    @property
    def true_size(self) -> bool:
        return self.classes == 91

    def model(self) -> DETR:
        model = build_model(self.config, self.classes)
        state = {
            key: filled(canonical(key, self.config.deformable.box_refine), tuple(value.shape))
            for key, value in to_original_state_dict(model).items()
        }
        load_original_state_dict(model, state)
        return model

    def losses(self, model: DETR) -> Losses:
        images = self.images.to(next(model.parameters()).dtype)
        return compute_losses(model(images, self.padding), self.targets, self.num_boxes, self.loss_config)


def relative(got: Any, expected: Any, floor: float = 1e-12) -> float:
    """Return the largest difference relative to the largest magnitude expected, or to `floor`."""
    got = np.asarray(got.detach() if isinstance(got, Tensor) else got, np.float64)
    expected = np.asarray(expected, np.float64)
    assert got.shape == expected.shape
    return float(np.abs(got - expected).max() / max(np.abs(expected).max(), floor)) if got.size else 0.0


def pairs(found: Any) -> set[tuple[int, int]]:
    """Return an assignment as pairs of query and target."""
    return {(int(query), int(target)) for query, target in zip(*found, strict=True)}


def clearly_ranked(scores: Any) -> Any:
    """Return True for each score that rounding cannot exchange with a neighbour."""
    gaps = np.abs(np.diff(scores)) > 1e-5
    return np.concatenate([[True], gaps]) & np.concatenate([gaps, [False]])


def assert_trains_alike(case: Case, dtype: torch.dtype, optim: OptimConfig, steps: int = 3) -> None:
    """Check losses, gradients and the first steps with the project's own optimizer: its groups, rates and clipping."""
    exact = dtype == torch.float64
    figures = case.expected | (case.expected["fp64"] if exact else {})
    model = case.model().train().to(dtype)
    assert sum(p.numel() for p in model.parameters()) == figures["parameters"]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == figures["trainable_parameters"]
    optimizer = build_optimizer(model, optim)
    for name, group in zip(figures["group_sizes"], optimizer.param_groups, strict=True):
        assert len(group["params"]) == figures["group_sizes"][name]
        assert group["lr"] == pytest.approx(figures["group_rates"][name])
    expected = list(zip(figures["loss_per_step"], figures["grad_norm_per_step"], strict=True))[:steps]
    for step, (loss, norm) in enumerate(expected):
        optimizer.zero_grad()
        losses = case.losses(model)
        losses.total.backward()
        if step == 0:
            assert losses.parts.keys() == figures["losses"].keys()
            for name, value in losses.parts.items():
                assert relative(value, figures["losses"][name]) <= (1e-6 if exact else _LOSSES), name
            norms = {name: p.grad.norm().item() for name, p in model.named_parameters() if p.grad is not None}
            assert norms.keys() == figures["grad_norms"].keys()
            for name, value in norms.items():
                # Smaller ones are rounding noise: key biases have no gradient in exact arithmetic.
                assert relative(value, figures["grad_norms"][name], 1e-4 * norm) <= (1e-5 if exact else _PARAMETER), (
                    name
                )
        assert relative(losses.total, loss) <= (1e-6 if exact else _LATER_LOSSES if step else _LOSSES)
        total = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        assert relative(total, norm) <= (1e-5 if exact else _NORM)
        optimizer.step()
