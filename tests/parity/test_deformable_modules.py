"""Modules of Deformable DETR, each by itself, against figures of its originals."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from detr.batch import Target
from detr.config import DeformableConfig, ModelConfig
from detr.criterion import compute_losses
from detr.deformable.attention import DeformableAttention
from detr.deformable.levels import geometry, level_padding
from detr.deformable.proposals import box_vectors, cell_boxes
from detr.matcher import match
from detr.model import DETR, build_model
from detr.original import load_original_state_dict, to_original_state_dict
from detr.position import SinePosition
from detr.postprocess import detect
from detr.variant import SigmoidOutputs
from tests.support.real_data import GOLDEN
from tests.support.variant_figures import LOSS, OUTPUTS, clearly_ranked, configs, filled, pairs, relative, rng

pytestmark = pytest.mark.skipif(
    not (GOLDEN / "deformable/r50.json").exists(),
    reason=f"no golden figures in {GOLDEN}; set DETR_GOLDEN to their folder",
)


def listed(name: str) -> list[Any]:
    path = GOLDEN / name
    return json.loads(path.read_text()) if path.exists() else []


@pytest.mark.parametrize("expected", listed("deformable/attention.json"), ids=lambda expected: expected["name"])
def test_attention_and_its_gradients(expected: dict[str, Any]) -> None:
    name, batch, queries, width = expected["name"], expected["batch"], expected["queries"], expected["dim"]
    shapes = tuple((h, w) for h, w in expected["shapes"])
    attention = DeformableAttention(width, expected["heads"], expected["levels"], expected["points"])
    state = {key: filled(f"attention.{name}.{key}", tuple(v.shape)) for key, v in attention.state_dict().items()}
    attention.load_state_dict(state)
    r = rng(f"attention/{name}")
    cells = sum(h * w for h, w in shapes)

    def tensor(array: Any) -> Tensor:
        return torch.tensor(array, dtype=torch.float32)

    query = tensor(r.standard_normal((batch, queries, width))).requires_grad_()
    value = tensor(r.standard_normal((batch, cells, width))).requires_grad_()
    low, high = expected["spread"]
    points = low + (high - low) * r.random((batch, queries, len(shapes), 2))
    if expected["reference"] == 4:
        points = np.concatenate([points, 0.05 + 0.4 * r.random(points.shape)], -1)
    reference = tensor(points).requires_grad_()
    padding = torch.from_numpy(r.random((batch, cells)) < expected["padded"]) if expected["padded"] else None
    u = tensor(r.standard_normal((batch, queries, width)))
    output = attention(query, reference, value, padding, shapes)
    (output * u).sum().backward()
    arrays = np.load(GOLDEN / "deformable/attention.npz")
    every = slice(
        None, None, 8 if name == "true_size" else 1
    )  # of the channels; the figures of the largest are thinned
    assert relative(output[..., every], arrays[f"{name}/output"]) <= 1e-5
    found = {"grad_query": query.grad, "grad_value": value.grad, "grad_reference": reference.grad}
    norms = {"output": output, **found, **{key: p.grad for key, p in attention.named_parameters()}}
    for key, gradient in found.items():
        if f"{name}/{key}" in arrays:
            assert gradient is not None
            given = gradient if key == "grad_reference" else gradient[..., every]
            assert relative(given, arrays[f"{name}/{key}"]) <= 1e-4
    for key, norm in expected["norms"].items():
        assert relative(norms[key].norm(), norm) <= 1e-4, key


def drawn_layers(
    r: np.random.Generator, layers: int, batch: int, queries: int, classes: int, scale: float
) -> list[Any]:
    drawn = []
    for _ in range(layers):
        logits = scale * r.standard_normal((batch, queries, classes)) - 1
        boxes = np.concatenate([r.random((batch, queries, 2)), 0.02 + 0.6 * r.random((batch, queries, 2))], -1)
        tensors = [torch.tensor(array, dtype=torch.float32, requires_grad=True) for array in (logits, boxes)]
        drawn.append(SigmoidOutputs(*tensors))
    return drawn


@pytest.mark.parametrize(
    "expected",
    [*listed("deformable/criterion.json"), *listed("hybrid/criterion.json")],
    ids=lambda expected: expected["name"],
)
def test_criterion(expected: dict[str, Any]) -> None:
    r, counts, classes = rng(expected["draws_from"]), expected["targets"], expected["classes"]
    batch, layers, scale = len(counts), expected["layers"], expected.get("scale", 2)
    drawn = drawn_layers(r, layers, batch, expected["queries"], classes, scale)
    many = drawn_layers(r, layers if "many" in expected else 0, batch, expected.get("many", 0), classes, scale)
    cells = drawn_layers(r, 1 if expected["enc_queries"] else 0, batch, expected["enc_queries"], classes, scale)
    targets = []
    for i, n in enumerate(counts):
        boxes = np.concatenate([0.25 + 0.5 * r.random((n, 2)), 0.05 + 0.4 * r.random((n, 2))], -1)
        labels = torch.from_numpy(r.integers(0, classes, n))
        targets.append(Target(torch.tensor(boxes, dtype=torch.float32), labels, i, (1, 1)))

    def nested(found: list[SigmoidOutputs]) -> SigmoidOutputs | None:
        return found[-1]._replace(auxiliary=tuple(found[:-1])) if found else None

    outputs = nested(drawn)
    assert outputs is not None
    outputs = outputs._replace(encoder=nested(cells), one_to_many=nested(many))
    config = replace(LOSS, one_to_many_copies=expected.get("k", 6), weight_one_to_many=expected.get("lambda", 1.0))
    losses = compute_losses(outputs, targets, float(max(sum(counts), 1)), config)
    losses.total.backward()
    assert losses.parts.keys() == expected["losses"].keys()
    for name, value in losses.parts.items():
        assert relative(value, expected["losses"][name]) <= 1e-5, name
    assert relative(losses.total, expected["loss"]) <= 1e-5
    for layer, found in zip(drawn, expected["assignments"], strict=True):
        assert [pairs(got) for got in match(layer, targets, config)] == [pairs(pair) for pair in found]
    assert_gradients(expected, drawn, many, cells)


def assert_gradients(expected: dict[str, Any], drawn: Any, many: Any, cells: Any) -> None:
    def norms(layers: Any, field: str) -> list[float]:
        return [getattr(layer, field).grad.norm().item() for layer in layers]

    if "grad_logits_norm" in expected:
        assert relative(norms([*drawn, *cells], "logits"), expected["grad_logits_norm"]) <= 1e-4
        assert relative(norms([*drawn, *cells], "boxes"), expected["grad_boxes_norm"]) <= 1e-4
        return
    for key, layers in (("grad_norms", drawn), ("grad_norms_one2many", many), ("grad_norms_enc", cells)):
        got = list(zip(norms(layers, "logits"), norms(layers, "boxes"), strict=True))
        wanted = expected.get(key) or []
        assert relative(np.array(got).reshape(-1), np.array(wanted, np.float64).reshape(-1), 1e-6) <= 1e-4


@pytest.mark.parametrize("expected", listed("deformable/detections.json"), ids=lambda expected: expected["name"])
def test_best_pairs(expected: dict[str, Any]) -> None:
    r, shape = rng(expected["draws_from"]), (expected["batch"], expected["queries"])
    logits = 2 * r.standard_normal((*shape, expected["classes"])) - 2
    boxes = np.concatenate([r.random((*shape, 2)), 0.02 + 0.6 * r.random((*shape, 2))], -1)
    outputs = SigmoidOutputs(*(torch.tensor(array, dtype=torch.float32) for array in (logits, boxes)))
    arrays = np.load(GOLDEN / "deformable/detections.npz")
    for image, found in enumerate(detect(outputs, [tuple(size) for size in expected["sizes"]])):
        prefix = f"{expected['name']}/{image}"
        assert relative(found.scores, arrays[f"{prefix}/scores"]) <= 1e-6
        apart = clearly_ranked(arrays[f"{prefix}/scores"])
        assert (found.labels.numpy() == arrays[f"{prefix}/labels"])[apart].all()
        assert relative(found.boxes_xyxy[apart], arrays[f"{prefix}/boxes"][apart]) <= 1e-6


def test_geometry_of_padded_levels() -> None:
    arrays = np.load(GOLDEN / "deformable/geometry.npz")
    whole = torch.from_numpy(arrays["image_padding"])
    shapes = tuple((arrays[f"padding{i}"].shape[1], arrays[f"padding{i}"].shape[2]) for i in range(4))
    paddings = [level_padding(whole, shape) for shape in shapes]
    for i, padding in enumerate(paddings):
        assert padding is not None
        assert (padding.numpy() == arrays[f"padding{i}"]).all()
        position = SinePosition(32, 10000.0, 0.5)(torch.zeros(2, 1, *shapes[i]), padding)
        position = position.masked_fill(padding.flatten(1)[..., None], 0.0).transpose(1, 2).unflatten(2, shapes[i])
        assert relative(position, arrays[f"position{i}"]) <= OUTPUTS
    found = geometry(shapes, paddings, torch.zeros(1))
    assert relative(found.valid_ratios, arrays["valid_ratios"]) <= 1e-6
    reference = found.centres[:, :, None] * found.valid_ratios[:, None]
    assert relative(reference, arrays["encoder_reference"]) <= OUTPUTS
    boxes, invalid = cell_boxes(found)
    expected = arrays["proposals"]
    assert (invalid.numpy() == np.isinf(expected).all(-1)).all()
    assert relative(boxes[~invalid], expected[~invalid.numpy()]) <= OUTPUTS
    drawn = torch.tensor(rng("geometry/proposals").standard_normal((1, 5, 4)), dtype=torch.float32)
    assert relative(box_vectors(drawn.sigmoid(), 256)[..., ::8], arrays["proposal_vectors"]) <= OUTPUTS


KEYS = {
    name: found for name, found in dict(listed("deformable/keys.json") or {}).items() if "keys" in found
}  # the entry "backbone" has the keys that all share


@pytest.mark.parametrize("name", KEYS)
def test_keys_and_shapes_are_the_originals_both_ways(name: str) -> None:
    expected = listed("deformable/keys.json")
    config, _ = configs(KEYS[name]["options"])
    model = build_model(config, 91)
    state = to_original_state_dict(model)
    given = {key: list(value.shape) for key, value in state.items()}
    assert given == KEYS[name]["keys"] | expected["backbone"]
    assert sum(p.numel() for p in model.parameters()) == KEYS[name]["parameters"]
    other = build_model(config, 91)
    load_original_state_dict(other, state | {"transformer.total_ops": torch.zeros(1)})
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())
    alias = next(iter(model.aliases()))
    with pytest.raises(ValueError, match=alias):
        load_original_state_dict(other, state | {alias: state[alias] + 1})


@pytest.mark.parametrize("name", ["plain", "refine", "two_stage"])
def test_first_weights(name: str) -> None:
    expected = json.loads((GOLDEN / "deformable/first_weights.json").read_text())
    torch.manual_seed(0)
    attention = DeformableAttention(256, 8, 4, 4)
    attention.reset_parameters()
    figures = expected["sampling_offsets.bias of 8 heads, 4 levels, 4 points"]
    assert relative(attention.sampling_offsets.bias, figures) <= 1e-6
    options = {"plain": {}, "refine": {"box_refine": True}, "two_stage": {"box_refine": True, "two_stage": True}}
    model = build_model(
        ModelConfig(
            variant="deformable",
            backbone="resnet18",
            num_queries=300,
            feedforward_dim=1024,
            deformable=DeformableConfig(**options[name]),
        ),
        91,
    )
    assert relative(last_biases(model), expected[name]["bbox_embed.N.layers.2.bias"][: len(model.bbox_embed)]) <= 1e-6
    drawn = dict(model.named_parameters())
    for key, figure in expected[name]["drawn"].items():
        values = drawn[key].detach().double()
        assert values.std().item() == pytest.approx(figure["std"], rel=0.05, abs=1e-3), key
        assert values.abs().max().item() == pytest.approx(figure["largest"], rel=0.2, abs=1e-3), key
        assert values.mean().item() == pytest.approx(figure["mean"], abs=0.1 if "level" in key else 0.01), key
    for head in model.class_embed:
        assert head.bias.unique().tolist() == pytest.approx(expected[name]["class_embed biases"])
        assert torch.equal(head.weight, model.class_embed[0].weight)


def last_biases(model: DETR) -> Tensor:
    return torch.stack([head.layers[-1].bias for head in model.bbox_embed])
