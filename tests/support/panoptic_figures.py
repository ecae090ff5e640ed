"""Cases of panoptic post-processing, made from their description, and the original's steps in plain form."""

import json
import zlib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from detr.geometry import Size
from detr.variant import Outputs
from shards.panoptic.segment_png import write_png
from shards.panoptic.segments import TrueSegments

FIGURES = Path(__file__).parents[1] / "parity" / "figures" / "panoptic"


@dataclass(frozen=True, eq=False)
class Case:
    """Inputs of post-processing, as `panoptic` takes them."""

    outputs: Outputs
    sizes: list[Size]
    original_sizes: list[Size]
    stuff: list[bool]
    threshold: float


def build_case(described: dict[str, Any]) -> Case:
    """Return the inputs that an entry of `postprocess.json` describes."""
    rng = np.random.default_rng(zlib.crc32(f"panoptic/{described['name']}".encode()))
    queries, classes, (rows, columns) = described["queries"], described["classes"], described["grid"]
    y, x = (np.arange(rows)[:, None] + 0.5) / rows, (np.arange(columns) + 0.5) / columns
    logits, masks = [], []
    for segments in described["segments"]:
        of_image = 0.5 * rng.standard_normal((queries, classes + 1))
        grids = described["noise"] * rng.standard_normal((queries, rows, columns))
        of_image[:, classes] += 8
        for query, label, boost, cy, cx, ry, rx, gain in segments:
            of_image[query, classes] -= 8
            of_image[query, label] += boost
            grids[query] += gain * np.maximum(1 - ((y - cy) / ry) ** 2 - ((x - cx) / rx) ** 2, -3)
        logits.append(of_image)
        masks.append(grids)
    return Case(
        Outputs(_floats(logits), torch.zeros(len(logits), queries, 4), masks=_floats(masks)),
        [tuple(size) for size in described["processed"]],
        [tuple(size) for size in described["target"] or described["processed"]],
        [label >= described["things"] for label in range(classes)],
        described["threshold"],
    )


def _floats(arrays: list[Any]) -> Tensor:
    return torch.from_numpy(np.stack(arrays).astype(np.float32))


def plain_panoptic(
    logits: Tensor, masks: Tensor, size: Size, original: Size, stuff: list[bool], threshold: float = 0.85
) -> tuple[Tensor, list[tuple[int, int]]]:
    """Return the pixels' segments, and label and area of each, of one image by the original's algorithm, step by step.

    It works on logits of all kept queries at the full size, and anew in every pass.
    """
    scores, labels = logits.softmax(-1).max(-1)
    kept = (labels != logits.shape[-1] - 1) & (scores > threshold)
    labels = labels[kept]
    wide = F.interpolate(masks[kept][:, None], size, mode="bilinear").squeeze(1).flatten(1)
    of_class = defaultdict(list)
    for query, label in enumerate(labels.tolist()):
        if stuff[label]:
            of_class[label].append(query)

    def divide(merge: bool) -> tuple[Tensor, Tensor]:
        shares = wide.transpose(0, 1).softmax(-1)
        found = shares.argmax(-1).view(size) if len(wide) else labels.new_zeros(size)
        for queries in of_class.values() if merge else ():
            for query in queries:
                found.masked_fill_(found == query, queries[0])
        # Pillow resizes ids as colours in the original, which is the same for the nearest neighbour.
        colours = Image.fromarray(np.repeat(found.cpu().numpy().astype(np.uint8)[..., None], 3, axis=2))
        found = torch.from_numpy(np.array(colours.resize(original[::-1], Image.Resampling.NEAREST)))[..., 0].long()
        return found, torch.tensor([int((found == query).sum()) for query in range(len(labels))])

    found, areas = divide(merge=True)
    while (areas <= 4).any():
        large = (areas > 4).to(labels.device)
        wide, labels = wide[large], labels[large]
        found, areas = divide(merge=False)
    return found, list(zip(labels.tolist(), areas.tolist(), strict=True))


def write_panoptic_files(
    folder: Path, images: list[tuple[TrueSegments, tuple[np.ndarray, list[int]]]], things: list[bool]
) -> tuple[Path, Path, Path, Path]:
    """Write truth and predictions in COCO's format; return what `score_folders` takes."""
    categories = [{"id": label, "name": str(label), "isthing": int(thing)} for label, thing in enumerate(things)]
    documents: dict[str, list[dict[str, Any]]] = {"true": [], "found": []}
    for image, (truth, (indices, labels)) in enumerate(images):
        columns = (truth.segment_ids, truth.labels, truth.crowds, truth.areas)
        true = [
            {"id": int(i), "category_id": int(label), "iscrowd": int(crowd), "area": int(area), "bbox": [0, 0, 1, 1]}
            for i, label, crowd, area in zip(*columns, strict=True)
        ]
        found = [{"id": index + 1, "category_id": label} for index, label in enumerate(labels)]
        for name, ids, segments in (("true", truth.ids, true), ("found", indices + 1, found)):
            (folder / name).mkdir(exist_ok=True)
            (folder / name / f"{image}.png").write_bytes(write_png(ids))
            documents[name].append({"image_id": image, "file_name": f"{image}.png", "segments_info": segments})
    pictures = [
        {"id": image, "file_name": f"{image}.jpg", "height": truth.ids.shape[0], "width": truth.ids.shape[1]}
        for image, (truth, _) in enumerate(images)
    ]
    for name, annotations in documents.items():
        document = {"images": pictures, "categories": categories, "annotations": annotations}
        (folder / f"{name}.json").write_text(json.dumps(document))
    return folder / "true.json", folder / "true", folder / "found.json", folder / "found"
