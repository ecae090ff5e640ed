from dataclasses import replace

import pytest
import torch
from torch import Tensor

from detr.batch import Target, collate, normalise
from detr.config import TransformConfig


def sample(height: int, width: int, image_id: int = 1) -> tuple[Tensor, Target]:
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    return image, Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), image_id, (height, width))


def test_images_are_placed_at_the_top_left_of_the_canvas() -> None:
    first, second = sample(4, 7, 1), sample(6, 5, 2)
    batch = collate([first, second])
    assert batch.images.shape == (2, 3, 6, 7)
    assert batch.images.dtype == torch.uint8
    assert torch.equal(batch.images[1, :, :6, :5], second[0])
    assert batch.images[1, :, :, 5:].sum() == 0
    assert batch.padding is not None
    assert not batch.padding[0, :4].any()
    assert batch.padding[0, 4:].all()
    assert batch.padding[1, :, 5:].all()
    assert [target.image_id for target in batch.targets] == [1, 2]


def test_images_of_one_size_need_no_padding() -> None:
    assert collate([sample(4, 6), sample(4, 6)]).padding is None


def test_no_samples_give_an_empty_batch() -> None:
    batch = collate([])
    assert len(batch) == 0
    assert batch.images.shape[0] == 0


def test_targets_stay_on_the_host_when_a_batch_moves() -> None:
    batch = collate([sample(4, 7), sample(6, 5)]).to("meta")
    assert batch.padding is not None
    assert batch.images.device.type == batch.padding.device.type == "meta"
    assert batch.targets[0].boxes.device.type == "cpu"


def test_normalising_follows_the_formula_and_clears_the_padding() -> None:
    batch = collate([sample(4, 7), sample(6, 5)])
    config = TransformConfig()
    got = normalise(batch, config)
    mean, std = torch.tensor(config.mean).view(3, 1, 1), torch.tensor(config.std).view(3, 1, 1)
    torch.testing.assert_close(got[0, :, :4], (batch.images[0, :, :4] / 255 - mean) / std)
    assert got[0, :, 4:].abs().sum() == 0
    assert got[1, :, :, 5:].abs().sum() == 0
    assert batch.images.dtype == torch.uint8


def test_float_images_count_as_normalised() -> None:
    batch = collate([(torch.randn(3, 4, 4), sample(4, 4)[1])])
    assert normalise(batch, TransformConfig()) is batch.images


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_pinned_batch_moves_to_the_device() -> None:
    batch = collate([sample(4, 7), sample(6, 5)])
    moved = batch.pin_memory().to("cuda")
    assert torch.equal(moved.images.cpu(), batch.images)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_masks_of_a_pinned_batch_are_pinned() -> None:
    image, target = sample(4, 7)
    masks = torch.rand(3, 4, 7) > 0.5
    batch = collate([(image, replace(target, masks=masks)), sample(6, 5)]).pin_memory()
    assert batch.targets[0].masks is not None
    assert batch.targets[0].masks.is_pinned()
    assert torch.equal(batch.targets[0].masks, masks)
    assert batch.targets[1].masks is None
