"""Targets of panoptic data against those of the original's `CocoPanoptic`, from a written data set to the transforms."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from detr.config import TransformConfig
from pipeline.data.loader import evaluation_transform
from shards.dataset.manifest import Manifest
from shards.panoptic.segment_png import png_size
from shards.read.sample import SampleReader
from shards.source.report import load_report
from shards.write.writer import write_panoptic

FIGURES = Path(__file__).parent / "figures" / "panoptic" / "targets"
EXPECTED = json.loads((FIGURES / "expected.json").read_text())


def written(case: str, folder: Path) -> Manifest:
    """Write a case with grey images, since targets are of the PNGs."""
    for path in (FIGURES / case).glob("*.png"):
        buffer = io.BytesIO()
        Image.new("RGB", png_size(path.read_bytes()), (128, 128, 128)).save(buffer, "JPEG")
        (folder / f"{path.stem}.jpg").write_bytes(buffer.getvalue())
    return write_panoptic(folder, FIGURES / case / "panoptic.json", FIGURES / case, folder / "out")


def weighed(masks: NDArray[np.bool_]) -> list[float]:
    flat = masks.reshape(len(masks), -1)
    return [float((np.flatnonzero(mask) + 1).sum() / flat.shape[1]) for mask in flat]


def check_masks(masks: NDArray[np.bool_], expected: dict[str, Any]) -> None:
    assert masks.sum(axis=(1, 2)).tolist() == expected["mask_pixels"]
    assert weighed(masks) == pytest.approx(expected["mask_weighed"], abs=1e-6)


@pytest.mark.parametrize("case", EXPECTED)
def test_targets_are_those_of_the_original(case: str, tmp_path: Path) -> None:
    manifest = written(case, tmp_path)
    assert load_report(manifest).defects == ()  # type: ignore[union-attr]
    reader = SampleReader(manifest, masks=True)
    transform = evaluation_transform(TransformConfig())
    ids = np.array([category.id for category in manifest.categories])
    for expected in EXPECTED[case]:
        (row,) = manifest.index().rows_of([expected["image_id"]]).tolist()
        sample, read = reader.read(row), expected["as_read"]
        assert ids[sample.labels].tolist() == read["labels"]
        assert sample.boxes_xyxy.tolist() == read["boxes"]
        assert reader.segments(row).crowds.tolist() == [bool(crowd) for crowd in read["iscrowd"]]
        assert sample.masks is not None
        check_masks(sample.masks, read)
        image, target = transform(sample)
        evaluated = expected["for_evaluation"]
        assert list(image.shape[1:]) == evaluated["size"]
        assert ids[target.labels.numpy()].tolist() == evaluated["labels"]
        assert target.boxes.numpy() == pytest.approx(np.array(evaluated["boxes"]), abs=1e-6)
        assert target.masks is not None
        check_masks(target.masks.numpy(), evaluated)
