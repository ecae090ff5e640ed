"""Export of a registered version to ONNX, checked in onnxruntime against PyTorch before the file gets its name.

Inputs: `images`, float32 [batch, 3, height, width], normalised as in the card's transform; `padding`, bool [batch,
height, width], true where a canvas has no image. Outputs: `logits` [batch, queries, classes + 1], the last is "no
object"; `boxes` [batch, queries, 4], centre and size as fractions of the image; `masks`, logits [batch, queries, h, w],
for a model with a mask head. Batch, height and width are free. The file's metadata hold the categories by label and the
transform.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from detr.config import TransformConfig
from detr.model import DETR, build_model
from detr.position import LearnedPosition
from pipeline.errors import ExchangeError
from pipeline.exchange.export_original import check_target
from pipeline.registry.card import Card, read_model
from pipeline.registry.versions import resolve
from shards.store.storage import atomic_path

TOLERANCE = 1e-3
"""Maximum difference between onnxruntime and PyTorch, in logits and in fractions of the image."""
_SMALLEST = 64  # pixels each way; a stride of 32 leaves two cells
_BATCHES = (1, 2, 8)
# Height and width for tracing. At these sizes no stage of the backbone is exactly twice the next, so that the traced mask
# head does not rely on it.
_TRACED = (257, 193)
_CELLS_OF_15 = (120, 90)  # height and width; `_sample` pads at the edges of its cells, where rounding shows
_PACKAGES = ("onnx", "onnxruntime", "onnxscript")


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
    trained, card = read_model(resolve(uri))
    model = build_model(replace(card.model, auxiliary=False), len(card.categories)).eval()
    model.load_state_dict(trained.state_dict())
    largest = _largest_side(model)
    with atomic_path(path) as temporary:
        _write(_Flat(model), temporary, card, largest)
        difference = difference_in_onnxruntime(_Flat(model), temporary, card.transform, largest)
        if not difference <= TOLERANCE:
            raise ExchangeError(
                f"onnxruntime and PyTorch differ by {difference:.1e}; expected at most {TOLERANCE:g}: {path} is not written"
            )
    free = f"batch, height and width are free ({_SMALLEST} px or more{f', at most {largest}' if largest else ''})"
    checked = f"batches of {', '.join(map(str, _BATCHES))}"
    return (free, f"onnxruntime differs from PyTorch by at most {difference:.1e} in {checked}")


def difference_in_onnxruntime(
    model: nn.Module, path: Path, transform: TransformConfig, largest: int | None = None
) -> float:
    """Return the largest difference of any output between onnxruntime on `path` and `model`; NaN if either has one.

    `largest` is the longest side in pixels that the file takes, None for any.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    differences = []
    for batch, (height, width) in zip(_BATCHES, _canvases(transform, largest), strict=True):
        images, padding = _sample(batch, height, width)
        with torch.inference_mode():
            expected = model(images, padding)
        given = session.run(None, {"images": images.numpy(), "padding": padding.numpy()})
        differences += [float(np.abs(got - want.numpy()).max()) for got, want in zip(given, expected, strict=True)]
    return float(np.max(differences))


def _canvases(transform: TransformConfig, largest: int | None) -> list[tuple[int, int]]:
    """Return the heights and widths to check: one image of evaluation size, then small ones, most of them padded."""
    side = transform.eval_size
    canvases = ((side, min(side * 4 // 3, transform.max_size)), (side // 4, side // 3), _CELLS_OF_15)
    most = largest or max(map(max, canvases))
    return [(max(_SMALLEST, min(height, most)), max(_SMALLEST, min(width, most))) for height, width in canvases]


def _write(model: nn.Module, path: Path, card: Card, largest: int | None) -> None:
    """Trace the model with free sizes and save it in one file, with categories and transform in its metadata."""
    batch = torch.export.Dim("batch", min=1)
    height = torch.export.Dim("height", min=_SMALLEST, max=largest)
    width = torch.export.Dim("width", min=_SMALLEST, max=largest)
    outputs = ["logits", "boxes"]
    if card.model.masks:
        outputs.append("masks")
    with _quiet(), torch.no_grad():
        traced = torch.export.export(
            model,
            _sample(2, *_TRACED),
            dynamic_shapes=({0: batch, 2: height, 3: width}, {0: batch, 1: height, 2: width}),
            strict=True,  # without it, `len(tensor)` is traced as a constant
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


def _sample(batch: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return random images and their padding; three of four images are padded, by eighths and sixths of the sides."""
    images = torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))
    padding = torch.zeros(batch, height, width, dtype=torch.bool)
    for row in range(batch):
        padding[row, height * (8 - row % 4) // 8 :] = True
        padding[row, :, width * (6 - row % 4) // 6 :] = True
    return images.masked_fill(padding[:, None], 0.0), padding


def _largest_side(model: DETR) -> int | None:
    """Return the longest side in pixels that learned positions cover, or None for sine positions."""
    position = model.backbone[1]
    stride = 16 if model.config.dilation or model.config.backbone == "tiny" else 32
    return position.row_embed.num_embeddings * stride if isinstance(position, LearnedPosition) else None


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
