"""Notes of a run without Ray."""

import pytest

from pipeline.cluster.notes.notes import Notes
from tests.support.notes import memory_notes


@pytest.fixture
def notes() -> Notes:
    """Notes of a new run, in this process."""
    return memory_notes()
