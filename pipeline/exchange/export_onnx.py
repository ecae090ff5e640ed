"""Export of a registered version to ONNX, checked in onnxruntime against PyTorch before the file gets its name.

Inputs: `images`, float32 [batch, 3, height, width], normalised as in the card's transform; `padding`, bool [batch,
height, width], true where a canvas has no image. Outputs: `logits` [batch, queries, classes + 1], the last is "no
object" (of a deformable model [batch, queries, classes], for sigmoids); `boxes` [batch, queries, 4], centre and size as
fractions of the image; `masks`, logits [batch, queries, h, w], for a model with a mask head. Batch, height and width are
free; the canvas of a deformable model has sides that are multiples of its coarsest cell, so pad images up to them. The
file's metadata hold the categories by label and the transform.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from detr.config import TransformConfig
from detr.model import DETR, build_model
from detr.position import LearnedPosition
from pipeline.errors import ExchangeError
from pipeline.exchange.export_original import check_target
from pipeline.registry.card import Card
from pipeline.registry.versions import read_version
from shards.store.storage import atomic_path

TOLERANCE = 1e-3
"""Maximum difference between onnxruntime and PyTorch, in logits and in fractions of the image."""
_LOOSE = 0.02  # share of the queries of a model with two stages
_BATCHES = (1, 2, 8)
# Height and width for tracing. At these sizes no stage of the backbone is exactly twice the next, so that the traced mask
# head does not rely on it.
_TRACED = (257, 193)
_CELLS_OF_15 = (120, 90)  # height and width; `_sample` pads at the edges of its cells, where rounding shows
_PACKAGES = ("onnx", "onnxruntime", "onnxscript")


class Sides(NamedTuple):
    """Sides in pixels of the canvases that a file takes."""

    smallest: int = 64  # a stride of 32 leaves two cells
    largest: int | None = None
    """None for any."""
    multiple: int = 1

    def nearest(self, side: int) -> int:
        """Return the side that the file takes for an image of this side, as far as it takes so large ones."""
        side = max(self.smallest, -(-side // self.multiple) * self.multiple)
        return side if self.largest is None else min(side, self.largest // self.multiple * self.multiple)

    def __str__(self) -> str:
        multiples = f"multiples of {self.multiple}, " if self.multiple > 1 else ""
        return f"{multiples}{self.smallest} px or more{f', at most {self.largest}' if self.largest else ''}"


class _Flat(nn.Module):
    """Wrapper that returns the outputs of the last decoder layer as a tuple of tensors, as ONNX needs."""

    def __init__(self, model: DETR) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, padding: Tensor) -> tuple[Tensor, ...]:
        outputs = self.model(images, padding)
        if outputs.masks is None:
            return outputs.logits, outputs.boxes
        return outputs.logits, outputs.boxes, outputs.masks


def export_onnx(uri: str, path: Path) -> tuple[str, ...]:
    """Write a registered version as ONNX and return lines for the user, with the largest difference.

    Raise `ExchangeError` if packages are missing, or if onnxruntime and PyTorch differ by more than `TOLERANCE`.
    """
    if missing := [name for name in _PACKAGES if importlib.util.find_spec(name) is None]:
        raise ExchangeError(
            f"--onnx needs {', '.join(missing)}; expected the packages of the extra `onnx`: `make setup` installs them"
        )
    check_target(path)
    trained, card = read_version(uri)
    model = build_model(replace(card.model, auxiliary=False), len(card.categories)).eval()
    model.load_state_dict(trained.state_dict())
    sides = sides_of(model)
    with atomic_path(path) as temporary:
        _write(_Flat(model), temporary, card, sides)
        difference = difference_in_onnxruntime(_Flat(model), temporary, card.transform, sides)
        if not difference <= TOLERANCE:
            raise ExchangeError(
                f"onnxruntime and PyTorch differ by {difference:.1e}; expected at most {TOLERANCE:g}: {path} is not written"
            )
    free = f"batch, height and width are free ({sides})"
    checked = f"batches of {', '.join(map(str, _BATCHES))}"
    return (free, f"onnxruntime differs from PyTorch by at most {difference:.1e} in {checked}")


def difference_in_onnxruntime(
    model: _Flat, path: Path, transform: TransformConfig, sides: Sides | None = None
) -> float:
    """Return the largest difference of any output between onnxruntime on `path` and `model`; NaN if either has one.

    With two stages, rounding may swap queries whose cells score nearly alike, so the worst 2% of them do not count.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    differences = []
    for batch, (height, width) in zip(_BATCHES, _canvases(transform, sides or Sides()), strict=True):
        images, padding = _sample(batch, height, width)
        with torch.inference_mode():
            expected = model(images, padding)
        given = session.run(None, {"images": images.numpy(), "padding": padding.numpy()})
        by_query = [
            np.abs(got - want.numpy()).reshape(*want.shape[:2], -1).max(-1)
            for got, want in zip(given, expected, strict=True)
        ]
        counted = 1 - _LOOSE if model.model.proposal_head else 1.0
        differences.append(float(np.quantile(np.max(by_query, 0), counted)))
    return float(np.max(differences))


def _canvases(transform: TransformConfig, sides: Sides) -> list[tuple[int, int]]:
    """Return the heights and widths to check: one image of evaluation size, then small ones, most of them padded."""
    side = transform.eval_size
    canvases = ((side, min(side * 4 // 3, transform.max_size)), (side // 4, side // 3), _CELLS_OF_15)
    return [(sides.nearest(height), sides.nearest(width)) for height, width in canvases]


def _write(model: nn.Module, path: Path, card: Card, sides: Sides) -> None:
    """Trace the model with free sizes and save it in one file, with categories and transform in its metadata."""
    batch = torch.export.Dim("batch", min=1)
    height, width = _side("height", sides), _side("width", sides)
    # With multiples, sizes of levels are products instead of nested roundings, about which the tracer reasons for minutes.
    traced_sizes = _TRACED if sides.multiple == 1 else (sides.smallest + sides.multiple, sides.smallest)
    outputs = ["logits", "boxes"]
    if card.model.masks:
        outputs.append("masks")
    with _quiet(), torch.no_grad():
        traced = torch.export.export(
            model,
            _sample(2, *traced_sizes),
            dynamic_shapes=({0: batch, 2: height, 3: width}, {0: batch, 1: height, 2: width}),
            # Strict, or `len(tensor)` is traced as a constant. Deformable models use none, and would take minutes.
            strict=sides.multiple == 1,
            # Pooling and views add guards that hold for the traced size only; onnxruntime is checked with other sizes.
            prefer_deferred_runtime_asserts_over_guards=True,
        )
        # ONNX's own nearest resize divides by a rounded factor, and picks the wrong cell exactly at cell borders.
        exact = torch._decomp.get_decompositions([torch.ops.aten.upsample_nearest2d])
        program: Any = torch.onnx.export(
            traced.run_decompositions(dict(exact)),
            dynamo=True,
            input_names=["images", "padding"],
            output_names=outputs,
            verbose=False,
        )
    metadata = {"categories": card.categories, "transform": card.transform, "imported_from": card.imported_from}
    for key, value in metadata.items():
        program.model.metadata_props[f"detr.{key}"] = msgspec.json.encode(value).decode()
    program.save(str(path), external_data=False)


def _side(name: str, sides: Sides) -> Any:
    step = sides.multiple
    if step == 1:
        return torch.export.Dim(name, min=sides.smallest, max=sides.largest)
    most = None if sides.largest is None else sides.largest // step
    return step * torch.export.Dim(f"{name}_by_{step}", min=sides.smallest // step, max=most)


def _sample(batch: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return random images and their padding; three of four images are padded, by eighths and sixths of the sides."""
    images = torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))
    padding = torch.zeros(batch, height, width, dtype=torch.bool)
    for row in range(batch):
        padding[row, height * (8 - row % 4) // 8 :] = True
        padding[row, :, width * (6 - row % 4) // 6 :] = True
    return images.masked_fill(padding[:, None], 0.0), padding


def sides_of(model: DETR) -> Sides:
    """Return the sides that a file of the model takes: at most those that learned positions cover.

    With two stages, the smallest canvas has a cell for each query.
    """
    config, position = model.config, model.backbone[1]
    stride = 16 if config.dilation or config.backbone == "tiny" else 32
    if config.variant != "deformable":
        finest, multiple, smallest = stride, 1, Sides().smallest
    else:
        levels = config.deformable.levels
        finest = stride if levels == 1 else 16 if levels == 2 and config.backbone != "tiny" else 8
        multiple = 32 * 2 ** max(0, levels - 3)
        smallest = 2 * multiple
        while config.deformable.two_stage and (smallest // finest) ** 2 < config.num_queries:
            smallest += multiple
    covered = position.row_embed.num_embeddings * finest if isinstance(position, LearnedPosition) else None
    return Sides(smallest, covered, multiple)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's notes about constants that it does not fold and names that it does not need."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always")  # record them even if warnings are errors
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
