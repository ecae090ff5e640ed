"""Panoptic quality inside an evaluation: each image is counted when its segments are known, and only its counts are kept.

Masks of no more images than those of a batch are in memory. The segments of a few images are kept as PNGs, for pictures.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from detr.batch import Batch
from detr.model import Outputs
from detr.panoptic import PanopticResult, panoptic
from detr.postprocess import Detection, detect
from pipeline.distributed.ranks import Ranks
from shards.arrays import Ints
from shards.dataset.manifest import Manifest
from shards.panoptic.segment_png import write_png
from shards.read.sample import SampleReader
from shards.score.panoptic_quality import (
    GroupQuality,
    ImageCounts,
    PanopticQuality,
    SegmentCounts,
    count,
    in_columns,
    quality_of,
)


class FoundSegments(NamedTuple):
    """Segments that were found in an image, for a picture: a PNG whose ids are 1 + the position in `labels`."""

    png: bytes
    labels: tuple[int, ...]
    """Labels of the data set."""


@dataclass(frozen=True)
class PanopticScore:
    """Panoptic quality of an evaluation."""

    quality: PanopticQuality
    drawn: dict[int, FoundSegments]
    """Segments of the images to draw, by image id."""
    counts: SegmentCounts
    """Counts of all images, in the order of their ids."""

    @property
    def metrics(self) -> dict[str, float]:
        """PQ, SQ and RQ of all classes, of things and of stuff by name; -1 for a group that does not occur."""
        groups = {"": self.quality.all, "_things": self.quality.things, "_stuff": self.quality.stuff}
        return {f"{name}{suffix}": value for suffix, group in groups.items() for name, value in _figures(group).items()}


def _figures(group: GroupQuality | None) -> dict[str, float]:
    return {name: -1.0 if group is None else getattr(group, name.lower()) for name in ("PQ", "SQ", "RQ")}


class PanopticCounter(AbstractContextManager["PanopticCounter"]):
    """Reader of outputs that counts the segments of each image, and returns its boxes for AP.

    It counts nothing for a model without masks. `labels` are those of the data set for each label of the model, -1 if
    it lacks them: such segments are no prediction, as detections of such classes are none. `drawn` images with the lowest
    ids are kept for pictures.
    """

    def __init__(self, manifest: Manifest, labels: Ints, threads: int, drawn: int = 0) -> None:
        self._index = manifest.index()
        self._things = [bool(category.isthing) for category in manifest.categories]
        # What a class is, the data decides, as for the truth.
        self._stuff = [label >= 0 and not self._things[label] for label in labels.tolist()]
        self._labels = labels
        self._counts: list[tuple[int, ImageCounts]] = []
        ids = np.sort(self._index.images["image_id"])[:drawn]
        self._wanted = set(ids.tolist())
        self._drawn: dict[int, FoundSegments] = {}
        self._reader = SampleReader(manifest)
        self._threads = ThreadPoolExecutor(max(threads, 1), thread_name_prefix="segments")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the threads and close the shards."""
        self._threads.shutdown(cancel_futures=True)
        self._reader.close()

    def __call__(self, outputs: Outputs, batch: Batch) -> list[Detection]:
        """Count the images of a batch and return one detection per query, without masks."""
        sizes = [target.original_size for target in batch.targets]
        if outputs.masks is not None:
            rows = self._index.rows_of(np.array([target.image_id for target in batch.targets])).tolist()
            truths = [self._threads.submit(self._reader.segments, row) for row in rows]  # while the device computes
            canvas = (batch.images.shape[2], batch.images.shape[3])
            results = panoptic(outputs, sizes, batch.sizes, canvas, self._stuff)
            for target, truth, result in zip(batch.targets, truths, results, strict=True):
                indices, labels = known_segments(result, self._labels)
                self._counts.append((target.image_id, count(truth.result(), indices, labels)))
                if target.image_id in self._wanted:
                    self._drawn[target.image_id] = FoundSegments(write_png(indices + 1), tuple(labels))
        return detect(outputs._replace(masks=None), sizes)

    def gather(self, ranks: Ranks) -> PanopticScore | None:
        """Return the quality over the images of all ranks on rank 0, and None elsewhere and without masks; a collective call."""
        gathered = ranks.all_gather((self._counts, self._drawn))
        # By image, so that nothing depends on the ranks.
        counts = sorted((pair for of_rank, _ in gathered for pair in of_rank), key=lambda pair: pair[0])
        if not (ranks.first and counts):
            return None
        drawn = {number: found for _, of_rank in gathered for number, found in of_rank.items()}
        columns = in_columns([counted for _, counted in counts])
        return PanopticScore(quality_of(columns, self._things), drawn, columns)


def known_segments(result: PanopticResult, labels: Ints) -> tuple[npt.NDArray[np.int32], list[int]]:
    """Return the indices and the data set's labels of the segments whose class it has; the pixels of others are -1."""
    mapped = labels[[segment.label for segment in result.segments]] if result.segments else np.zeros(0, np.int64)
    known = mapped >= 0
    numbers = np.append(np.where(known, np.cumsum(known) - 1, -1), -1).astype(np.int32)  # the last for -1
    return numbers[result.indices.numpy()], mapped[known].tolist()
