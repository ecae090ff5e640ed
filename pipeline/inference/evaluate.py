"""Use of a registered version: evaluate it on a data set, detect objects in picture files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
import torch
from PIL import Image

from pipeline.data import check_room
from pipeline.errors import PipelineError
from pipeline.evaluate import EvaluateOptions, Evaluation, evaluate
from pipeline.figures import Boxes, contact_sheet, draw
from pipeline.layers import LayerScore, evaluate_layers
from pipeline.parallel import Ranks
from pipeline.pictures import detection_pictures
from pipeline.predict import Detector, Found, coco_results, read_model
from pipeline.progress import progress_bar
from pipeline.registry import resolve
from shards.detections import Detections
from shards.images import to_rgb
from shards.manifest import Manifest, load_manifest
from shards.segmentation import check_segmentations, decode_masks
from shards.verify import check_sizes

_Scored = TypeVar("_Scored")


def default_device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def evaluate_registered(uri: str, data: str, *, progress: bool = False) -> Evaluation:
    """Score a registered version on a data set, in the same batches as its run, and so with the same metrics."""
    return _score(evaluate, uri, data, progress)


def evaluate_registered_layers(uri: str, data: str, *, nms: float = 0.7, progress: bool = False) -> list[LayerScore]:
    """Score every decoder layer of a registered version, in the same batches as `evaluate_registered`."""
    return _score(partial(evaluate_layers, nms=nms), uri, data, progress)


def _score(evaluator: Callable[..., _Scored | None], uri: str, data: str, progress: bool) -> _Scored:
    manifest = load_manifest(data)
    check_sizes(manifest)
    check_room(manifest)
    model, card = read_model(resolve(uri))
    if card.model.masks and evaluator is evaluate:  # layers are scored by their boxes only
        check_segmentations(manifest)
    device = default_device()
    options = EvaluateOptions(card.transform, card.evaluate_batch_size, card.evaluate_batching)
    with progress_bar("evaluating") if progress else nullcontext() as advance:
        scored = evaluator(
            model.to(device), manifest, card.categories, options, ranks=Ranks(device=device), progress=advance
        )
    assert scored is not None  # a single process is rank 0
    return scored


def picture_sheet(detections: Detections, manifest: Manifest, count: int = 6) -> Image.Image:
    """Draw `count` validation images on one sheet, detections next to the ground truth."""
    return contact_sheet(list(detection_pictures(manifest, detections, count)))


def predict(uri: str, images: Sequence[Path], out: Path, *, threshold: float = 0.5) -> list[dict[str, Any]]:
    """Detect on picture files: write annotated copies and `detections.json` (COCO's result format) into `out`.

    Images are numbered from 1 in the order given; each result also names its file.
    """
    for path in images:
        _open(path).close()
    detector = Detector(resolve(uri), default_device())
    out.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    with progress_bar("detecting") as advance:
        for number, path in enumerate(images, start=1):
            image = _decode(path)
            found = detector([image], threshold)[0]
            draw(image, _boxes(found, image.height, image.width)).save(out / f"{number:04d}-{path.stem}.png")
            results += [{"file_name": str(path), **result} for result in coco_results(number, found)]
            advance(number, len(images))
    (out / "detections.json").write_bytes(msgspec.json.format(msgspec.json.encode(results), indent=1))
    return results


def _open(path: Path) -> Image.Image:
    """Open a picture file and read its header, not yet its pixels."""
    try:
        return Image.open(path)
    except (OSError, ValueError, SyntaxError) as error:
        raise _no_picture(path, error) from None


def _decode(path: Path) -> Image.Image:
    with _open(path) as opened:
        try:
            return to_rgb(opened)
        except (OSError, ValueError, SyntaxError) as error:
            raise _no_picture(path, error) from None


def _no_picture(path: Path, error: Exception) -> PipelineError:
    reason = "no such file" if isinstance(error, FileNotFoundError) else "not a picture that can be read"
    return PipelineError(f"{path}: {reason}; expected a picture file (JPEG, PNG, ...)")


def _boxes(found: Sequence[Found], height: int, width: int) -> Boxes:
    boxes = np.array([detection.box_xyxy for detection in found], dtype=np.float64).reshape(-1, 4)
    runs = [detection.segmentation for detection in found if detection.segmentation is not None]
    return Boxes(
        boxes,
        [detection.label for detection in found],
        [detection.name for detection in found],
        [detection.score for detection in found],
        decode_masks(runs, height, width) if runs else None,
    )
