"""Kinds of defects of a source.

A *rejected* image or annotation cannot be used for training or scoring. A *noted* one is used as it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from shards.errors import ShardError

Severity = Literal["rejected", "noted"]
NAMED_DEFECTS = 3
KINDS: dict[str, Severity] = {
    "malformed": "rejected",  # a field is absent or of the wrong type, or a number is impossible
    "missing-file": "rejected",
    "not-an-image": "rejected",
    "unknown-format": "rejected",
    "truncated": "rejected",
    "corrupt": "rejected",
    "wrong-size": "rejected",
    "duplicate-image-id": "rejected",
    "duplicate-annotation-id": "rejected",
    "unknown-image": "rejected",
    "unknown-category": "rejected",
    "box-not-finite": "rejected",
    "box-negative": "rejected",
    "no-annotation": "rejected",  # this and the next are of panoptic sources
    "two-annotations": "rejected",
    "missing-png": "rejected",
    "bad-png": "rejected",
    "png-size": "rejected",
    "bad-segment-id": "rejected",
    "duplicate-segment-id": "rejected",
    "segment-without-pixels": "rejected",
    "unlisted-segment": "noted",  # pixels of an id that the JSON lacks: neither VOID nor a segment, as in the original
    "segment-area": "noted",
    "segment-box": "noted",
    "repeated-stuff": "noted",
    "stuff-crowd": "noted",
    "misnamed": "noted",
    "exif-orientation": "noted",
    "cmyk": "noted",
    "grey": "noted",
    "16-bit": "noted",
    "alpha": "noted",
    "zero-area-box": "noted",
    "box-outside": "noted",
    "box-off-image": "noted",
    "no-segmentation": "noted",  # only if others of the source have one
    "bad-segmentation": "noted",
    "no-label-file": "noted",  # YOLO: an image without objects, or one whose labels were lost
}


class Defect(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """A problem in the source, or a fact worth knowing; `text` names the image or annotation."""

    text: str
    kind: str = "malformed"
    image_id: int | None = None
    annotation_id: int | None = None

    def __post_init__(self) -> None:
        if not self.text.isascii():  # reports and terminals accept only valid UTF-8
            msgspec.structs.force_setattr(self, "text", printable(self.text))

    @property
    def severity(self) -> Severity:
        """Severity of the defect's kind."""
        return KINDS[self.kind]

    @property
    def rejected(self) -> bool:
        """True if the image or annotation cannot be used."""
        return self.severity == "rejected"


@dataclass(frozen=True)
class Unconvertible:
    """Numbers of images and annotations that could not be converted from another format to COCO, and the defects."""

    images: int
    annotations: int
    defects: tuple[Defect, ...]


class SourceError(ShardError):
    """Raised for a source with defects; all are in `defects` and in the file `report`, if given."""

    def __init__(self, path: Path | str, defects: Sequence[Defect], report: str = "") -> None:
        shown = "; ".join(defect.text for defect in defects[:NAMED_DEFECTS])
        more = f"; and {len(defects) - NAMED_DEFECTS} more" if len(defects) > NAMED_DEFECTS else ""
        number = "1 defect" if len(defects) == 1 else f"{len(defects)} defects"
        remedy = "correct or remove them and run again"
        if report:
            remedy += f", or leave them out with --on-defect quarantine (all are in {report})"
        super().__init__(f"{path}: {number}: {shown}{more}. Nothing was written: {remedy}")
        self.defects = tuple(defects)
        self.report = report


def printable(name: str) -> str:
    r"""Return a file name as valid UTF-8: bytes that are not, which Python has as lone surrogates, become `\xe9`."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")
