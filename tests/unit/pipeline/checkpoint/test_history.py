"""The metrics of all evaluations of a run."""

from pathlib import Path

from pipeline.checkpoint.history import Evaluated, add, read_history


def test_evaluations_are_kept_by_step_and_repeated_ones_replaced(tmp_path: Path) -> None:
    for step, ap in ((20, 0.2), (10, 0.1), (20, 0.3)):
        add(tmp_path, Evaluated(step, step / 10, {"AP": ap}, 1.5))
    assert [(entry.step, entry.metrics["AP"]) for entry in read_history(tmp_path)] == [(10, 0.1), (20, 0.3)]


def test_a_loss_that_is_not_known_is_none(tmp_path: Path) -> None:
    add(tmp_path, Evaluated(1, 1.0, {}, float("nan")))
    assert read_history(tmp_path)[0].loss is None


def test_a_missing_or_damaged_file_is_no_history(tmp_path: Path) -> None:
    assert read_history(tmp_path) == []
    add(tmp_path, Evaluated(1, 1.0, {}))
    path = tmp_path / "checkpoints" / "evaluations.json"
    path.write_bytes(path.read_bytes()[:-4])
    assert read_history(tmp_path) == []
