"""Corrections proposed for suspect labels, for a person to review."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from shards.dataset.manifest import Manifest
from shards.score.suspects import Suspect
from shards.source.corrections import Action, Correction

_ACTIONS: dict[str, Action] = {"class": "relabel", "box": "move", "missing": "add", "spurious": "delete"}


def propose(manifest: Manifest, suspects: Sequence[Suspect]) -> tuple[Correction, ...]:
    """Return one correction per suspect, in their order, none of them to be applied before its review."""
    return tuple(_proposal(manifest, suspect) for suspect in suspects)


def proposals_json(manifest: Manifest, suspects: Sequence[Suspect]) -> bytes:
    """Return the proposals as a file for `detr shard coco --corrections`."""
    entries = [
        {name: value for name, value in msgspec.structs.asdict(entry).items() if value is not None}
        for entry in propose(manifest, suspects)
    ]
    return msgspec.json.format(msgspec.json.encode({"corrections": entries}), indent=1) + b"\n"


def _proposal(manifest: Manifest, suspect: Suspect) -> Correction:
    action = _ACTIONS[suspect.kind]
    found = suspect.found_label
    label = None if suspect.label is None else manifest.categories[suspect.label].name
    note = f"suspicion {suspect.suspicion:.2f}"
    if label is not None:
        note = f"labelled {label}, {note}"
    if found is not None:
        note = f"found {manifest.categories[found].name}, {note}"
    box = suspect.found_box_xywh
    return Correction(
        action=action,
        apply=False,
        annotation_id=suspect.annotation_id,
        image_id=suspect.image_id,
        category_id=manifest.categories[found].id if found is not None and action in ("relabel", "add") else None,
        bbox=box if action in ("move", "add") else None,
        note=note,
    )
