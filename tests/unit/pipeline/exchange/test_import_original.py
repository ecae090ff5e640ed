"""Import of the original's files."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from detr.config import ConfigError, DeformableConfig, ModelConfig
from detr.model import build_model
from detr.original import to_original_state_dict
from pipeline.config import RunConfig
from pipeline.driver.initial_weights import initial_model
from pipeline.errors import ExchangeError, RegistryError
from pipeline.exchange import import_original as original_importer
from pipeline.exchange.import_original import import_file, read_original
from shards.dataset.categories import Category
from tests.support.original_files import HYBRID, QUICK, SMALL, assert_one_line, assert_same, options, written

LAYOUTS = {
    "r50": ({"backbone": "resnet50"}, 91),
    "r50-dc5": ({"backbone": "resnet50", "dilation": True}, 91),
    "r101": ({"backbone": "resnet101"}, 91),
    "r101-dc5": ({"backbone": "resnet101", "dilation": True}, 91),
    "r50-panoptic": ({"backbone": "resnet50", "masks": True}, 250),
    "r50-dc5-panoptic": ({"backbone": "resnet50", "dilation": True, "masks": True}, 250),
    "r101-panoptic": ({"backbone": "resnet101", "masks": True}, 250),
}


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


@pytest.mark.parametrize("deformable", [DeformableConfig(), DeformableConfig(levels=3, decoder_points=2), HYBRID])
def test_a_deformable_detr_is_read_with_equal_weights(tmp_path: Path, deformable: DeformableConfig) -> None:
    config = replace(SMALL, variant="deformable", num_queries=9, deformable=deformable)
    args = options(dropout=SMALL.dropout, num_queries_one2one=9, num_queries_one2many=7)
    model = written(tmp_path / "deformable.pth", config, args=args)
    found = read_original(tmp_path / "deformable.pth")
    assert found.model.config == config
    assert "deformable" in found.notes[0]
    assert_same(found.model, model)
