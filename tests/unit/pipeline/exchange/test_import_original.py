"""Import and export of the original's files."""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from detr.config import ConfigError, DeformableConfig, ModelConfig
from detr.model import DETR, build_model
from detr.original import to_original_state_dict, with_class_rows
from pipeline.config import RunConfig
from pipeline.driver.initial_weights import initial_model
from pipeline.errors import ExchangeError, RegistryError
from pipeline.evaluation.evaluate_model import match_categories
from pipeline.exchange import export_original as original_exporter
from pipeline.exchange import import_original as original_importer
from pipeline.exchange.export_original import export_original, original_options
from pipeline.exchange.import_original import coco_names, import_file, read_original
from pipeline.registry.card import read_model, write_folder
from shards.dataset.categories import Category
from shards.dataset.manifest import load_manifest
from tests.support.cards import make_card

# Real backbones under a transformer that is quick to build; a mask head needs a width of 128.
QUICK: dict[str, Any] = {
    "hidden_dim": 128,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "feedforward_dim": 16,
    "num_queries": 5,
}
LAYOUTS = {
    "r50": ({"backbone": "resnet50"}, 91),
    "r50-dc5": ({"backbone": "resnet50", "dilation": True}, 91),
    "r101": ({"backbone": "resnet101"}, 91),
    "r101-dc5": ({"backbone": "resnet101", "dilation": True}, 91),
    "r50-panoptic": ({"backbone": "resnet50", "masks": True}, 250),
    "r50-dc5-panoptic": ({"backbone": "resnet50", "dilation": True, "masks": True}, 250),
    "r101-panoptic": ({"backbone": "resnet101", "masks": True}, 250),
}
SMALL = ModelConfig(**(QUICK | {"backbone": "resnet18", "hidden_dim": 32}))


def written(path: Path, config: ModelConfig = SMALL, classes: int = 91, **more: Any) -> DETR:
    """A model with random weights and statistics, whose file is `path`."""
    torch.manual_seed(3)
    model = build_model(config, classes).eval()
    for name, buffer in model.named_buffers():
        buffer.copy_(torch.rand(buffer.shape) + 0.5)
        assert "running" in name or "bn" in name or "downsample" in name
    torch.save({"model": to_original_state_dict(model), **more}, path)
    return model


def options(**more: Any) -> argparse.Namespace:
    return argparse.Namespace(**({"nheads": 8, "dilation": False, "dropout": 0.1, "aux_loss": True} | more))


def assert_same(model: DETR, other: DETR) -> None:
    state, expected = to_original_state_dict(model), to_original_state_dict(other)
    assert state.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in state.items())


def assert_one_line(caught: pytest.ExceptionInfo[Exception]) -> None:
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_published_layout_is_read_with_equal_weights(tmp_path: Path, name: str) -> None:
    changes, classes = LAYOUTS[name]
    config = ModelConfig(**(QUICK | changes))
    model = written(tmp_path / "w.pth", config, classes)
    assert any(key.startswith("detr.") for key in to_original_state_dict(model)) == config.masks
    found, epochs, notes = read_original(tmp_path / "w.pth", dilation=config.dilation)
    assert (found.config, found.num_classes, epochs) == (config, classes, 0)
    assert_same(found, model)
    assert all(text in notes[0] for text in (config.backbone, f"{classes} classes", "width 128"))
    assumed = " ".join(notes[1:])
    assert ("8 heads" in assumed) == (not config.masks)  # a mask head shows them
    assert ("no dilation" in assumed) == (not config.dilation)


def test_options_are_read_from_a_training_checkpoint(tmp_path: Path) -> None:
    config = ModelConfig(**(QUICK | {"heads": 4, "dilation": True, "dropout": 0.0, "auxiliary": False}))
    args = options(nheads=4, dilation=True, dropout=0, aux_loss=False)
    model = written(tmp_path / "w.pth", config, epoch=149, args=args)
    found = read_original(tmp_path / "w.pth")
    assert found.model.config == config
    assert_same(found.model, model)
    assert (found.epochs, len(found.notes)) == (150, 1)
    assert "DC5" in found.notes[0]
    assert "trained for 150 epochs" in found.notes[0]


def test_flags_complete_what_tensors_and_options_do_not_show(tmp_path: Path) -> None:
    written(tmp_path / "w.pth")
    found = read_original(tmp_path / "w.pth", heads=4)
    assert found.model.config == replace(SMALL, heads=4)
    assert len(found.notes) == 1
    assert read_original(tmp_path / "w.pth").notes[1] == "assumed, for the file does not say: 8 heads"


def test_a_name_with_dc5_is_no_evidence_but_is_mentioned(tmp_path: Path) -> None:
    written(tmp_path / "detr-r50-dc5.pth", ModelConfig(**QUICK))
    found = read_original(tmp_path / "detr-r50-dc5.pth")
    assert not found.model.config.dilation
    assert "no dilation although the file's name has dc5 in it" in found.notes[1]


@pytest.mark.parametrize(
    ("flags", "args", "message"),
    [
        ({"heads": 4}, options(), "--heads was given, but the file itself says 8; leave out --heads"),
        ({"dilation": True}, options(), "--dilation was given, but the file itself says False"),
        ({}, options(nheads="8"), "its args say nheads='8'; expected int"),
        ({}, options(dilation="yes"), "its args say dilation='yes'; expected bool"),
        ({}, options(nheads=True), "its args say nheads=True"),
    ],
)
def test_a_contradiction_is_one_line(tmp_path: Path, flags: dict[str, Any], args: Any, message: str) -> None:
    written(tmp_path / "w.pth", args=args)
    with pytest.raises(ValueError, match=message) as caught:
        read_original(tmp_path / "w.pth", **flags)
    assert_one_line(caught)


def test_a_mask_head_that_contradicts_the_flag_is_one_line(tmp_path: Path) -> None:
    written(tmp_path / "w.pth", ModelConfig(**(QUICK | {"backbone": "resnet18", "masks": True})), 250)
    with pytest.raises(ValueError, match="--heads was given, but the file itself says 8"):
        read_original(tmp_path / "w.pth", heads=4)


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_a_wrong_tensor_is_one_line(tmp_path: Path, change: str, store: str) -> None:
    state = to_original_state_dict(build_model(SMALL, 91))
    if change == "missing":
        del state["transformer.decoder.norm.bias"]
    elif change == "extra":
        state["transformer.more"] = torch.zeros(1)
    else:
        state["bbox_embed.layers.2.bias"] = torch.zeros(5)
    torch.save({"model": state}, tmp_path / "w.pth")
    with pytest.raises(ExchangeError, match=rf"^{tmp_path}/w\.pth: state dict: got 1 keys missing") as caught:
        import_file(tmp_path / "w.pth", name="a")
    assert_one_line(caught)


@pytest.mark.parametrize("content", ["absent", "text", "cut", "backbone"])
def test_other_files_give_one_line_and_are_not_registered(
    tmp_path: Path, content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(original_importer, "connect", lambda: pytest.fail("MLflow was asked"))
    path = tmp_path / "w.pth"
    if content == "text":
        path.write_text("no weights")
    elif content == "cut":
        written(path)
        path.write_bytes(path.read_bytes()[:-2000])
    elif content == "backbone":
        torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7)}, path)
    with pytest.raises(ExchangeError, match=f"^{path}: ") as caught:
        import_file(path, name="a")
    assert_one_line(caught)


def test_impossible_heads_and_names_give_one_line(tmp_path: Path) -> None:
    written(tmp_path / "w.pth")
    with pytest.raises(ConfigError, match="expected a multiple of heads=5"):
        import_file(tmp_path / "w.pth", name="a", heads=5)
    with pytest.raises(RegistryError, match="cannot name a registered model"):
        import_file(tmp_path / "w.pth", name="a/b")


def test_coco_s_labels_are_its_category_ids() -> None:
    names = coco_names()
    assert len(names) == 80
    assert (names[1], names[13], names[18], names[90]) == ("person", "stop sign", "dog", "toothbrush")
    assert not {0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83} & names.keys()
    labels, source = original_importer._categories(91, None)
    assert [category.id for category in labels] == list(range(91))
    assert (labels[0].name, labels[12].name, labels[90].name) == ("N/A", "N/A", "toothbrush")
    assert "COCO" in source


def test_panoptic_labels_are_coco_s_things_and_stuff() -> None:
    labels, source = original_importer._categories(250, None)
    assert [category.id for category in labels] == list(range(250))
    assert (labels[0].name, labels[18].name, labels[92].name, labels[249].name) == ("N/A", "dog", "banner", "N/A")
    assert (labels[18].isthing, labels[92].isthing, labels[200].color) == (True, False, (250, 141, 255))
    assert "things and stuff are COCO's" in source


@pytest.mark.parametrize("form", ["annotations", "list"])
def test_other_classes_are_named_by_a_file(tmp_path: Path, form: str) -> None:
    listed = [{"id": 3, "name": "cat", "supercategory": "animal"}, {"id": 1, "name": "bus"}]
    content = listed if form == "list" else {"images": [{"id": 1}], "categories": listed}
    (tmp_path / "c.json").write_text(json.dumps(content))
    labels, _ = original_importer._categories(5, tmp_path / "c.json")
    assert [(label.id, label.name) for label in labels] == [(0, "N/A"), (1, "bus"), (2, "N/A"), (3, "cat"), (4, "N/A")]


def test_things_are_true_or_1_in_a_file(tmp_path: Path) -> None:
    kinds = (True, 1, False, 0)
    listed = [{"id": number, "name": f"{number}", "isthing": kind} for number, kind in enumerate(kinds)]
    (tmp_path / "c.json").write_text(json.dumps(listed))
    labels, _ = original_importer._categories(4, tmp_path / "c.json")
    assert [label.isthing for label in labels] == [True, True, False, False]


@pytest.mark.parametrize(("masks", "kind", "batch"), [(True, False, 1), (True, None, 2), (False, False, 2)])
def test_an_imported_panoptic_model_is_evaluated_without_padding(masks: bool, kind: bool | None, batch: int) -> None:
    model = build_model(replace(ModelConfig(**(QUICK | {"backbone": "resnet18"})), masks=masks), 1)
    card = original_importer._card(model, (Category(0, "sky", kind),), 0, "w.pth")
    assert card.evaluate_batch_size == batch


def test_other_classes_are_named_by_number_without_a_file() -> None:
    labels, source = original_importer._categories(3, None)
    assert labels == (Category(0, "0"), Category(1, "1"), Category(2, "2"))
    assert "give --categories FILE" in source


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"id": 3, "name": "cat"}], "has category id 3; expected ids from 0 to 2"),
        ([{"id": -1, "name": "cat"}], "has category id -1"),
        ([{"id": 1, "name": "cat"}, {"id": 1, "name": "dog"}], "has an id twice"),
        ([{"id": 1, "name": "cat", "isthing": 2}], "isthing"),
        ([{"id": 1, "name": "cat", "color": [0, 0, 256]}], "color"),
        ([{"id": 1, "name": "cat", "isthing": 1}, {"id": 2, "name": "sky"}], "only some categories have `isthing`"),
        ({"images": []}, "expected JSON with COCO's `categories`"),
        ("text", "expected JSON with COCO's `categories`"),
    ],
)
def test_categories_that_do_not_fit_are_one_line(tmp_path: Path, content: object, message: str) -> None:
    (tmp_path / "c.json").write_text(json.dumps(content))
    with pytest.raises(ExchangeError, match=message) as caught:
        original_importer._categories(3, tmp_path / "c.json")
    assert_one_line(caught)


def test_labels_without_a_category_match_nothing_of_a_data_set(tiny_data: Any) -> None:
    """Labels named N/A match nothing, even if the data set has a category with that id."""
    manifest = load_manifest(tiny_data.val)
    labels = (
        Category(0, "N/A"),
        Category(1, "circle"),
        Category(2, "N/A"),
        Category(3, "triangle"),
        Category(9, "N/A"),
    )
    assert match_categories(labels, manifest).tolist() == [-1, 0, -1, 2, -1]


def registered(folder: Path, model: DETR, categories: tuple[Category, ...]) -> None:
    card = make_card(model.config, original_importer.TransformConfig(), categories)
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


def test_a_run_takes_all_but_the_class_head_of_a_file(tiny_config: RunConfig, tmp_path: Path) -> None:
    before = to_original_state_dict(written(tmp_path / "w.pth", args=options(), epoch=3, optimizer={"state": {}}))
    config = replace(tiny_config, model=SMALL, initial=str(tmp_path / "w.pth"))
    model, notes = initial_model(config, tuple(Category(number, str(number)) for number in range(4)), None)
    after = to_original_state_dict(model)
    assert after.keys() == before.keys()
    replaced = {name for name in before if not torch.equal(before[name], after[name])}
    assert replaced == {"class_embed.weight", "class_embed.bias"}
    assert after["class_embed.weight"].shape == (5, 32)
    assert notes[0].endswith("its class head was of other classes and starts afresh for 4")


DEFORMABLE = ModelConfig(variant="deformable", num_queries=300, feedforward_dim=1024)
HYBRID = DeformableConfig(box_refine=True, two_stage=True, mixed_selection=True, one_to_many_queries=7)


@pytest.mark.parametrize("deformable", [DeformableConfig(), DeformableConfig(levels=3, decoder_points=2), HYBRID])
def test_a_deformable_detr_is_read_with_equal_weights(tmp_path: Path, deformable: DeformableConfig) -> None:
    config = replace(SMALL, variant="deformable", num_queries=9, deformable=deformable)
    args = options(dropout=SMALL.dropout, num_queries_one2one=9, num_queries_one2many=7)
    model = written(tmp_path / "deformable.pth", config, args=args)
    found = read_original(tmp_path / "deformable.pth")
    assert found.model.config == config
    assert "deformable" in found.notes[0]
    assert_same(found.model, model)


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
