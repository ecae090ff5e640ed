"""Records of the training steps of real workers, written in their processes by `tests/support/recorder`."""

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

RECORDER = str(Path(__file__).with_name("recorder"))


class Line(NamedTuple):
    """Record of one rank's step. group: equal for the ranks of one attempt; since: start time of its process."""

    step: int
    rank: int
    ranks: int
    group: str
    since: float
    loss: float
    ids: tuple[int, ...]


class Kept(NamedTuple):
    """A step as the run keeps it. A step that was repeated after a failure counts as it was taken last."""

    ranks: int
    ids: list[int]
    loss: float


class Recording:
    """Folder into which the workers of a command write their steps."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    @property
    def environment(self) -> dict[str, str]:
        """For the processes in which workers start, or for Ray's nodes."""
        path = os.pathsep.join([RECORDER, str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
        return {"DETR_RECORD": str(self.folder), "PYTHONPATH": path.rstrip(os.pathsep)}

    def pace(self, seconds: float) -> None:
        """Let each step take at least this long from now on."""
        aside = self.folder / "pace.aside"
        aside.write_text(str(seconds))
        aside.rename(self.folder / "pace")

    def fail(self, rank: int, message: str) -> None:
        """Let this rank raise an error before each step from now on."""
        (self.folder / f"fail-{rank}").write_text(message)

    def lines(self) -> list[Line]:
        """All that was noted, whole lines only."""
        found = []
        for path in self.folder.glob("[0-9]*"):
            for line in path.read_text().splitlines(keepends=True):
                if line.endswith("\n"):
                    step, rank, ranks, group, since, loss, ids = line.rstrip("\n").split(" ")
                    numbers = tuple(int(one) for one in ids.split(",") if one)
                    found.append(Line(int(step), int(rank), int(ranks), group, float(since), float(loss), numbers))
        return found

    def last(self) -> tuple[int, int]:
        """(step, number of workers) of the newest group's last step; (-1, 0) before the first."""
        lines = self.lines()
        if not lines:
            return -1, 0
        newest = max(lines, key=lambda line: line.since).group
        step = max(line.step for line in lines if line.group == newest)
        return step, next(line.ranks for line in lines if line.group == newest)

    def kept(self) -> list[Kept]:
        """Every step in order, as the last group that took it did."""
        groups: dict[str, float] = {}
        for line in self.lines():
            groups[line.group] = max(line.since, groups.get(line.group, 0.0))
        steps: dict[int, list[Line]] = {}
        for line in sorted(self.lines(), key=lambda line: groups[line.group]):
            before = steps.setdefault(line.step, [])
            if before and before[0].group != line.group:
                before.clear()
            before.append(line)
        assert sorted(steps) == list(range(len(steps)))
        kept = []
        for step in range(len(steps)):
            lines = sorted(steps[step], key=lambda line: line.rank)
            assert [line.rank for line in lines] == list(range(lines[0].ranks)), f"step {step} is not whole: {lines}"
            ids = [number for line in lines for number in line.ids]
            kept.append(Kept(len(lines), ids, sum(line.loss for line in lines) / len(lines)))
        return kept


def seen_per_epoch(kept: Iterable[Kept], images: int) -> list[Counter[int]]:
    """How often each id was used in each epoch; the global batch divides the number of images."""
    stream = [number for one in kept for number in one.ids]
    return [Counter(stream[start : start + images]) for start in range(0, len(stream), images)]
