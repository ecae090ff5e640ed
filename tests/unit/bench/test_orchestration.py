"""The bench runs on demand only: that what it replaces in a real run is still there is seen here."""

from unittest.mock import patch

from tests.bench.orchestration import LOOPS_BATCHES, RAYS_WORKER


def test_what_the_bench_replaces_exists() -> None:
    with patch(RAYS_WORKER), patch(LOOPS_BATCHES):
        pass
