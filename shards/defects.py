"""What is wrong with a source or worth knowing about it: every case named, counted by kind, and reported.

A *rejected* image or annotation cannot be trained on or scored. What is *noted* is used as it is; the reader should know.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from shards.config import Policy
from shards.errors import ShardError

Severity = Literal["rejected", "noted"]
REPORT_NAME = "report.json"
NAMED_DEFECTS = 3
_SHOWN_IDS = 4

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
    "misnamed": "noted",
    "exif-orientation": "noted",
    "cmyk": "noted",
    "grey": "noted",
    "16-bit": "noted",
    "alpha": "noted",
    "zero-area-box": "noted",
    "box-outside": "noted",
    "box-off-image": "noted",
    "no-segmentation": "noted",  # only where others of the source have one
    "bad-segmentation": "noted",
    "no-label-file": "noted",  # of YOLO: an image without objects, or one whose labels were lost
}


_MEASURED = ("box-outside", "box-off-image")  # against the size that the source says


class Defect(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """One thing wrong with the source or worth knowing, in words that name the image or annotation."""

    text: str
    kind: str = "malformed"
    image_id: int | None = None
    annotation_id: int | None = None

    def __post_init__(self) -> None:
        if not self.text.isascii():  # reports and terminals take nothing but UTF-8
            msgspec.structs.force_setattr(self, "text", printable(self.text))

    @property
    def severity(self) -> Severity:
        """What becomes of what it names."""
        return KINDS[self.kind]

    @property
    def rejected(self) -> bool:
        """Whether what it names cannot be used."""
        return self.severity == "rejected"


@dataclass(frozen=True)
class Lost:
    """What another format held that no COCO JSON can say: images and annotations left out of it, and why."""

    images: int
    annotations: int
    defects: tuple[Defect, ...]


class SourceError(ShardError):
    """The source is not sound. ``defects`` holds all of them, as does the file ``report``, if it is given; the message
    counts them and shows the first few."""

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


class KindCount(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How often one kind of defect occurs."""

    kind: str
    severity: Severity
    count: int


class _Entry(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """A defect as it stands in a report, where it tells its kind and severity whatever they are."""

    text: str
    kind: str
    severity: Severity
    image_id: int | None = None
    annotation_id: int | None = None


class DefectReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything found in a source, and what was done about it (``report.json``).

    Attributes:
        policy: what becomes of rejected ones: nothing is written, or they are left out.
        images_listed, annotations_listed: what the source lists.
        images, annotations: how many of them are in the data set.
        kinds: how often each kind occurs, rejected ones first.
        defects: every one, by image and annotation.
    """

    policy: Policy
    images_listed: int
    annotations_listed: int
    images: int
    annotations: int
    kinds: tuple[KindCount, ...]
    defects: tuple[Defect, ...]

    def to_json(self) -> bytes:
        """One line per defect would help nobody at a million of them, yet a person should be able to read it."""
        entries = [_Entry(one.text, one.kind, one.severity, one.image_id, one.annotation_id) for one in self.defects]
        return (
            msgspec.json.format(msgspec.json.encode(msgspec.structs.asdict(self) | {"defects": entries}), indent=1)
            + b"\n"
        )


def told(defects: Iterable[Defect]) -> list[Defect]:
    """Without notes on boxes that were measured against an image's wrong size, which is what is to be said of it."""
    defects = list(defects)
    mismeasured = {one.image_id for one in defects if one.kind == "wrong-size"}
    return [one for one in defects if one.image_id not in mismeasured or one.kind not in _MEASURED]


def make_report(
    policy: Policy, defects: Iterable[Defect], listed: tuple[int, int], written: tuple[int, int]
) -> DefectReport:
    """The report on ``defects``; ``listed`` and ``written`` count images and annotations."""
    ordered = sorted(defects, key=lambda one: (_first(one.image_id), _first(one.annotation_id), one.kind, one.text))
    counts = Counter(defect.kind for defect in ordered)
    return DefectReport(
        policy=policy,
        images_listed=listed[0],
        annotations_listed=listed[1],
        images=written[0],
        annotations=written[1],
        kinds=tuple(KindCount(kind, severity, counts[kind]) for kind, severity in KINDS.items() if counts[kind]),
        defects=tuple(ordered),
    )


def parse_report(content: bytes, path: str) -> DefectReport:
    """Raises ShardError naming ``path`` where it is no report."""
    try:
        return msgspec.json.decode(content, type=DefectReport)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ShardError(f"{path}: {error}; expected a report as written by `detr shard coco`") from None


def printable(name: str) -> str:
    """A file's name as UTF-8 can say it: bytes that are not, which Python keeps as lone surrogates, become ``\\xe9``."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


def defect_table(defects: Iterable[Defect]) -> str:
    """Kind, severity, count and the first few ids: one line per kind that occurs, with a title; empty for no defects."""
    by_kind: dict[str, list[Defect]] = {}
    for defect in defects:
        by_kind.setdefault(defect.kind, []).append(defect)
    if not by_kind:
        return ""
    lines = [f"{'defect':24}{'':10}{'count':>8}  first"]
    for kind, severity in KINDS.items():
        found = by_kind.get(kind, [])
        if found:
            more = ", ..." if len(found) > _SHOWN_IDS else ""
            lines.append(f"{kind:24}{severity:10}{len(found):8}  {', '.join(map(_who, found[:_SHOWN_IDS]))}{more}")
    return "\n".join(lines)


def _who(defect: Defect) -> str:
    if defect.image_id is None and defect.annotation_id is None:
        return defect.text.partition(":")[0]
    image = "image ?" if defect.image_id is None else f"image {defect.image_id}"
    return image if defect.annotation_id is None else f"{image} (annotation {defect.annotation_id})"


def _first(number: int | None) -> int:
    return -1 if number is None else number
