"""Forecast of a run: its amounts at the prices of its device, as data and as lines for a person."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from pipeline.config import RunConfig
from pipeline.forecast.amounts import Amounts
from pipeline.forecast.prices import Prices
from shards.store.sizes import size_text


class RunForecast(msgspec.Struct, frozen=True, kw_only=True):
    """Forecast of a run, kept as a tag of it; without prices nobody has measured its model on its device."""

    amounts: Amounts
    checkpoint_bytes: int
    workers: int
    gpu: bool
    prices: Prices | None = None
    waited_for: int | None = None
    """Number of evaluations that training waits for; None: all."""

    @property
    def seconds(self) -> float | None:
        """Seconds from the command to its end; None if they are unknown."""
        return sum(self.uses.values()) if self.prices else None

    @property
    def span(self) -> tuple[float, float] | None:
        """Least and most seconds by each of the earlier runs alone; None if there are less than two."""
        if self.prices is None or not self.prices.each:
            return None
        sums = [sum(self._uses(price).values()) for price in self.prices.each]
        return min(sums), max(sums)

    @property
    def complete(self) -> bool:
        """True if the time of everything was measured before, so that the sum can be compared with the clock."""
        prices = self.prices
        if prices is None or prices.start_s is None:
            return False
        return prices.evaluation_s is not None or not self.amounts.evaluations

    @property
    def device_hours(self) -> float | None:
        """GPU-hours, or hours of workers on processors."""
        return None if self.seconds is None else self.seconds / 3600 * self.workers

    @property
    def uses(self) -> dict[str, float]:
        """Seconds by use, as far as they are known."""
        return self._uses(self.prices) if self.prices else {}

    def _uses(self, prices: Prices) -> dict[str, float]:
        """Return the seconds by use; of evaluations that a run did not have, those of the others."""
        amounts = self.amounts
        waits = amounts.evaluations if self.waited_for is None else self.waited_for
        evaluation_s = prices.evaluation_s
        if evaluation_s is None and self.prices is not None:
            evaluation_s = self.prices.evaluation_s
        uses = {
            "start": prices.start_s,
            "steps": amounts.steps * prices.step_s,
            "evaluations": None if evaluation_s is None else waits * evaluation_s,
            "saves": amounts.steps * prices.saves_s,
            "end": prices.end_s,
        }
        return {use: seconds for use, seconds in uses.items() if seconds is not None}

    def to_json(self) -> str:
        """Return the text of the tag."""
        return msgspec.json.encode(self).decode()

    def lines(self, *, nodes: int = 0, node_price: float | None = None) -> list[str]:
        """Return the forecast for a person; the cost needs the number of nodes and the price of an hour of one."""
        amounts = self.amounts
        kept = f"at most {amounts.kept} kept: {size_text(amounts.kept * self.checkpoint_bytes)}"
        lines = [
            ("steps", f"{amounts.steps:,} in {amounts.epochs:g} epochs"),
            ("evaluations", f"{amounts.evaluations:,} of {amounts.images:,} images"),
            ("checkpoints", f"{amounts.checkpoints:,} of {size_text(self.checkpoint_bytes)}, {kept}"),
            ("time", self._time()),
        ]
        if self.device_hours is not None:
            lines.append(("GPU-hours" if self.gpu else "worker-hours", _hours(self.device_hours)))
        if node_price is not None and self.seconds is not None:
            cost = self.seconds / 3600 * nodes * node_price
            lines.append(("cost", f"{cost:,.2f}: {nodes} nodes at {node_price:g} per hour"))
        lines.append(("by", self._source()))
        return aligned(lines)

    def _time(self) -> str:
        if self.prices is None or self.seconds is None:
            return "unknown"
        uses = ", ".join(f"{use} {duration(seconds)}" for use, seconds in self.uses.items() if seconds > 0.1)
        lacking = "" if self.complete else "; the rest was not measured"
        return f"{self.text()}: {uses}{lacking} ({self.prices.step_s:.3g} s a step)"

    def text(self) -> str:
        """Return the time for a person, with the span of the runs that it comes from: `9 min 20 s (8 min 02 s to ...)`."""
        span = self.span
        spread = f" ({duration(span[0])} to {duration(span[1])} by each)" if span else ""
        return f"{duration(self.seconds or 0.0)}{spread}"

    def _source(self) -> str:
        if self.prices:
            device = "" if self.prices.device in self.prices.source else f", on {self.prices.device}"
            return f"{self.prices.source}{device}"
        return (
            "nothing: neither a run of yours with this recipe, model, workers and device in MLflow, nor a figure of this "
            "package; `--optim.max-steps 200 --evaluate.limit 100` measures one"
        )


def forecast(
    config: RunConfig, amounts: Amounts, checkpoint_bytes: int, prices: Prices | None, *, gpu: bool
) -> RunForecast:
    """Return the forecast of a run; evaluations in the background take no time of training, except for the last."""
    return RunForecast(
        amounts=amounts,
        checkpoint_bytes=checkpoint_bytes,
        workers=config.cluster.workers,
        gpu=gpu,
        prices=prices,
        waited_for=min(amounts.evaluations, 1) if config.evaluate.asynchronous else None,
    )


def aligned(lines: Sequence[tuple[str, str]]) -> list[str]:
    """Return names and values in two columns."""
    width = max(len(name) for name, _ in lines)
    return [f"{name.ljust(width)}  {value}" for name, value in lines]


def duration(seconds: float) -> str:
    """Return seconds as text for a person: `41 s`, `12 min 40 s`, `5 h 02 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.3g} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600:,} h {whole // 60 % 60:02} min"


def _hours(hours: float) -> str:
    return f"{hours:,.2f}" if hours < 100 else f"{hours:,.0f}"
