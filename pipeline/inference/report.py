"""The report of an evaluation of a registered version: a page, and proposed corrections of suspect labels."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from pipeline.display.attention import attention_figures, attention_section
from pipeline.display.report import report_page
from pipeline.display.run_report import segments_section
from pipeline.distributed.ranks import default_device
from pipeline.evaluation.evaluate_model import Evaluation
from pipeline.registry.versions import read_version
from shards.dataset.manifest import load_manifest
from shards.score.diagnosis import diagnose
from shards.score.proposals import proposals_json

PAGE_NAME = "report.html"
PROPOSALS_NAME = "corrections.json"


def write_report(uri: str, data: str, evaluation: Evaluation, folder: Path) -> tuple[Path, str]:
    """Write the page and the proposals into `folder`; return the page's path and the digest of the data set."""
    manifest = load_manifest(data)
    diagnosis = diagnose(manifest, evaluation.detections, rows=evaluation.rows)
    facts = {
        "data set": f"{manifest.name} in {manifest.url}, digest {manifest.digest[:12]}",
        "images": f"{evaluation.images:,}",
        "detections": f"{len(evaluation.detections):,}",
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
    model, card = read_version(uri)
    names = [category.name for category in card.categories]
    figures = attention_figures(model.to(default_device()), card.transform, names, manifest, diagnosis)
    page = report_page(
        f"{uri} on {manifest.name}",
        facts,
        manifest,
        evaluation.score,
        evaluation.detections,
        diagnosis,
        before=[segments_section(manifest, evaluation.panoptic)] if evaluation.panoptic else [],
        after=[attention_section(model, figures)],
    )
    (folder / PAGE_NAME).write_text(page, encoding="utf-8")
    if not manifest.panoptic:  # corrections are of COCO's boxes
        (folder / PROPOSALS_NAME).write_bytes(proposals_json(manifest, diagnosis.suspects))
    return folder / PAGE_NAME, manifest.digest
