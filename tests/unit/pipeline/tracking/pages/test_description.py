"""The description of a run, as its page shows it."""

from dataclasses import replace
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.config import RunConfig
from pipeline.recipes import RECIPES
from pipeline.tracking.pages.description import MOST_TEXT, Scored, describe
from pipeline.tracking.tags import (
    TAG_COMMIT,
    TAG_DATA_WAIT,
    TAG_EPOCHS,
    TAG_HARDWARE,
    TAG_LEFT_OUT,
    TAG_PHASE,
    TAG_PROGRESS,
    TAG_TOTAL_STEPS,
)

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
DEMO = RECIPES["demo"]
SCORES = [Scored(750, 3.0, {"AP": 0.25, "AP50": 0.5}), Scored(1500, 6.0, {"AP": 0.2, "AP50": 0.45})]


def described(config: RunConfig = DEMO, scores: Any = SCORES, versions: Any = (), **tags: str) -> str:
    progress = {TAG_TOTAL_STEPS: "3000", TAG_EPOCHS: "12", TAG_PHASE: "training"}
    progress[TAG_PROGRESS] = '{"step":2300,"epoch":9.2,"end":"2026-03-01T13:30:00+00:00"}'
    profile = '{"images":4000,"objects":12034,"classes":4,"digest":"0123456789abcdef"}'
    dataset = SimpleNamespace(name="train", digest="0123", source='{"uri":"/data/train"}', profile=profile, schema=None)
    context = [SimpleNamespace(key="mlflow.data.context", value="training")]
    run: Any = SimpleNamespace(
        info=SimpleNamespace(experiment_id="7", run_id="3fc8760d" * 4, end_time=NOW.timestamp() * 1000),
        data=SimpleNamespace(tags=progress | tags),
        inputs=SimpleNamespace(dataset_inputs=[SimpleNamespace(dataset=dataset, tags=context)]),
    )
    return describe(run, config, scores, versions, NOW)


def test_it_says_how_far_the_run_is_and_when_it_ends() -> None:
    text = described()
    first = text.partition("\n")[0]
    assert "**Training**; epoch 9.2 of 12, step 2,300 of 3,000; ends about 2026-03-01 13:30 UTC; `detr resume" in first
    assert "**Finished**; epoch 9.2" in described(**{TAG_PHASE: "finished"})
    assert "the forecast of its end has passed" in described(
        **{TAG_PROGRESS: '{"step":1,"epoch":1,"end":"2026-03-01T11:00:00+00:00"}'}
    )
    assert "ended 2026-03-01 12:00 UTC" in described(**{TAG_PHASE: "stopped"})


def test_it_says_how_good_the_run_is_now_and_was_at_best() -> None:
    text = described()
    assert text.startswith("**AP 0.250** at best (epoch 3), 0.200 now.")
    assert "| newest | 0.200 | 0.450 | 6 | 1,500 |" in text
    assert "| **best** | 0.250 | 0.500 | 3 | 750 |" in text
    assert "| **newest and best** | 0.250 |" in described(scores=SCORES[:1])
    assert "Not evaluated yet" in described(scores=[])


def test_masks_decide_what_is_best() -> None:
    scores = [Scored(1, 1.0, {"AP": 0.3, "mask_AP": 0.1}), Scored(2, 2.0, {"AP": 0.2, "mask_AP": 0.2})]
    assert "| **newest and best** | 0.200 | 0.200 |" in described(scores=scores)


def test_it_names_data_recipe_and_code() -> None:
    config = replace(DEMO, optim=replace(DEMO.optim, lr=0.002))
    text = described(config, **{TAG_COMMIT: "f28a0d6bf2de86cb1f-dirty", TAG_HARDWARE: "2 workers, a: 2 on CPU"})
    assert (
        "| training data | train, 4,000 images, 12,034 objects, 4 classes, digest `0123456789ab`, /data/train |" in text
    )
    assert "| recipe | `demo` with optim.lr 0.002 (recipe: 0.001) |" in text
    assert "| code | commit `f28a0d6bf2de` with uncommitted changes |" in text
    assert "| hardware | 2 workers, a: 2 on CPU |" in text
    assert "| recipe | `demo`, unchanged |" in described()


def test_it_lists_what_warned() -> None:
    assert "No warnings." in described()
    assert "**1 warning**, below." in described(**{TAG_DATA_WAIT: "x"})
    text = described(**{TAG_DATA_WAIT: "worker 1 waits | long", TAG_LEFT_OUT: "2 training images: a, b"})
    assert "- worker 1 waits / long" in text
    assert "- left out: 2 training images: a, b" in text


def test_its_commands_use_the_version_once_there_is_one() -> None:
    before, after = described(), described(versions=["detr-demo/3"])
    assert "detr resume 3fc8760d " in before
    assert "detr register 3fc8760d --name detr-demo" in before
    assert "detr register" not in after
    assert "detr evaluate models:/detr-demo/3 --data" in after


def test_pictures_and_links_are_relative_to_the_page() -> None:
    text = described()
    run_id = "3fc8760d" * 4
    assert (
        f"](get-artifact?path=images%2FAt_a_glance~detections%2Bstep%2B0%2Btimestamp%2B0%2Bnewest%2Bcompressed.webp&run_uuid={run_id})"
        in text
    )
    assert f"(#/experiments/7/runs/{run_id}/artifacts/report.html?workflowType=machine_learning)" in text
    assert "get-artifact" not in described(scores=[])


@pytest.mark.parametrize("length", [10, 10_000])
def test_it_is_never_longer_than_a_tag_may_be_and_keeps_its_commands(length: int) -> None:
    text = described(**{TAG_DATA_WAIT: "w" * length, TAG_HARDWARE: "h" * length, TAG_LEFT_OUT: "x" * length})
    assert len(text) <= MOST_TEXT
    commands = described().split("```")[1]
    assert text.split("```")[1] == commands
    assert text.endswith("UTC.*")
