"""Dry runs, and the command line of a sweep."""

from pathlib import Path

import pytest

from tests.support.in_process import Detr
from tests.support.tiny_data import TinyData


def test_a_dry_run_forecasts_and_leaves_nothing(detr: Detr, tiny_data: TinyData, tmp_path: Path) -> None:
    words = ["train", "demo", "--data.train", tiny_data.train, "--data.val", tiny_data.val, "--dry-run"]
    result = detr(*words)
    assert (result.status, result.err) == (0, "")
    lines = dict(line.split(maxsplit=1) for line in result.out.splitlines())
    assert lines["steps"] == "9 in 12 epochs"
    assert lines["evaluations"] == "4 of 5 images"
    assert "a figure of this package" in lines["by"]
    assert list(tmp_path.glob("*.db")) == []
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_tells_the_share_of_passes_with_a_graph(detr: Detr, tiny_data: TinyData) -> None:
    words = ["train", "demo", "--data.train", tiny_data.train, "--data.val", tiny_data.val, "--compute.graphs"]
    result = detr(*words, "--cluster.gpu", "auto", "--compute.canvas-multiple", "256", "--dry-run")
    assert "CUDA graphs for 1 of 1 canvases, expected for 100.0% of the passes" in result.out


def test_a_dry_run_of_a_sweep_forecasts_each_trial(detr: Detr, tiny_data: TinyData, tmp_path: Path) -> None:
    data = ["--data.train", tiny_data.train, "--data.val", tiny_data.val]
    result = detr("sweep", "it", "demo", "--optim.epochs", "4,12", *data, "--optim.decay-epoch", "2", "--dry-run")
    assert (result.status, result.err) == (0, "")
    rows = [line.split() for line in result.out.splitlines()]
    assert [row[:2] for row in rows[2:4]] == [["it-epochs=4", "3"], ["it-epochs=12", "9"]]
    assert rows[4][:6] == ["all,", "one", "after", "the", "other", "1"]  # minute and some, by a figure of this package
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["it", "nope", "--seed", "1,2"], "there is no recipe or sweep 'nope'"),
        (["it", "demo", "--sed", "1,2"], "did you mean --seed?"),
        (["it", "demo", "--seed", "1,x"], "--seed"),
        (["it", "demo", "--seed", "1,2", "--metric", "val/PA"], "did you mean val/AP?"),
        (["it", "demo", "--seed", "1,2", "--reduction", "1"], "--reduction above 1"),
        (["it", "demo", "--storage", "a,b"], "the trials differ in storage"),
        (["it", "losses", "--seed", "1,2"], "losses has its own trials"),
        (["it", "demo", "--seed", "1,2", "--smoke"], "starts no training"),
    ],
)
def test_mistakes_in_a_sweep_are_refused_before_anything_starts(words: list[str], problem: str, detr: Detr) -> None:
    result = detr("sweep", *words)
    assert result.status == 2
    assert problem in result.line


def test_the_paper_s_ablations_are_listed_with_their_figures(detr: Detr) -> None:
    listed = detr("sweep", "--list").out
    assert "Number of encoder layers: recipe detr-r50" in listed
    rows = [line.split() for line in detr("sweep", "--show", "encoder-layers").out.splitlines()]
    assert [row[:2] for row in rows[3:7]] == [["0", "36.7"], ["3", "40.1"], ["6", "40.6"], ["12", "41.6"]]
