"""A rank that is missing from a collective is named with its position, and the wait ends."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from pipeline.cluster.hang_watch import HangWatch
from pipeline.cluster.notes import attempts
from pipeline.cluster.notes.notes import Notes
from pipeline.distributed.ranks import Ranks, on_first
from tests.support.notes import FolderNotes
from tests.support.ranks import run_ranks

_TIMEOUT_S = 2.0


def meet(ranks: Ranks, notes: Notes, how: str) -> str:
    """Return the first rank's error in a sum that misses the second rank."""
    pids = ranks.all_gather(os.getpid())
    group = Ranks(ranks.rank, ranks.world_size, timeout_s=_TIMEOUT_S).with_new_group()
    watch = HangWatch(notes, ranks.rank, ranks.world_size, _TIMEOUT_S)
    watch.stepped(5)
    message = ""
    if not ranks.first:
        if how == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            on_first(Ranks(), lambda: time.sleep(1.5 * _TIMEOUT_S))
    else:
        try:
            group.sum(torch.ones(1))
        except RuntimeError as error:
            message = str(error)
        os.kill(pids[1], signal.SIGCONT)
    watch.close()
    return message


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ("busy", "worker 1 hangs in on_first (pipeline/distributed/ranks.py:"),
        ("stopped", "worker 1 does not respond"),
    ],
)
def test_the_missing_rank_is_named(tmp_path: Path, how: str, named: str) -> None:
    notes = Notes.of_run("run", FolderNotes(tmp_path))
    attempts.start_attempt(notes, 2)
    message, _ = run_ranks(2, meet, notes, how)
    assert f"imed out waiting {_TIMEOUT_S * 1000:.0f}ms" in message
    reason = attempts.end_reason(notes)
    assert reason is not None
    assert reason.why.startswith(named)
    assert reason.why.endswith("the last was step 5")
