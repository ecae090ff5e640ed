"""The defect report of a data set: made, written, read, shown."""

from collections import Counter
from collections.abc import Iterable

import msgspec

from shards.config import Policy
from shards.dataset.manifest import Manifest
from shards.errors import ShardError
from shards.source.defects import KINDS, Defect, Severity
from shards.store import storage

REPORT_NAME = "report.json"
_SHOWN_IDS = 4
_MEASURED = ("box-outside", "box-off-image")  # kinds that compare with the image size in the source


class KindCount(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Number of defects of one kind."""

    kind: str
    severity: Severity
    count: int


class _Entry(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """A defect in a report, which always states kind and severity."""

    text: str
    kind: str
    severity: Severity
    image_id: int | None = None
    annotation_id: int | None = None


class DefectReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All defects of a source, and what was done about them (`report.json`).

    policy: "fail" wrote nothing if anything was rejected, "quarantine" left rejected entries out.
    images_listed, annotations_listed: numbers in the source.
    images, annotations: numbers in the data set.
    kinds: numbers of defects, rejected kinds first.
    defects: all defects, in order of image and annotation.
    """

    policy: Policy
    images_listed: int
    annotations_listed: int
    images: int
    annotations: int
    kinds: tuple[KindCount, ...]
    defects: tuple[Defect, ...]

    def to_json(self) -> bytes:
        """Return the report as indented JSON, which people can read."""
        entries = [
            _Entry(defect.text, defect.kind, defect.severity, defect.image_id, defect.annotation_id)
            for defect in self.defects
        ]
        content = msgspec.json.encode(msgspec.structs.asdict(self) | {"defects": entries})
        return msgspec.json.format(content, indent=1) + b"\n"


def drop_mismeasured(defects: Iterable[Defect]) -> list[Defect]:
    """Return the defects without those of boxes that were compared with a wrong image size, itself a defect."""
    defects = list(defects)
    wrong_size = {defect.image_id for defect in defects if defect.kind == "wrong-size"}
    return [defect for defect in defects if defect.image_id not in wrong_size or defect.kind not in _MEASURED]


def make_report(
    policy: Policy, defects: Iterable[Defect], listed: tuple[int, int], written: tuple[int, int]
) -> DefectReport:
    """Return the report on `defects`; `listed` and `written` are (images, annotations)."""
    ordered = sorted(
        defects,
        key=lambda defect: (_first(defect.image_id), _first(defect.annotation_id), defect.kind, defect.text),
    )
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
    """Return the report in `content`; raise `ShardError`, naming `path`, if it is not valid."""
    try:
        return msgspec.json.decode(content, type=DefectReport)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ShardError(f"{path}: {error}; expected a report as written by `detr shard coco`") from None


def defect_table(defects: Iterable[Defect]) -> str:
    """Return a table with kind, severity, count and first ids, one line per kind, or "" for no defects."""
    by_kind: dict[str, list[Defect]] = {}
    for defect in defects:
        by_kind.setdefault(defect.kind, []).append(defect)
    if not by_kind:
        return ""
    lines = [f"{'defect':24}{'':10}{'count':>8}  first"]
    for kind, severity in KINDS.items():
        matching = by_kind.get(kind, [])
        if matching:
            names = ", ".join(map(_name, matching[:_SHOWN_IDS]))
            more = ", ..." if len(matching) > _SHOWN_IDS else ""
            lines.append(f"{kind:24}{severity:10}{len(matching):8}  {names}{more}")
    return "\n".join(lines)


def _name(defect: Defect) -> str:
    """Return the name of the image or annotation of a defect."""
    if defect.image_id is None and defect.annotation_id is None:
        return defect.text.partition(":")[0]
    image = "image ?" if defect.image_id is None else f"image {defect.image_id}"
    return image if defect.annotation_id is None else f"{image} (annotation {defect.annotation_id})"


def _first(number: int | None) -> int:
    """Return a sort key of an id that puts None first."""
    return -1 if number is None else number


def load_report(manifest: Manifest) -> DefectReport | None:
    """Return the report of defects in a data set's source; None when the data set has none."""
    url = storage.join(manifest.url, REPORT_NAME)
    try:
        return parse_report(storage.read(url), url)
    except FileNotFoundError:
        return None
