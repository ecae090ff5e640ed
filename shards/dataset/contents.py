"""Contents of a data set in figures (objects per image, their sizes and classes), and differences from another's.

Two data sets are compared by the total variation distance of their shares: the share of objects, or of images, that would
have to change their group. Samples of one population differ too, so the distance is judged by the one that chance gives.
Objects of an image are alike (a crowd of people, a herd), so chance is estimated from the variation between images and not
between objects. The data sets differ if their distance exceeds the expected one by `_DEVIATIONS` standard deviations and by
`LEAST_DISTANCE`: large data sets differ measurably in ways that do not matter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shards.arrays import Floats, Ints
from shards.dataset.manifest import Manifest

LEAST_DISTANCE = 0.05
"""Least excess over the distance by chance that counts as a difference: 5% of objects or images."""
_DEVIATIONS = 5.0
_ABSENCE = 1e-3  # least probability at which a class may be absent from a data set by chance
_PER_IMAGE = {"0": 0, "1": 1, "2": 2, "3-4": 3, "5-8": 5, "9-16": 9, "17-32": 17, "33+": 33}  # least number of each
# Least side of each group in pixels, the root of its area; COCO's small objects are below 32, its large ones from 96.
_SIDES = {"under 16": 0, "16-32": 16, "32-64": 32, "64-96": 64, "96-192": 96, "192-384": 192, "384+": 384}
KINDS = {"objects": "objects per image", "sizes": "sizes of objects", "classes": "classes of objects"}
"""Subjects of a comparison, by the names of the fields of `Contents`."""


@dataclass(frozen=True, eq=False)
class Groups:
    """Numbers of objects, or of images, by group, with the sums that tell how much chance changes them.

    With x[i, g] the number in group g of image i, and n[i] the number in all groups: `squares` are the sums over i of
    x[i, g]^2 and `products` those of x[i, g] n[i], both [groups]; `total_squares` is the sum of n[i]^2.
    """

    names: tuple[str, ...]
    counts: Ints
    images: Ints
    """Images that have any of each group, int64 [groups]."""
    squares: Floats
    products: Floats
    total_squares: float

    @property
    def shares(self) -> Floats:
        """Share of each group, 0 if there is nothing."""
        return np.asarray(self.counts / max(int(self.counts.sum()), 1), np.float64)


@dataclass(frozen=True, eq=False)
class Contents:
    """Contents of a data set, crowd regions left out."""

    images: int
    annotations: int
    objects: Groups
    """Images by their number of objects."""
    sizes: Groups
    """Objects by the root of their area."""
    classes: Groups
    """Objects by class, in the order of the labels."""


@dataclass(frozen=True)
class Difference:
    """Distance between two data sets in one of `KINDS`."""

    kind: str
    distance: float
    """Total variation distance, 0 to 1."""
    by_chance: float
    """Distance that is expected between samples of one population with so many images."""
    differs: bool
    """True if the distance is beyond chance and large enough to matter."""


def contents(manifest: Manifest) -> Contents:
    """Return the contents of a data set, from its index alone."""
    index = manifest.index()
    annotations = index.annotations[index.annotations["iscrowd"] == 0]
    images, of_image = manifest.images, annotations["image"].astype(np.int64)
    numbers = np.bincount(of_image, minlength=images)
    sides = np.sqrt(np.maximum(annotations["area"], 0))
    names = tuple(category.name for category in manifest.categories)
    return Contents(
        images=images,
        annotations=len(annotations),
        objects=_groups(np.arange(images), _binned(numbers, _PER_IMAGE), tuple(_PER_IMAGE), images),
        sizes=_groups(of_image, _binned(sides, _SIDES), tuple(_SIDES), images),
        classes=_groups(of_image, annotations["label"].astype(np.int64), names, images),
    )


def differences(train: Contents, val: Contents) -> tuple[Difference, ...]:
    """Return the distance of two data sets of the same categories in each of `KINDS`."""
    return tuple(_difference(kind, train, val) for kind in KINDS)


def missing_classes(contents: Contents, other: Contents) -> tuple[str, ...]:
    """Return the classes that have objects in `other` only, other than those that chance may well have left out.

    That is judged by the share of images of `other` that have the class.
    """
    counts, of_other = contents.classes.counts, other.classes
    share = np.minimum(of_other.images / max(other.images, 1), 1 - 1e-9)
    by_chance = np.exp(np.log1p(-share) * contents.images)
    absent = (counts == 0) & (of_other.counts > 0) & (by_chance < _ABSENCE)
    return tuple(of_other.names[label] for label in np.flatnonzero(absent).tolist())


def warning_lines(train: Contents, val: Contents) -> tuple[str, ...]:
    """Return a line for each way in which validation data differ from training data; none for like data."""
    lines = []
    unknown = tuple(
        name
        for name, here, there in zip(val.classes.names, train.classes.counts, val.classes.counts, strict=True)
        if there and not here
    )
    if unknown:
        lines.append(f"{_some(unknown)} only in the validation data; expected objects to learn them from")
    unseen = missing_classes(val, train)
    if unseen:
        lines.append(f"{_some(unseen)} only in the training data; expected objects to score them on")
    for difference in differences(train, val):
        if difference.differs:
            lines.append(
                f"training and validation data differ in the {KINDS[difference.kind]}: {difference.distance:.0%} would "
                f"have to change, expected {difference.by_chance:.0%} by chance; most: {_largest(difference, train, val)}"
            )
    return tuple(lines)


def _groups(of_image: Ints, group: Ints, names: tuple[str, ...], images: int) -> Groups:
    """Return the numbers by group of units, each in an image and a group."""
    count = len(names)
    pairs, numbers = np.unique(of_image * count + group, return_counts=True)
    in_image, in_group = np.divmod(pairs, count)
    totals = np.bincount(of_image, minlength=images).astype(np.float64)

    def summed(values: Floats) -> Floats:
        return np.bincount(in_group, values, minlength=count).astype(np.float64)

    return Groups(
        names=names,
        counts=np.bincount(group, minlength=count).astype(np.int64),
        images=np.bincount(in_group, minlength=count).astype(np.int64),
        squares=summed(numbers.astype(np.float64) ** 2),
        products=summed(numbers * totals[in_image]),
        total_squares=float(totals @ totals),
    )


def _binned(values: npt.NDArray[np.generic], least: dict[str, int]) -> Ints:
    return np.searchsorted(list(least.values()), values, "right").astype(np.int64) - 1


def _difference(kind: str, train: Contents, val: Contents) -> Difference:
    first, second = getattr(train, kind), getattr(val, kind)
    sizes = [int(groups.counts.sum()) for groups in (first, second)]
    if 0 in sizes:
        return Difference(kind, 0.0, 0.0, False)
    distance = float(np.abs(first.shares - second.shares).sum()) / 2
    # Chance is that of one population, so its shares and the variation between its images come from both data sets.
    pooled = (first.counts + second.counts) / sum(sizes)
    residuals = sum(
        groups.squares - 2 * pooled * groups.products + pooled**2 * groups.total_squares for groups in (first, second)
    )
    per_image = np.maximum(residuals, 0) / max(train.images + val.images - 1, 1)
    variances = per_image * (train.images / sizes[0] ** 2 + val.images / sizes[1] ** 2)
    # The mean and the standard deviation of |z| are sqrt(2 / pi) and sqrt(1 - 2 / pi); shares vary almost independently.
    by_chance = min(math.sqrt(2 / math.pi) * float(np.sqrt(variances).sum()) / 2, 1.0)
    spread = math.sqrt((1 - 2 / math.pi) * float(variances.sum())) / 2
    differs = distance > by_chance + max(_DEVIATIONS * spread, LEAST_DISTANCE)
    return Difference(kind, distance, by_chance, differs)


def _largest(difference: Difference, train: Contents, val: Contents, most: int = 3) -> str:
    first, second = getattr(train, difference.kind), getattr(val, difference.kind)
    order = np.argsort(-np.abs(first.shares - second.shares), kind="stable")[:most].tolist()
    return ", ".join(f"{first.names[group]} {first.shares[group]:.0%} / {second.shares[group]:.0%}" for group in order)


def _some(names: tuple[str, ...], most: int = 5) -> str:
    listed = ", ".join(names[:most]) + (", ..." if len(names) > most else "")
    return f"the class {listed} is" if len(names) == 1 else f"{len(names)} classes ({listed}) are"
