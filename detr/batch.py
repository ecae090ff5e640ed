"""Inputs of the model and the criterion: padded images with their targets."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from detr.config import TransformConfig
from detr.geometry import Size

_EMPTY_CANVAS = 64  # side in pixels of a batch without images; large enough for a stride of 32


@dataclass(frozen=True, eq=False)
class Target:
    """Ground truth of one image.

    boxes: float32 [N, 4], centre x, centre y, width, height as fractions of the (augmented) image, without its padding.
    labels: int64 [N], 0 to num_classes - 1. original_size: (height, width) in pixels, before any augmentation.
    masks: bool [N, h, w], the pixels of each object in the (augmented) image; None if masks are not trained.
    """

    boxes: Tensor
    labels: Tensor
    image_id: int
    original_size: Size
    masks: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Batch:
    """Batch of images padded to one canvas size, each image at the top left.

    images: uint8 0 to 255 (or already normalised float) [B, 3, H, W] in any memory layout, 0 where padded.
    padding: bool [B, H, W], true where there is no image; None if no image is padded, which avoids all masking.
        Each image has at least its top left pixel: attention to an image without any is NaN on a CPU.
    targets: one per image, on the host. The criterion packs them and moves them with one copy.
    sizes: (height, width) in pixels of each image on the canvas, without its padding.
    """

    images: Tensor
    padding: Tensor | None
    targets: tuple[Target, ...]
    sizes: tuple[Size, ...] = ()

    def __len__(self) -> int:
        return len(self.targets)

    def to(self, device: torch.device | str) -> "Batch":
        """Return a batch on the device, copied asynchronously from pinned memory; its targets are not moved."""
        padding = None if self.padding is None else self.padding.to(device, non_blocking=True)
        return replace(self, images=self.images.to(device, non_blocking=True), padding=padding)

    def pin_memory(self) -> "Batch":
        """Return a batch in page-locked memory (images, padding and masks), whose copies to a device do not block."""
        padding = None if self.padding is None else self.padding.pin_memory()
        targets = tuple(
            target if target.masks is None else replace(target, masks=target.masks.pin_memory())
            for target in self.targets
        )
        return replace(self, images=self.images.pin_memory(), padding=padding, targets=targets)


def collate(samples: Sequence[tuple[Tensor, Target]], multiple: int = 1) -> Batch:
    """Pad (image [3, h, w], target) pairs to the largest height and width among them, up to a multiple of `multiple`.

    Without samples, return a batch of length 0 whose images [0, 3, 64, 64] the model accepts.
    """
    if not samples:
        return Batch(torch.zeros(0, 3, _EMPTY_CANVAS, _EMPTY_CANVAS, dtype=torch.uint8), None, ())
    images = [image for image, _ in samples]
    targets = tuple(target for _, target in samples)
    height = _round_up(max(image.shape[1] for image in images), multiple)
    width = _round_up(max(image.shape[2] for image in images), multiple)
    padded = any(image.shape[1:] != (height, width) for image in images)
    # The memory layout is pixel by pixel, in which images are decoded and resized: a copy to planes would take as long
    # as the resize. Only the padding is cleared.
    canvas = images[0].new_empty(len(images), height, width, 3).permute(0, 3, 1, 2)
    padding = torch.zeros(len(images), height, width, dtype=torch.bool) if padded else None
    for row, image in enumerate(images):
        _, h, w = image.shape
        canvas[row, :, :h, :w] = image
        canvas[row, :, h:] = 0
        canvas[row, :, :h, w:] = 0
        if padding is not None:
            padding[row, h:] = True
            padding[row, :h, w:] = True
    sizes = tuple((image.shape[1], image.shape[2]) for image in images)
    return Batch(canvas, padding, targets, sizes)


def _round_up(length: int, multiple: int) -> int:
    return (length + multiple - 1) // multiple * multiple


def normalise(batch: Batch, config: TransformConfig) -> Tensor:
    """Return the images as float32 [B, 3, H, W]: (value / 255 - mean) / std per channel, and 0 where padded.

    It runs on the device of the images, so that images are moved as bytes. The original pads normalised images with 0,
    so the padding is cleared last. Float images are returned unchanged, as already normalised.
    """
    if batch.images.is_floating_point():
        return batch.images
    scale, shift = _scale_and_shift(config.mean, config.std, batch.images.device)
    images = torch.addcmul(shift, batch.images.float(), scale)
    return images if batch.padding is None else images.masked_fill_(batch.padding[:, None], 0.0)


@lru_cache(maxsize=16)
def _scale_and_shift(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    # Cached per device, since building them for every batch would take two blocking copies to the device.
    with torch.inference_mode(False):
        scale = 1 / (255 * torch.tensor(std, device=device))
        shift = -torch.tensor(mean, device=device) / torch.tensor(std, device=device)
        return scale.view(3, 1, 1), shift.view(3, 1, 1)
