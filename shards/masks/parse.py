"""Parsing and checking of COCO segmentations, without drawing them.

The writer checks every segmentation, because a malformed one would otherwise end a training with masks hours later.
"""

import re
from collections.abc import Iterable
from typing import Annotated

import msgspec

MAX_COORDINATE = 1e5  # pixels; pycocotools' memory grows with the length of an outline

# A segmentation with content: data sets with boxes only often have `null` or `[]`.
_HAS_CONTENT = re.compile(rb'"segmentation"\s*+:\s*+(?!null|\[\s*\])')


# Bounded, because Python refuses to print integers of thousands of digits, which messages would contain.
_Length = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
_MOST_BITS = 60


class RunLengths(msgspec.Struct, gc=False):
    """COCO's run lengths in column-major order; `size` is height, width."""

    size: tuple[_Length, _Length]
    counts: list[_Length] | str


class FormError(ValueError):
    """Raised for an unusable segmentation; the message continues "annotation N", `kind` is that of the defect."""

    def __init__(self, kind: str, problem: str) -> None:
        super().__init__(problem)
        self.kind = kind


_segmentation = msgspec.json.Decoder(list[list[float]] | RunLengths | None)


def parse_segmentation(raw: msgspec.Raw, height: int, width: int) -> list[list[float]] | list[int]:
    """Return the polygons (x, y, x, y, ...) or else the run lengths of a segmentation of an image of that size.

    Raise `FormError` if the segmentation is absent, empty or malformed.
    """
    try:
        segmentation = _segmentation.decode(raw)
    except msgspec.DecodeError as error:
        raise _ill_formed(f"neither polygons nor run lengths ({error})") from None
    if not segmentation:
        raise FormError("no-segmentation", "has no segmentation")
    if isinstance(segmentation, RunLengths):
        counts = segmentation.counts
        lengths = _unsqueezed(counts) if isinstance(counts, str) else counts
        if segmentation.size != (height, width) or sum(lengths) != height * width or min(lengths) < 0:
            raise _ill_formed(
                f"run lengths that sum to {sum(lengths)} for a size of {segmentation.size}, not to {height}x{width}"
            )
        return lengths
    # Fewer than three points enclose no pixel, and pycocotools takes two points as a box.
    polygons = [polygon for polygon in segmentation if len(polygon) >= 6]
    if not polygons:
        raise _ill_formed("no polygon of three points or more")
    if any(len(polygon) % 2 for polygon in polygons):
        raise _ill_formed("a polygon of half a point")
    largest = max(max(max(polygon), -min(polygon)) for polygon in polygons)
    if not largest <= MAX_COORDINATE:
        raise _ill_formed(f"a polygon that reaches {largest:g} pixels from the image's corner")
    return polygons


def has_segmentations(annotations: Iterable[msgspec.Raw]) -> bool:
    """Return true if the JSON of any annotation has a segmentation, valid or not."""
    return any(_HAS_CONTENT.search(bytes(text)) for text in annotations)


def _ill_formed(problem: str) -> FormError:
    return FormError("bad-segmentation", f"has an ill-formed segmentation: {problem}")


def _unsqueezed(text: str) -> list[int]:
    """Decode run lengths from COCO's string.

    Each character holds 5 bits. From the fourth length on, the string has the difference to the length two before.
    """
    lengths: list[int] = []
    value = shift = 0
    for character in text.encode():
        code = character - 48
        if not 0 <= code < 64 or shift > _MOST_BITS:
            raise _ill_formed("run lengths in a string that is not COCO's")
        value |= (code & 31) << shift
        shift += 5
        if not code & 32:
            value -= (code & 16) << (shift - 4)
            lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
            value = shift = 0
    if shift:
        raise _ill_formed("run lengths in a string that was cut off")
    return lengths
