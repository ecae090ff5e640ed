"""A folder that some nodes do not see is found before they train."""

from pathlib import Path

from pipeline.checkpoint import visibility
from pipeline.checkpoint.location import Url
from pipeline.checkpoint.visibility import check_seen
from pipeline.distributed.ranks import Ranks
from pipeline.errors import CheckpointError
from tests.support.ranks import run_ranks


def look(ranks: Ranks, folder: Path) -> list[str]:
    """Check a file that the second rank, on a node of its own, does not see."""
    messages = []
    visibility.platform.node = lambda: f"node-{ranks.rank}"  # type: ignore[attr-defined]
    own = folder if ranks.first else folder / "elsewhere"
    for path in (folder / "shared", own / "initial"):
        try:
            check_seen(path, ranks)
            messages.append("seen")
        except CheckpointError as error:
            messages.append(str(error))
    check_seen(Url("s3://sets/runs/x/initial"), ranks)
    return messages


def test_the_nodes_that_do_not_see_a_file_are_named_on_every_rank(tmp_path: Path) -> None:
    for name in ("shared", "initial"):
        (tmp_path / name).write_text("")
    found = run_ranks(2, look, tmp_path)
    for (shared, own), path in zip(found, (tmp_path, tmp_path / "elsewhere"), strict=True):
        assert shared == "seen"
        assert own.startswith(f"{path / 'initial'} is not there on node-1; expected")
