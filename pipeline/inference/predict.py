"""Detections on image files with a registered version."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from PIL import Image

from pipeline.display.draw import Boxes, draw
from pipeline.display.segments import overlay
from pipeline.display.terminal import progress_bar
from pipeline.distributed.ranks import default_device
from pipeline.errors import PipelineError
from pipeline.inference.detector import Detector, Prediction, coco_results
from pipeline.inference.segments import Segmented, panoptic_document
from pipeline.registry.versions import resolve
from shards.errors import PictureError
from shards.masks.rle import decode_masks
from shards.rgb import Exif, decode_picture, open_picture

_MOST_ATTENDED = 8  # detections of an image whose attention is drawn


def predict(
    uri: str,
    images: Sequence[Path],
    out: Path,
    *,
    threshold: float = 0.5,
    exif: Exif = "upright",
    attention: bool = False,
) -> list[dict[str, Any]]:
    """Detect on picture files: write annotated copies and `detections.json` (COCO's result format) into `out`.

    A panoptic version also writes COCO's panoptic format, `panoptic.json` and a PNG for each picture in `panoptic/`; the copies
    show its segments instead of boxes.

    Images are numbered from 1 in the order given; each result also names its file. Boxes are of the picture as drawn:
    turned upright, unless `exif` is `ignore`. attention: also write pictures of what the query of each detection has read.
    """
    if not 0 <= threshold <= 1:
        raise PipelineError(f"threshold is {threshold:g}; expected a score from 0 to 1")
    for path in images:
        _open(path).close()
    with tempfile.TemporaryDirectory() as folder:
        detector = Detector(resolve(uri, Path(folder)), default_device())
    out.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    pictures: list[dict[str, Any]] = []
    with progress_bar("detecting") as advance:
        for number, path in enumerate(images, start=1):
            image = _decode(path, exif)
            found, segments = detector.read(image, threshold)
            name = f"{number:04d}-{path.stem}.png"
            if segments is None:
                draw(image, _boxes(found, image.height, image.width)).save(out / name)
            else:
                overlay(image, segments.indices, segments.labels, detector.card.categories).save(out / name)
                pictures.append(_write_segments(out / "panoptic" / name, number, path, segments))
            if attention:
                _draw_attention(detector, image, threshold).save(out / f"{number:04d}-{path.stem}-attention.png")
            results += [{"file_name": str(path), **result} for result in coco_results(number, found)]
            advance(number, len(images))
    _write_json(out / "detections.json", results)
    if detector.card.panoptic:
        _write_json(out / "panoptic.json", panoptic_document(pictures, detector.card.categories))
    return results


def _write_json(path: Path, content: object) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=1))


def _write_segments(target: Path, number: int, picture: Path, segments: Segmented) -> dict[str, Any]:
    """Write COCO's panoptic PNG of a picture; return its annotation, with the picture's name and size."""
    target.parent.mkdir(exist_ok=True)
    target.write_bytes(segments.png())
    height, width = segments.indices.shape
    return {
        "image_id": number,
        "file_name": target.name,
        "segments_info": segments.infos,
        "picture": str(picture),
        "height": height,
        "width": width,
    }


def _draw_attention(detector: Detector, image: Image.Image, threshold: float) -> Image.Image:
    from pipeline.display.attention import attention_picture
    from pipeline.evaluation.attention import attended_detections

    card = detector.card
    attended = attended_detections(detector.model, np.asarray(image), card.transform, threshold, _MOST_ATTENDED)
    return attention_picture(image, attended, [category.name for category in card.categories], columns=3, tile=480)


def _open(path: Path) -> Image.Image:
    """Open a picture file and read its header, not yet its pixels."""
    try:
        return open_picture(path)
    except PictureError as error:
        raise PipelineError(f"{path}: {error}") from None
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise PipelineError(f"{path}: {reason}; expected a picture file (JPEG, PNG, ...)") from None


def _decode(path: Path, exif: Exif) -> Image.Image:
    with _open(path) as opened:
        try:
            return decode_picture(opened, exif)
        except PictureError as error:
            raise PipelineError(f"{path}: {error}; expected a picture file (JPEG, PNG, ...)") from None


def _boxes(found: Sequence[Prediction], height: int, width: int) -> Boxes:
    boxes = np.array([detection.box_xyxy for detection in found], dtype=np.float64).reshape(-1, 4)
    runs = [detection.segmentation for detection in found if detection.segmentation is not None]
    return Boxes(
        boxes,
        [detection.label for detection in found],
        [detection.name for detection in found],
        [detection.score for detection in found],
        decode_masks(runs, height, width) if runs else None,
    )
