"""The report of an evaluation: one HTML page that stands alone, with its pictures in it and no script."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from PIL import Image

from pipeline.display.explanation import (
    NOTHING,
    calibration_picture,
    confused_pairs,
    suspect_pictures,
    suspect_text,
    worst_pictures,
)
from pipeline.display.pictures import curves_picture
from pipeline.display.tables import METRIC_MEANINGS
from shards.dataset.manifest import Manifest
from shards.score.coco_eval import ClassScore, Score
from shards.score.detections import Detections
from shards.score.diagnosis import THRESHOLD, Diagnosis

_ERRORS = {
    "class": "right box, wrong class",
    "box": "right class, box too far off (IoU 0.1 to 0.5)",
    "class_and_box": "wrong class and box too far off",
    "duplicate": "found twice",
    "background": "found where nothing is labelled",
    "missed": "not found at all",
}
PROPOSALS_BESIDE = (
    "corrections.json beside this page proposes a correction for each; set apply to true for those that are right and "
    "pass the file to detr shard coco --corrections."
)
_PANOPTIC_REMEDY = "To correct them, change the PNG and the JSON, and write the data set again."
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1360px; padding: 0 1.5rem; color: #1a1a1a }
h1 { font-size: 1.5rem; margin-bottom: .2rem } h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem }
p { margin: .3rem 0 .8rem; max-width: 60rem } .grey { color: #666 }
table { border-collapse: collapse } th, td { padding: .2rem .8rem .2rem 0; text-align: left; border-bottom: 1px solid #e5e5e5 }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums }
.row { display: flex; flex-wrap: wrap; gap: 2.5rem; align-items: flex-start }
.bar { background: #0072B2; height: .8rem; min-width: 1px }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(600px, 1fr)); gap: 1.1rem }
figure { margin: 0 } figcaption { color: #444; font-size: .85rem } img { max-width: 100%; display: block }
.row img { width: 440px; height: auto }
.classes { max-height: 26rem; overflow-y: auto }
"""


@dataclass(frozen=True)
class Drawn:
    """Pictures of a diagnosis that are drawn already."""

    worst: Sequence[Image.Image]
    suspects: Sequence[Image.Image]


def report_page(
    title: str,
    facts: Mapping[str, str],
    manifest: Manifest,
    score: Score,
    detections: Detections,
    diagnosis: Diagnosis | None,
    *,
    drawn: Drawn | None = None,
    before: Sequence[str] = (),
    after: Sequence[str] = (),
    remedy: str = PROPOSALS_BESIDE,
) -> str:
    """Return the page; `facts` are lines below the title, such as data set and number of images.

    before, after: further sections as HTML. remedy: text on the way to correct suspect labels. Without a diagnosis the
    page has no reasons of the score.
    """
    lines = "".join(f"<div>{escape(name)}: {escape(value)}</div>" for name, value in facts.items())
    sections = [
        f"<h1>{escape(title)}</h1><div class=grey>{lines}</div>",
        *before,
        _metrics(score, diagnosis),
        *([_errors(diagnosis)] if diagnosis else []),
        _classes(manifest, score, diagnosis),
    ]
    if diagnosis:
        drawn = drawn or Drawn(
            list(worst_pictures(manifest, detections, diagnosis)),
            list(suspect_pictures(manifest, diagnosis.suspects)),
        )
        sections += [
            _worst(drawn.worst, diagnosis),
            _suspects(drawn.suspects, manifest, diagnosis, _PANOPTIC_REMEDY if manifest.panoptic else remedy),
        ]
    sections += after
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(sections) + "\n</body></html>\n"


def _metrics(score: Score, diagnosis: Diagnosis | None) -> str:
    metrics, masks = score.metrics, "mask_AP" in score.metrics
    header = ("metric", "boxes", "masks", "of") if masks else ("metric", "value", "of")
    rows = []
    for name, meaning in METRIC_MEANINGS.items():
        values = [_figure(metrics[name]), *([_figure(metrics[f"mask_{name}"])] if masks else [])]
        rows.append((name, *values, meaning))
    by_objects = ""
    if diagnosis:
        objects = [(entry.objects, str(entry.images), _figure(entry.ap50)) for entry in diagnosis.by_objects]
        table = html_table(("objects", "images", "AP50"), objects)
        by_objects = f"<div><p>AP50 by number of objects in the image</p>{table}</div>"
    return (
        "<h2>Score</h2><div class=row>"
        + html_table(header, rows)
        + "<div>"
        + html_picture(
            curves_picture(score.curves, score.mask_curves), "PNG", "Precision over recall; a mean over classes."
        )
        + f"</div>{by_objects}</div>"
    )


def _errors(diagnosis: Diagnosis) -> str:
    most = max(max(diagnosis.errors.values()), 1e-9)
    rows = "".join(
        f"<tr><td>{escape(_ERRORS[name])}</td><td class=number>{diagnosis.error_counts[name]:,}</td>"
        f"<td class=number>{cost:.3f}</td><td><div class=bar style='width:{260 * max(cost, 0) / most:.0f}px'></div></td></tr>"
        for name, cost in diagnosis.errors.items()
    )
    return (
        f"<h2>What AP50 loses</h2><p>AP50 is {diagnosis.ap50:.3f}. Each line is what it would gain without that kind of "
        "error, all others kept (TIDE), so they need not add up.</p><div class=row><table>"
        "<tr><th>error<th class=number>number<th class=number>AP50<th></tr>"
        + rows
        + "</table><div>"
        + html_picture(
            calibration_picture(diagnosis.calibration),
            "PNG",
            f"Are scores probabilities? Mean difference {diagnosis.calibration_error:.3f}.",
        )
        + "</div></div>"
    )


def _classes(manifest: Manifest, score: Score, diagnosis: Diagnosis | None) -> str:
    def order(entry: ClassScore) -> tuple[bool, float]:
        return entry.boxes == 0, entry.ap

    classes = [
        (entry.name, f"{entry.boxes:,}", _figure(entry.ap), _figure(entry.ap50))
        for entry in sorted(score.classes, key=order)
    ]
    confused = ""
    if diagnosis:
        pairs = confused_pairs(manifest, diagnosis)
        confusions = [
            (true, found, f"{count:,}", "-" if true == NOTHING else f"{share:.1%}")
            for true, found, count, share in zip(*pairs.values(), strict=True)
        ]
        table = html_table(("labelled", "found", "number", "share of labelled"), confusions)
        confused = (
            f"<div><p>Most frequent confusions, scores from {THRESHOLD:g}</p><div class=classes>{table}</div></div>"
        )
    return (
        "<h2>Classes</h2><div class=row><div><p>From the lowest AP up</p><div class=classes>"
        + html_table(("class", "boxes", "AP", "AP50"), classes)
        + f"</div></div>{confused}</div>"
    )


def _worst(pictures: Sequence[Image.Image], diagnosis: Diagnosis) -> str:
    figures = [
        html_picture(picture, "WEBP", f"{worst.shard}, cost {worst.cost:.2f}")
        for picture, worst in zip(pictures, diagnosis.worst, strict=True)
    ]
    explanation = (
        f"Detections with scores from {THRESHOLD:g} beside the labels; those that agree have no name. The cost grows with "
        "the number of errors and with their share."
    )
    return f"<h2>Worst images</h2><p>{explanation}</p>{_grid(figures)}"


def _suspects(pictures: Sequence[Image.Image], manifest: Manifest, diagnosis: Diagnosis, remedy: str) -> str:
    names = [category.name for category in manifest.categories]
    figures = []
    for picture, suspect in zip(pictures, diagnosis.suspects, strict=True):
        annotation = "" if suspect.annotation_id is None else f", annotation {suspect.annotation_id}"
        text = f"{suspect_text(suspect, names)}{annotation}, {suspect.shard}, suspicion {suspect.suspicion:.2f}"
        figures.append(html_picture(picture, "WEBP", text))
    explanation = (
        "Labels that the model contradicts with confidence. A model that has not learned the data well is often the one "
        "that errs. "
    )
    explanation += remedy
    return f"<h2>Suspect labels</h2><p>{explanation}</p>{_grid(figures)}"


def _grid(figures: Sequence[str]) -> str:
    return f"<div class=grid>{''.join(figures)}</div>" if figures else "<p>None.</p>"


def html_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table; a column of figures is aligned to the right."""
    rows = [[str(cell) for cell in row] for row in rows]
    right = [bool(rows) and all(_is_figure(row[number]) for row in rows) for number in range(len(header))]
    marks = [" class=number" if is_right else "" for is_right in right]
    head = "".join(f"<th{mark}>{escape(name)}" for mark, name in zip(marks, header, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{mark}>{escape(cell)}" for mark, cell in zip(marks, row, strict=True)) for row in rows
    )
    return f"<table><tr>{head}{body}</table>"


def _is_figure(text: str) -> bool:
    return text == "-" or text.replace(",", "").replace(".", "").removesuffix("%").isdigit()


def _figure(value: float) -> str:
    return "-" if value < 0 else f"{value:.3f}"


def html_picture(picture: Image.Image, kind: str, caption: str) -> str:
    """Return a figure with the picture in it, as `PNG` or, in half the bytes of JPEG, `WEBP`."""
    content = io.BytesIO()
    picture.save(content, kind, **({"quality": 75, "method": 2} if kind == "WEBP" else {}))
    encoded = base64.b64encode(content.getvalue()).decode()
    return (
        f'<figure><img width={picture.width} height={picture.height} alt="" '
        f'src="data:image/{kind.lower()};base64,{encoded}"><figcaption>{escape(caption)}</figcaption></figure>'
    )
