"""Reports to the tracker besides the curves: evaluations, pictures, warnings, and skipped images."""

from __future__ import annotations

import io
import logging
import platform
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

from PIL import Image

from pipeline.checkpoint.location import Location
from pipeline.config import RunConfig
from pipeline.display.draw import titled
from pipeline.display.pictures import curves_picture, curves_table, picture_sheet
from pipeline.display.segments import gains_picture, quality_tables, segments_sheet
from pipeline.display.tables import class_columns
from pipeline.distributed.devices import device_name
from pipeline.distributed.ranks import Ranks
from pipeline.evaluation.evaluate_model import Evaluation
from pipeline.evaluation.panoptic import PanopticScore
from pipeline.tracking.pages.pictures import CURVES, DETECTIONS, newest, newest_small
from pipeline.tracking.provenance import versions_line
from pipeline.tracking.tags import TAG_HARDWARE, TAG_IMAGES, TAG_LEFT_OUT, TAG_VERSIONS
from pipeline.tracking.tracker import SUMMARY, Tracker
from shards.dataset.manifest import Manifest
from shards.errors import ShardError, one_line
from shards.read.bad_samples import BadSamples
from shards.score.detections import Detections
from shards.score.precision_recall import UNSCORED

LOG = logging.getLogger(__name__)

_MOST_TEXT = 5000  # characters of a tag
_SMALL = (620, 620)  # pixels of a picture on a page, which a wider one would stretch beyond the window


def report_evaluation(
    tracker: Tracker, path: Location, val: Manifest, step: int, epoch: float, evaluation: Evaluation, started: float
) -> None:
    """Report the metrics of a checkpoint; `started` is the `time.perf_counter` at the start of the evaluation."""
    metrics, classes = evaluation.score.metrics, evaluation.score.classes
    # In one event, so that no reader of the store sees this epoch with the metrics of an earlier one.
    figures = {f"val/{name}": value for name, value in metrics.items() if value >= 0}  # others have no ground truth
    figures |= {"evaluation/seconds": time.perf_counter() - started, "evaluation/epoch": epoch}
    figures["evaluation/images"] = float(evaluation.images)
    tracker.checkpoint(str(path), step, figures)
    headline = [name for name in ("PQ", "AP", "AP50", "mask_AP") if metrics.get(name, -1.0) >= 0]
    tracker.metrics({f"{SUMMARY}/{name}": metrics[name] for name in headline}, step)
    tracker.table("per_class_ap.json", class_columns(classes, "mask_AP" in metrics), step)
    curves = (evaluation.score.curves, evaluation.score.mask_curves)
    tracker.table("precision_recall.json", curves_table(*curves), step)
    report_picture(tracker, CURVES, curves_picture(*curves), step)
    if evaluation.panoptic:
        _report_segments(tracker, val, evaluation.panoptic, step)


def _report_segments(tracker: Tracker, val: Manifest, score: PanopticScore, step: int) -> None:
    """Report what PQ is made of: quality per class, and what it loses to each kind of error."""
    for name, table in quality_tables(score.quality, val.categories).items():
        tracker.table(name, table, step)
    if gains := score.quality.gains:
        tracker.metrics({f"errors/PQ_{name}": value for name, value in vars(gains).items()}, step)
        report_picture(tracker, "errors/PQ", gains_picture(score.quality), step)


def report_opening(config: RunConfig, tracker: Tracker, val: Manifest) -> None:
    """Report ground-truth images and empty curves before the first evaluation."""
    masks = config.model.masks and not val.panoptic  # of panoptic data, only boxes are scored as detections
    draw = partial(picture_sheet, val, Detections.empty(masks))
    if config.model.masks and val.panoptic:
        draw = partial(segments_sheet, val, {})
    report_pictures(tracker, draw, config.evaluate.pictures, 0, "before training")
    report_picture(tracker, CURVES, curves_picture(UNSCORED, UNSCORED if masks else None), 0)
    tracker.tags({TAG_IMAGES: "True"})


def report_pictures(tracker: Tracker, draw: Callable[[int], Image.Image], count: int, step: int, title: str) -> None:
    """Report the sheet that `draw` makes of `count` validation images, with what was found beside the truth.

    A store that does not answer costs the sheet and not the run: nothing that follows needs it.
    """
    if not count:
        return
    try:
        sheet = draw(count)
    except (OSError, ShardError) as error:
        LOG.warning("the pictures of step %d are left out (%s)", step, one_line(error))
        return
    report_picture(tracker, DETECTIONS, titled(sheet, title), step)


def report_picture(tracker: Tracker, key: str, picture: Image.Image, step: int) -> None:
    """Report a picture of a series, and the same as its newest; step 0 is only the newest."""
    # A palette takes a seventh of the time to compress and a quarter of the space, at each evaluation of a run.
    whole = picture.quantize(256, method=Image.Quantize.FASTOCTREE)
    if step:
        tracker.picture(key, whole, step)
    small = picture.copy()
    small.thumbnail(_SMALL)
    for name, image, options in ((newest(key), whole, {}), (newest_small(key), small, {"quality": 80})):
        content = io.BytesIO()
        image.save(content, Path(name).suffix[1:], **options)
        tracker.file(name, content.getvalue(), step)


def report_hardware(tracker: Tracker | None, ranks: Ranks) -> None:
    """Report the devices of all ranks, and the versions of what they run; a collective call."""
    devices = Counter(ranks.all_gather((platform.node(), device_name(ranks.device))))
    if tracker:
        nodes = "; ".join(f"{node}: {count} on {device}" for (node, device), count in devices.items())
        count = f"{ranks.world_size} worker{'s' if ranks.world_size > 1 else ''}"
        tracker.tags({TAG_HARDWARE: f"{count}, {nodes}"[:_MOST_TEXT], TAG_VERSIONS: versions_line()})


def report_left_out(tracker: Tracker | None, bad: BadSamples, ranks: Ranks) -> None:
    """Report the training images that any rank has skipped; a collective call."""
    lines: set[str] = set().union(*ranks.all_gather(bad.lines()))
    if lines and tracker:
        tracker.tags({TAG_LEFT_OUT: f"{len(lines)} training images: {'; '.join(sorted(lines))}"[:_MOST_TEXT]})
