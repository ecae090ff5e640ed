"""ONNX of a small model says the same as PyTorch, for other batches and sizes than it was traced with."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from detr.config import DeformableConfig, ModelConfig, TransformConfig
from detr.model import Outputs, build_model
from detr.panoptic import panoptic
from pipeline.errors import ExchangeError
from pipeline.exchange import export_onnx as onnx_exporter
from pipeline.exchange.export_onnx import Sides, difference_in_onnxruntime, export_onnx
from pipeline.registry.card import Card, read_model, write_folder
from shards.dataset.categories import Category
from tests.support.cards import make_card

# Every departure that the original's format refuses, and free parts of the graph: group norm, trained positions at 0.
CONFIG = ModelConfig(
    backbone="tiny",
    norm="group",
    hidden_dim=32,
    heads=4,
    encoder_layers=1,
    decoder_layers=2,
    feedforward_dim=32,
    num_queries=9,
    position_at_input=True,
    decoder_input="queries",
)

CARD = make_card(CONFIG, TransformConfig(eval_size=320, max_size=400), (Category(1, "a"), Category(7, "b")))


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("registered")
    write_folder(folder, build_model(CONFIG, 2), CARD)
    return folder


@pytest.fixture(autouse=True)
def _resolved(registered: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_exporter, "read_version", lambda uri: read_model(registered))


@pytest.fixture(scope="module")
def exported(registered: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[str, ...]]:
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_exporter, "read_version", lambda uri: read_model(registered))
        return path, export_onnx("models:/a/1", path)


def test_any_batch_and_size_gives_the_outputs_of_pytorch(exported: tuple[Path, tuple[str, ...]]) -> None:
    import onnxruntime

    path, notes = exported
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [(tensor.name, tensor.type) for tensor in session.get_inputs()] == [
        ("images", "tensor(float)"),
        ("padding", "tensor(bool)"),
    ]
    assert [tensor.name for tensor in session.get_outputs()] == ["logits", "boxes"]
    model, _ = onnx_exporter.read_version("models:/a/1")
    for batch, height, width in ((1, 64, 64), (2, 65, 300), (8, 127, 90)):
        images, padding = torch.randn(batch, 3, height, width), torch.zeros(batch, height, width, dtype=torch.bool)
        padding[-1, :, width // 2 :] = batch > 1  # at 90 px that is the edge of a cell, where rounding would show
        with torch.inference_mode():
            expected = model(images, padding)
        logits, boxes = session.run(None, {"images": images.numpy(), "padding": padding.numpy()})
        assert logits.shape == (batch, 9, 3)
        np.testing.assert_allclose(logits, expected.logits, rtol=0, atol=1e-3)
        np.testing.assert_allclose(boxes, expected.boxes, rtol=0, atol=1e-3)
    assert notes[0] == "batch, height and width are free (64 px or more)"
    assert "differs from PyTorch by at most" in notes[1]
    assert "batches of 1, 2, 8" in notes[1]


def test_the_file_holds_its_labels_and_transform(exported: tuple[Path, tuple[str, ...]]) -> None:
    import onnxruntime

    metadata = onnxruntime.InferenceSession(str(exported[0])).get_modelmeta().custom_metadata_map
    assert json.loads(metadata["detr.categories"]) == [{"id": 1, "name": "a"}, {"id": 7, "name": "b"}]
    assert json.loads(metadata["detr.transform"])["mean"] == [0.485, 0.456, 0.406]


KINDS = (True, True, True, False)
"""Kinds of the classes of a panoptic model: things, and stuff."""


@pytest.fixture(scope="module")
def with_masks(tmp_path_factory: pytest.TempPathFactory) -> tuple[onnx_exporter._Flat, Path]:
    """A panoptic model and its file; its masks differ much between queries, so that rounding does not choose segments."""
    torch.manual_seed(0)
    config = replace(CONFIG, backbone="resnet18", norm="frozen_batch", hidden_dim=128, heads=8, masks=True)
    model, path = (
        build_model(replace(config, auxiliary=False), len(KINDS)).eval(),
        tmp_path_factory.mktemp("m") / "m.onnx",
    )
    model.class_embed.bias.data[-1] = -9.0  # every query is of a class
    model.bbox_attention.q_linear.weight.data *= 5
    model.mask_head.lay1.weight.data[:, 128:] *= 1000  # the input from attention
    categories = tuple(Category(10 * label, f"class {label}", thing) for label, thing in enumerate(KINDS))
    flat = onnx_exporter._Flat(model)
    onnx_exporter._write(flat, path, make_card(config, TransformConfig(), categories), Sides())
    return flat, path


def test_a_model_with_masks_is_exported(with_masks: tuple[onnx_exporter._Flat, Path]) -> None:
    """Sizes in which one stage is exactly twice the next, as 320 px gives, and sizes in which none is."""
    for side in (320, 200):
        assert difference_in_onnxruntime(*with_masks, TransformConfig(eval_size=side, max_size=400)) < 1e-3


@pytest.mark.parametrize("batch", [1, 2])
def test_a_panoptic_model_s_file_gives_the_segments_of_pytorch(
    with_masks: tuple[onnx_exporter._Flat, Path], batch: int
) -> None:
    import onnxruntime

    model, path = with_masks
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    categories = json.loads(session.get_modelmeta().custom_metadata_map["detr.categories"])
    stuff = [not category["isthing"] for category in categories]
    assert stuff == [not thing for thing in KINDS]
    sizes = [(200, 266), (150, 266)][:batch]
    images, padding = torch.randn(batch, 3, 200, 266), torch.zeros(batch, 200, 266, dtype=torch.bool)
    for row, (height, _) in enumerate(sizes):
        padding[row, height:] = True
    with torch.inference_mode():
        expected = model(images, padding)
    given = map(torch.from_numpy, session.run(None, {"images": images.numpy(), "padding": padding.numpy()}))
    results = [
        panoptic(Outputs(logits, boxes, masks=masks), sizes, sizes, (200, 266), stuff, 0.0)
        for logits, boxes, masks in (expected, given)
    ]
    for found, wanted in zip(*results, strict=True):
        assert {stuff[segment.label] for segment in found.segments} == {True, False}
        assert [segment.label for segment in found.segments] == [segment.label for segment in wanted.segments]
        assert (found.indices == wanted.indices).float().mean() > 0.999


def test_no_canvas_is_larger_than_the_file_takes() -> None:
    """Learned positions at a stride of 16 end at 800 pixels, and the paper's images are 1066 wide."""
    config = replace(CONFIG, position="learned")
    sides = onnx_exporter.sides_of(build_model(config, 2))
    assert sides.largest == 800
    assert onnx_exporter._canvases(TransformConfig(), sides)[0] == (800, 800)
    assert onnx_exporter._canvases(TransformConfig(), Sides())[0] == (800, 1066)


TWO_STAGE = DeformableConfig(levels=3, box_refine=True, two_stage=True, mixed_selection=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "options", "layers", "queries", "free"),
    [
        # A deformable model takes canvases of whole cells of its coarsest level, as many as it has queries.
        ("deformable", TWO_STAGE, 1, 70, "multiples of 32, 96 px or more"),
        ("conditional", DeformableConfig(), 2, 9, "64 px or more"),
    ],
)
def test_a_variant_is_exported(
    tmp_path: Path, variant: Any, options: DeformableConfig, layers: int, queries: int, free: str
) -> None:
    torch.manual_seed(0)
    config = replace(
        CONFIG,
        variant=variant,
        encoder_layers=1,
        decoder_layers=layers,
        position_at_input=False,
        decoder_input="zeros",
        num_queries=queries,
        auxiliary=False,
        deformable=options,
    )
    built = build_model(config, 2).eval()
    model, path, sides = onnx_exporter._Flat(built), tmp_path / "m.onnx", onnx_exporter.sides_of(built)
    assert str(sides) == free
    card = Card(**{field: getattr(CARD, field) for field in CARD.__struct_fields__} | {"model": config})
    onnx_exporter._write(model, path, card, sides)
    assert difference_in_onnxruntime(model, path, TransformConfig(eval_size=160, max_size=224), sides) < 1e-3


def test_the_file_of_another_model_is_detected(exported: tuple[Path, tuple[str, ...]]) -> None:
    torch.manual_seed(1)
    other = onnx_exporter._Flat(build_model(CONFIG, 2).eval())
    assert difference_in_onnxruntime(other, exported[0], TransformConfig(eval_size=320, max_size=400)) > 1e-2


@pytest.mark.parametrize("difference", [2e-3, float("nan")])
def test_a_file_that_differs_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, difference: float) -> None:
    monkeypatch.setattr(onnx_exporter, "_write", lambda model, path, *_: path.write_text("onnx"))
    monkeypatch.setattr(onnx_exporter, "difference_in_onnxruntime", lambda *_: difference)
    with pytest.raises(ExchangeError, match=r"onnxruntime and PyTorch differ by .*expected at most 0\.001"):
        export_onnx("models:/a/1", tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_missing_packages_are_named_with_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec

    def without(name: str, *rest: Any) -> Any:
        return None if name in ("onnxruntime", "onnxscript") else find(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    with pytest.raises(ExchangeError, match=r"needs onnxruntime, onnxscript; .*extra `onnx`: `make setup`"):
        export_onnx("models:/a/1", tmp_path / "m.onnx")


def test_the_target_is_checked_before_the_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_exporter, "read_version", lambda uri: pytest.fail("fetched"))
    for path in (tmp_path, tmp_path / "absent" / "m.onnx"):
        with pytest.raises(ExchangeError, match="cannot be written; expected a file in a folder that exists"):
            export_onnx("models:/a/1", path)
