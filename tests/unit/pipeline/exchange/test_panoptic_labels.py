from __future__ import annotations

from pathlib import Path

import pytest
import torch

from detr.config import ModelConfig, TransformConfig
from detr.model import build_model
from detr.original import to_original_state_dict
from pipeline.errors import ExchangeError
from pipeline.exchange import export_original as exporter
from pipeline.exchange import import_original as importer
from pipeline.exchange.panoptic_labels import is_export_of_others, with_contiguous_labels
from pipeline.registry.card import read_model, write_folder
from shards.dataset.categories import Category
from tests.support.cards import make_card

MODEL = ModelConfig(
    backbone="resnet18", hidden_dim=128, encoder_layers=1, decoder_layers=1, feedforward_dim=32, dropout=0.0,
    num_queries=5, masks=True,
)  # fmt: skip


def test_a_panoptic_model_of_the_original_keeps_133_classes_and_goes_back_to_250(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    original = build_model(MODEL, 250).eval()
    state = to_original_state_dict(original)
    torch.save({"model": state}, tmp_path / "in.pth")
    read = importer.read_original(tmp_path / "in.pth").model
    model, categories = with_contiguous_labels(read, importer._categories(250, None)[0])
    assert (model.num_classes, len(categories), model.training) == (133, 133, False)
    ids = [category.id for category in categories]
    images = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        expected, found = original(images), model(images)
    assert torch.equal(found.logits, expected.logits[..., [*ids, 250]])
    assert torch.equal(found.masks, expected.masks)

    write_folder(tmp_path / "registered", model, make_card(MODEL, TransformConfig(), categories))
    monkeypatch.setattr(exporter, "read_version", lambda uri: read_model(tmp_path / "registered"))
    notes = exporter.export_original("models:/a/1", tmp_path / "out.pth")
    assert "num_classes=250" in notes[0]
    assert not is_export_of_others(
        importer.read_original(tmp_path / "out.pth").model, importer._categories(250, None)[0]
    )
    back = torch.load(tmp_path / "out.pth", weights_only=True)["model"]
    for name, value in state.items():
        kept = [*ids, 250] if "class_embed" in name else slice(None)
        assert torch.equal(back[name][kept], value[kept]), name
    assert back["detr.class_embed.bias"][0] < -50


def test_an_export_of_other_classes_is_not_taken_for_coco_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = (Category(1, "shape", True), Category(12, "sky", False), Category(240, "sea", False))
    model = build_model(MODEL, len(own)).eval()
    write_folder(tmp_path / "registered", model, make_card(MODEL, TransformConfig(), own))
    monkeypatch.setattr(exporter, "read_version", lambda uri: read_model(tmp_path / "registered"))
    exporter.export_original("models:/a/1", tmp_path / "out.pth")
    with pytest.raises(ExchangeError, match=r"out.pth: was exported with other .* give --categories FILE"):
        importer.import_file(tmp_path / "out.pth", name="again")
    assert "assumed, for the file has 250 classes" in importer._categories(250, None)[1]
