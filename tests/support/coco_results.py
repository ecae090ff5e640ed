"""Detections in COCO's result format, as pycocotools and COCO's evaluation server read them."""

from typing import Any

from shards.dataset.manifest import Manifest
from shards.score.detections import Detections


def coco_results(manifest: Manifest, detections: Detections) -> list[dict[str, Any]]:
    """Return one result per detection, with original category ids.

    Results with masks have no boxes: pycocotools would take the objects' areas from them.
    """
    images = manifest.index().images[manifest.index().rows_of(detections.image_ids)]
    results = []
    for number, (image_id, label) in enumerate(
        zip(detections.image_ids.tolist(), detections.labels.tolist(), strict=True)
    ):
        result: dict[str, Any] = {"image_id": image_id, "category_id": manifest.categories[label].id}
        if detections.masks is None:
            result["bbox"] = detections.boxes_xywh[number].tolist()
        else:
            size = [int(images["height"][number]), int(images["width"][number])]
            result["segmentation"] = {"size": size, "counts": detections.masks[number].decode()}
        results.append(result | {"score": float(detections.scores[number])})
    return results
