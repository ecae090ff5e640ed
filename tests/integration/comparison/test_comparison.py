"""A run and its version, compared by what its evaluation has kept."""

import msgspec
import pytest
from PIL import Image

from jobs.commands.compare import compare as compare_command
from jobs.commands.compare import promote as promote_command
from jobs.commands.models import evaluate as evaluate_command
from pipeline.checkpoint import catalog
from pipeline.config import RunConfig
from pipeline.evaluation.kept import KEPT_NAME
from pipeline.registry.kept_detections import stored
from pipeline.registry.registration import register, register_run
from shards.dataset.manifest import load_manifest
from tests.support.registry import Trained, train_in


@pytest.fixture(scope="module")
def trained(shared_store: str, short_config: RunConfig) -> Trained:
    from pathlib import Path

    found = train_in(Path(shared_store.removeprefix("sqlite:///")).parent, short_config)
    register_run(found.run_id, name="tiny", alias="best")
    return found


def test_a_run_keeps_the_detections_of_its_evaluation_and_a_version_outlives_them(trained: Trained) -> None:
    best = catalog.best(trained.folder)
    assert best is not None
    assert (best[0] / KEPT_NAME).exists()
    assert list(stored(trained.client, trained.run_id, 1)) == [load_manifest(trained.config.data.val).digest[:16]]


def test_a_run_and_its_version_are_compared_without_data(trained: Trained, tmp_path, capsys) -> None:
    picture, figures = tmp_path / "p.png", tmp_path / "f.json"
    compare_command(["tiny", "models:/tiny@best", "--picture", str(picture), "--json", str(figures)])
    shown = capsys.readouterr().out
    assert "before  tiny\nafter   models:/tiny/1\non      " in shown
    assert "within chance" in shown
    with Image.open(picture) as opened:
        assert opened.width > 1000
    written = msgspec.json.decode(figures.read_bytes())
    best = catalog.best(trained.folder)
    assert best is not None
    assert written["difference"]["figures"][0]["after"] == best[1]["AP"]


def test_an_evaluation_of_a_version_is_kept(trained: Trained, capsys) -> None:
    evaluate_command(["models:/tiny/1", "--data", trained.config.data.train])
    assert len(stored(trained.client, trained.run_id, 1)) == 2
    assert "warning" not in capsys.readouterr().err
    compare_command(["models:/tiny/1", "models:/tiny/1", "--data", trained.config.data.train])


def test_a_version_of_the_best_model_says_that_it_is_within_chance(
    trained: Trained, tmp_path, short_config: RunConfig
) -> None:
    other = train_in(tmp_path, short_config)
    best = catalog.best(other.folder)
    assert best is not None
    done = register(other.client, other.run_id, other.config, *best, name="tiny", alias="best", only_if_better=True)
    assert done.note.startswith("AP +0.0000 against version 1, 95% interval +0.0000 to +0.0000 on ")
    assert done.note.endswith("within chance")
    assert other.client.get_model_version("tiny", done.version).tags["change.best"] == done.note


def test_the_first_promotion_is_reported(trained: Trained, capsys) -> None:
    promote_command(["models:/tiny/1", "--alias", "production"])
    promote_command(["models:/tiny/1", "--alias", "production"])
    assert capsys.readouterr().out == (
        "@production is models:/tiny/1 now; before: no version\n@production is models:/tiny/1 already\n"
    )
