"""Patience with a store that does not answer: training outlives an outage of minutes, and every rank decides alike."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from pipeline.distributed.ranks import Ranks
from pipeline.errors import Postponed
from shards.errors import one_line
from shards.store.retry import StoreError

LOG = logging.getLogger(__name__)
T = TypeVar("T")

PATIENCE_S = 30 * 60.0
"""Time after which a run without its store ends: incidents of stores and networks take minutes, and in half an hour a
large cluster computes more than anyone wants to repeat, or stands idle at an evaluation."""
AGAIN_S = 10.0
"""Pause between two attempts, each of which has made the store's own retries for half a minute."""


class Patience:
    """Time for which a store has not answered. Every rank must call the same methods in the same order."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._since: float | None = None

    def failed(self, error: StoreError, consequence: str) -> None:
        """Warn about the first failure of an outage; raise `Postponed` on every rank if it is too long.

        A collective call.
        """
        now = time.monotonic()
        first, self._since = self._since is None, self._since or now
        if self._ranks.broadcast(now - self._since >= PATIENCE_S):
            raise Postponed(
                f"the store has not answered for {PATIENCE_S / 60:.0f} minutes ({one_line(error)}); earlier checkpoints "
                "are intact: restore the store or the access to it, then give the same command again"
            ) from error
        if first and self._ranks.first:
            LOG.warning("%s; %s, for at most %.0f minutes", one_line(error), consequence, PATIENCE_S / 60)

    def answered(self) -> None:
        """Record that the store has answered."""
        if self._since is not None and self._ranks.first:
            LOG.warning("the store answers again, after %.0f s", time.monotonic() - self._since)
        self._since = None


def patiently(ranks: Ranks, act: Callable[[], T]) -> T:
    """Return `act()`, called again while it raises `StoreError`; a collective call.

    `act` must raise it on every rank or on none. Raise `Postponed` when patience is over.
    """
    patience = Patience(ranks)
    while True:
        try:
            result = act()
        except StoreError as error:
            patience.failed(error, "training waits for the store")
            time.sleep(AGAIN_S)
        else:
            patience.answered()
            return result
