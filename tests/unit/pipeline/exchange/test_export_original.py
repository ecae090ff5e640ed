"""Export of versions to the original's files."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from detr.config import ModelConfig, TransformConfig
from detr.model import DETR, build_model
from detr.original import to_original_state_dict, with_class_rows
from pipeline.errors import ExchangeError
from pipeline.exchange import export_original as original_exporter
from pipeline.exchange import import_original as original_importer
from pipeline.exchange.export_original import export_original, original_options
from pipeline.exchange.import_original import read_original
from pipeline.registry.card import read_model, write_folder
from shards.dataset.categories import Category
from tests.support.cards import make_card
from tests.support.original_files import HYBRID, SMALL, assert_one_line, written


def registered(folder: Path, model: DETR, categories: tuple[Category, ...]) -> None:
    card = make_card(model.config, TransformConfig(), categories)
    write_folder(folder, model, card)


@pytest.fixture
def _registered_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(original_exporter, "read_version", lambda uri: read_model(tmp_path / "registered"))


@pytest.mark.usefixtures("_registered_here")
@pytest.mark.parametrize("kind", ["boxes", "masks", "conditional", "deformable"])
def test_an_imported_file_is_exported_byte_for_byte(tmp_path: Path, kind: Any) -> None:
    variant = {} if kind in ("boxes", "masks") else {"variant": kind, "num_queries": 9}
    config = replace(SMALL, hidden_dim=128, masks=True) if kind == "masks" else replace(SMALL, **variant)
    written(tmp_path / "in.pth", config)
    model = read_original(tmp_path / "in.pth").model
    registered(tmp_path / "registered", model, original_importer._categories(91, None)[0])
    notes = export_original("models:/a/1", tmp_path / "out.pth")
    before, after = (torch.load(tmp_path / name, weights_only=True) for name in ("in.pth", "out.pth"))
    assert after.keys() == {"model"}
    assert list(after["model"]) == list(before["model"])
    assert all(
        value.numpy().tobytes() == before["model"][name].numpy().tobytes()
        and value.dtype == before["model"][name].dtype
        for name, value in after["model"].items()
    )
    assert "num_classes=91" in notes[0]
    assert "--backbone resnet18" in notes[0]
    assert read_original(tmp_path / "out.pth").model.config == config
    assert not list(tmp_path.glob(".*"))


@pytest.mark.usefixtures("_registered_here")
def test_labels_of_a_model_trained_here_go_to_their_category_ids(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = build_model(SMALL, 3).eval()
    registered(tmp_path / "registered", model, (Category(1, "a"), Category(4, "b"), Category(2, "c")))
    notes = export_original("models:/a/1", tmp_path / "out.pth")
    assert any("3 labels are at their category ids now, in a head of 5 classes" in line for line in notes)
    other = read_original(tmp_path / "out.pth").model
    images = torch.randn(1, 3, 96, 96)
    with torch.inference_mode():
        expected, found = model(images), other(images)
    probabilities = found.logits.softmax(-1)
    assert torch.allclose(probabilities[..., [1, 4, 2, 5]], expected.logits.softmax(-1), atol=1e-7)
    assert probabilities[..., [0, 3]].max() < 1e-30
    assert torch.equal(found.boxes, expected.boxes)


@pytest.mark.usefixtures("_registered_here")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": "tiny"}, "backbone='tiny', which the original cannot express; expected a ResNet"),
        ({"norm": "group"}, "norm='group', which the original cannot express; expected norm='frozen_batch'"),
        ({"decoder_input": "queries"}, "decoder_input='queries'"),
        ({"position_at_input": True}, "position_at_input=True"),
        ({"position_temperature": 20.0}, r"position_temperature=20\.0.*expected position_temperature=10000\.0"),
    ],
)
def test_fields_that_the_original_lacks_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    registered(tmp_path / "registered", build_model(replace(SMALL, **changes), 2), (Category(0, "a"), Category(1, "b")))
    with pytest.raises(ExchangeError, match=f"models:/a/1 has {message}") as caught:
        export_original("models:/a/1", tmp_path / "out.pth")
    assert_one_line(caught)
    assert not (tmp_path / "out.pth").exists()


@pytest.mark.usefixtures("_registered_here")
@pytest.mark.parametrize("number", [-1, 10_000])
def test_ids_that_cannot_be_labels_are_refused(tmp_path: Path, number: int) -> None:
    registered(tmp_path / "registered", build_model(SMALL, 1), (Category(number, "a"),))
    with pytest.raises(ExchangeError, match=f"has category id {number}, and the original takes ids as labels"):
        export_original("models:/a/1", tmp_path / "out.pth")


DEFORMABLE = ModelConfig(variant="deformable", num_queries=300, feedforward_dim=1024)


def test_the_row_that_ranks_proposals_stays_when_labels_move() -> None:
    model = build_model(replace(SMALL, variant="deformable", deformable=HYBRID), 3)
    state = to_original_state_dict(model)
    moved = with_class_rows(model, state, lambda _, rows: rows.flip(0))
    ranking = f"class_embed.{SMALL.decoder_layers}.weight"
    assert torch.equal(moved[ranking][0], state[ranking][0])
    assert torch.equal(moved[f"transformer.decoder.{ranking}"], moved[ranking])
    assert torch.equal(moved["class_embed.0.weight"], state["class_embed.0.weight"].flip(0))


def test_a_deformable_detr_has_its_original_s_options() -> None:
    config = replace(DEFORMABLE, deformable=HYBRID)
    assert original_options(DEFORMABLE) == ["its defaults"]
    assert original_options(config) == [
        "--num_queries_one2many 7",
        "--with_box_refine",
        "--two_stage",
        "--mixed_selection",
    ]
