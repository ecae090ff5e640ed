"""Description of a version, and the same as text."""

from collections.abc import Mapping
from dataclasses import replace

import msgspec
import pytest

from pipeline.config import RunConfig
from pipeline.registry.description import MOST_TEXT, describe_model, describe_version
from pipeline.registry.facts import Figures, VersionFacts
from pipeline.registry.lineage import lineage_text, version_text
from pipeline.tracking.pages.data import ClassCount, DataSet

DATA = DataSet(
    name="cats",
    digest="d" * 64,
    url="/data/cats",
    images=3,
    objects=1205,
    classes=2,
    source_digest="a" * 64,
    corrections_digest="c" * 64,
    corrections={"relabel": 2, "delete": 1},
    by_class=(ClassCount("cat", 5, 2), ClassCount("dog", 1200, 3)),
)
FACTS = VersionFacts(
    name="detr-x",
    version="2",
    aliases=("best",),
    tags={"step": "3000", "epoch": "12", "checkpoint_uri": "/runs/x/step", "change.best": "AP +0.01 against version 1"},
    model_id="m-1",
    run_id="0123456789abcdef",
    run_name="x",
    experiment_id="1",
    commit="f28a0d6bf2de86cb1fe0a3d2660b0572614e8997",
    repository="https://example.org/x",
    config=RunConfig(recipe="detr-r50"),
    initial_weights="the backbone starts from ImageNet",
    data=(("training", DATA), ("validation", msgspec.structs.replace(DATA, corrections_digest="", corrections={}))),
    figures=(Figures("cats", "d" * 36, "0123456789abcdef", {"AP": 0.5, "AP50": 0.71234, "APl": -1.0}),),
)
IMPORTED = replace(FACTS, name="paper", version="1", tags={"imported_from": "x.pth sha256:12"}, config=None, figures=())


def shown(facts: VersionFacts, pictures: Mapping[str, str]) -> str:
    """Return the description without the gaps between columns."""
    return describe_version(facts, pictures).replace("&nbsp;", "")


def test_a_version_says_how_good_it_is_and_from_what() -> None:
    text = shown(FACTS, {"precision over recall": "images/a+b.webp"})
    for wanted in (
        "Checkpoint of step 3,000, epoch 12 of 300, of the run [x](#/experiments/1/runs/0123456789abcdef?",
        "| **cats** | 0.500 | 0.712 | - | - | - | - | - |",
        "- AP +0.01 against version 1",
        "![precision over recall](get-artifact?path=images%2Fa%2Bb.webp&run_uuid=0123456789abcdef)",
        "3 images, 1,205 objects, 2 classes (dog 1,200, cat 5); digest `dddddddddddd`, made from annotations `aaaaaaaaaaaa`",
        "with corrections: 1 delete, 2 relabel, `cccccccccccc`",
        "[`f28a0d6bf2de`](https://example.org/x/commit/f28a0d6bf2de86cb1fe0a3d2660b0572614e8997)",
        "detr evaluate models:/detr-x/2 --data /data/cats",
        "detr resume 01234567 --epochs 600",
    ):
        assert wanted in text, wanted


def test_a_version_links_the_one_that_it_started_from_and_an_imported_one_its_file() -> None:
    assert "started from | [models:/paper/1](#/models/paper/versions/1)" in describe_version(
        replace(FACTS, parent=IMPORTED), {}
    )
    text = describe_version(IMPORTED, {})
    assert text.startswith("Imported from x.pth, sha256 `12`, as the run [x](")
    assert "detr resume" not in text
    assert "Not evaluated yet" in text


def test_figures_of_masks_have_a_row_of_their_own() -> None:
    figures = Figures("cats", "d", "other", {"AP": 0.5, "mask_AP": 0.4})
    text = shown(replace(FACTS, figures=(figures,)), {})
    assert "`d` | 0.500 | -" in text
    assert "`d`, masks | 0.400 | -" in text
    assert "cats evaluated  cats evaluated masks" in version_text(replace(FACTS, figures=(figures,)))


@pytest.mark.parametrize("url", ["/data/cats", "/data/" + "cats" * 200])
def test_a_description_fits_and_keeps_its_commands(url: str) -> None:
    many = msgspec.structs.replace(
        DATA, url=url, by_class=tuple(ClassCount(f"class of a long name {label}", label, 1) for label in range(1203))
    )
    figures = tuple(Figures(f"data set {number}", "d" * 36, f"{number:032}", {"AP": 0.5}) for number in range(30))
    text = describe_version(replace(FACTS, data=(("training", many), ("validation", many)), figures=figures), {})
    assert len(text) <= MOST_TEXT
    assert text.count("```") % 2 == 0
    assert "detr predict" in text or len(url) > 100
    assert len(describe_model(FACTS)) <= MOST_TEXT


def test_the_lineage_is_that_of_each_version_down_to_the_first() -> None:
    blocks = lineage_text(replace(FACTS, parent=replace(IMPORTED, data=()))).split("\n\n")
    first, second = (" ".join(block.split()) for block in blocks)
    assert first.startswith("models:/detr-x/2 @best: AP 0.500 on cats checkpoint of step 3,000, epoch 12")
    assert f"annotations sha256 {'a' * 64} corrections sha256 {'c' * 64}; corrections: 1 delete, 2 relabel" in first
    assert "classes dog 1,200 in 3 images, cat 5 in 2 images" in first
    assert "started from models:/paper/1" in first
    assert second.startswith("models:/paper/1 @best imported from x.pth sha256:12")


def test_a_version_that_the_registry_has_lost_is_named() -> None:
    assert "models:/gone/1, which the registry no longer has" in lineage_text(
        replace(FACTS, lost_parent="models:/gone/1")
    )
