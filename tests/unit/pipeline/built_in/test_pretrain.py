from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from detr.batch import Target
from detr.config import ModelConfig, TransformConfig
from detr.model import build_model
from detr.original import load_backbone_weights
from pipeline.built_in.pretrain import point_labels, pretrain_backbone
from shards.dataset.manifest import Manifest
from shards.synthetic import write_synthetic
from shards.write.writer import write_coco

MODEL = ModelConfig(backbone="tiny", norm="frozen_batch", hidden_dim=32, heads=2, encoder_layers=1, decoder_layers=1)
TRANSFORM = TransformConfig(train_scales=(64,), eval_size=64, crop=False)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("pretrain")
    train = write_synthetic(folder / "coco", train=32, val=1, size=64).train
    return write_coco(train.images, train.annotations, folder / "train")


@pytest.mark.parametrize("norm", ["frozen_batch", "group"])
def test_the_written_weights_are_the_backbone_s_own(manifest: Manifest, tmp_path: Path, norm: str) -> None:
    config = ModelConfig(backbone="tiny", norm=norm)  # type: ignore[arg-type]
    path = tmp_path / "new" / "backbone.safetensors"
    pretrain_backbone(manifest, config, TRANSFORM, path, seed=0, epochs=1)
    model = build_model(config, manifest.num_classes)
    weights = load_file(path)
    load_backbone_weights(model, weights)
    assert torch.equal(model.get_parameter("backbone.0.body.layer3.0.conv2.weight"), weights["layer3.0.conv2.weight"])
    # Statistics of a frozen batch norm are part of what was learned.
    assert norm == "group" or (weights["bn1.running_mean"] != 0).any()
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_the_loss_falls_and_points_are_named_rightly(manifest: Manifest, tmp_path: Path) -> None:
    losses: list[float] = []
    figures = pretrain_backbone(
        manifest,
        MODEL,
        TRANSFORM,
        tmp_path / "backbone.safetensors",
        seed=0,
        epochs=8,
        progress=lambda step, steps, loss: losses.append(loss),
    )
    assert len(losses) == figures.steps == 16
    assert figures.loss == pytest.approx(sum(losses[-2:]) / 2)
    assert figures.loss < losses[0] / 2
    assert 0.5 < figures.accuracy <= 1


def test_the_same_seed_writes_the_same_bytes(manifest: Manifest, tmp_path: Path) -> None:
    torch.manual_seed(7)
    paths = [tmp_path / name for name in ("first", "second", "other")]
    for path, seed in zip(paths, (1, 1, 2), strict=True):
        pretrain_backbone(manifest, MODEL, TRANSFORM, path, seed=seed, epochs=2)
    drawn = torch.rand(1)
    torch.manual_seed(7)
    assert torch.equal(drawn, torch.rand(1))
    first, second, other = (path.read_bytes() for path in paths)
    assert first == second != other


def test_a_point_is_named_after_the_smallest_box_over_it() -> None:
    large = [0.5, 0.5, 1.0, 0.5]  # the middle rows of four
    small = [0.375, 0.375, 0.2, 0.2]  # one point of them
    target = Target(torch.tensor([small, large]), torch.tensor([2, 0]), 1, (64, 64))
    empty = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), 2, (64, 64))
    labels = point_labels([target, empty], 4, 4, background=9)
    assert labels[0].tolist() == [[9] * 4, [0, 2, 0, 0], [0] * 4, [9] * 4]
    assert (labels[1] == 9).all()


def test_a_point_has_the_label_of_the_mask_over_it_rather_than_of_a_box() -> None:
    whole = torch.tensor([[0.5, 0.5, 1.0, 1.0]] * 2)
    masks = torch.zeros(2, 8, 16, dtype=torch.bool)
    masks[0, :, :8], masks[1, 4:, 8:] = True, True
    target = Target(whole, torch.tensor([2, 0]), 1, (8, 16), masks)
    assert point_labels([target], 2, 4, background=9)[0].tolist() == [[2, 2, 9, 9], [2, 2, 0, 0]]
