"""A run in a store of a test's own."""

from pathlib import Path

import pytest

from pipeline.config import RunConfig
from tests.support.registry import Trained, train_in


@pytest.fixture
def own(store: str, short_config: RunConfig, tmp_path: Path) -> Trained:
    """For tests that change it."""
    return train_in(tmp_path, short_config)
