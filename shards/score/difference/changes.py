"""Changes of figures between two sides, with their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np

from shards.arrays import Floats

DRAWS = 1000
LEAST_IMAGES = 20
"""Images with a class's objects below which its interval says nothing: one image drawn again and again never differs."""
_INTERVAL = (0.025, 0.975)


@dataclass(frozen=True)
class Change:
    """Value of a figure for both sides, the mean over the runs of a side, and the interval of the difference.

    Values are -1 without truth, and the interval is 0 to 0 then.
    """

    name: str
    before: float
    after: float
    low: float
    """Lower end of the 95% interval of the difference."""
    high: float
    objects: int = 0
    """Number of true objects, for a class."""
    images: int | None = None
    """Number of images that these objects are in, for a class."""

    @property
    def is_rare(self) -> bool:
        """True for a class in so few images that its interval says nothing."""
        return self.images is not None and self.images < LEAST_IMAGES

    @property
    def difference(self) -> float:
        """Value of the second side minus that of the first."""
        return self.after - self.before

    @property
    def is_chance(self) -> bool:
        """True if the interval holds 0: other images could reverse the order of the sides."""
        return self.low <= 0 <= self.high


@dataclass(frozen=True)
class Difference:
    """Figures of two sides, each of one run or of several."""

    figures: tuple[Change, ...]
    """Changes of the figures; the first decides. Of boxes FIGURES, without sizes the first three; of segments PQ first."""
    classes: tuple[Change, ...]
    """The figure that decides of the categories, in the order of their labels."""
    before_runs: tuple[float, ...]
    """The figure that decides of each run of the first side."""
    after_runs: tuple[float, ...]
    images: int
    draws: int

    @property
    def deciding(self) -> Change:
        """The change in the figure that decides."""
        return self.figures[0]


def change(
    name: str, before: float, after: float, drawn: Floats, objects: int = 0, images: int | None = None
) -> Change:
    """Return a change with the interval of the differences in the draws; those that are NaN do not count."""
    if (
        min(before, after) < 0
    ):  # PQ of a class without truth is 0 for a side that finds some, and undefined for the other
        return Change(name, -1.0, -1.0, 0.0, 0.0, objects, images)
    defined = drawn[~np.isnan(drawn)]
    low, high = np.quantile(defined, _INTERVAL).tolist() if len(defined) else (0.0, 0.0)
    return Change(name, before, after, low, high, objects, images)


def between(sides: Sequence[Sequence[Floats]]) -> Floats:
    """Return the mean over the runs of the second side minus that of the first."""
    before, after = (np.mean(side, axis=0) for side in sides)
    return np.asarray(after - before, np.float64)


def spread(values: Sequence[float]) -> float:
    """Return the standard deviation between runs; 0 of a single one."""
    return stdev(values) if len(values) > 1 else 0.0


def interval_of_recipes(before: Sequence[float], after: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95% interval of the difference between two recipes from runs of each (Welch); None from fewer than two.

    It holds for runs with other seeds on the same images; the interval of the draws holds for these runs on other images.
    """
    if min(len(before), len(after)) < 2:
        return None
    from scipy.stats import ttest_ind

    if spread(before) == spread(after) == 0:
        return (fmean(after) - fmean(before),) * 2
    found = ttest_ind(after, before, equal_var=False).confidence_interval(0.95)
    return float(found.low), float(found.high)
