import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import RunConfig
from pipeline.driver import initial_weights
from pipeline.driver.preflight import check, prepare
from pipeline.errors import RunConfigError
from pipeline.recipes import RECIPES, uses_built_in
from shards.config import WriteConfig
from shards.dataset.manifest import load_manifest
from shards.errors import ShardError
from shards.write.writer import write_coco
from tests.support.panoptic_data import make_panoptic


def relabelled(tiny_data: Any, tmp_path: Path, categories: list[dict[str, object]]) -> str:
    coco = json.loads((tiny_data.root / "coco" / "annotations" / "instances_val.json").read_text())
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(coco | {"categories": categories}))
    return write_coco(tiny_data.root / "coco" / "val", path, tmp_path / "val", WriteConfig()).url


def test_a_prepared_run_reports_its_initial_weights(tiny_config: RunConfig) -> None:
    lines: list[str] = []
    config, ready = prepare(tiny_config, lines.append)
    assert config == tiny_config
    assert ready.train == load_manifest(tiny_config.data.train)
    assert ready.schedule.total_steps == 6
    assert lines == ["the backbone starts from random weights, as asked"] == list(ready.notes)


def test_a_backbone_other_than_the_demo_s_needs_its_own_weights(tiny_config: RunConfig) -> None:
    small = replace(RECIPES["small"], data=tiny_config.data)
    other = replace(small, model=replace(small.model, backbone="resnet18"))
    assert (uses_built_in(small), uses_built_in(other)) == (True, False)
    check(small)
    with pytest.raises(RunConfigError, match=r"'resnet18' and .* add --model\.backbone-weights imagenet"):
        check(other)
    check(replace(other, model=replace(other.model, backbone_weights="imagenet")))


@pytest.mark.parametrize(("tail", "steps"), [("straddle", 8), ("short", 9)])
def test_the_reported_number_of_steps_is_taken(tiny_config: RunConfig, tail: Any, steps: int) -> None:
    config = replace(
        tiny_config,
        data=replace(tiny_config.data, epoch_tail=tail),
        optim=replace(tiny_config.optim, batch_size=5, epochs=3),
    )
    _, ready = prepare(config, lambda line: None)
    assert ready.schedule.total_steps == steps


def test_paths_become_absolute(tiny_config: RunConfig, tiny_data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny_data.root)
    relative = replace(tiny_config, data=replace(tiny_config.data, train="train", val="./val"), storage="runs")
    config, _ = prepare(relative, lambda line: None)
    assert (config.data.train, config.data.val) == (tiny_data.train, tiny_data.val)
    assert config.storage == str(tiny_data.root / "runs")


@pytest.mark.parametrize(("given", "meant"), [("kept", "{}/kept"), ("~/kept", "~/kept"), ("off", "off"), ("", "")])
def test_the_cache_folder_becomes_absolute_except_below_home(
    tiny_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, meant: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    config, _ = prepare(replace(tiny_config, data=replace(tiny_config.data, cache=given)), lambda line: None)
    assert config.data.cache == meant.format(tmp_path)
    assert (tmp_path / "kept").exists() == ("kept" in given)


def test_data_sets_with_different_categories_are_refused(
    tiny_config: RunConfig, tiny_data: Any, tmp_path: Path
) -> None:
    names = ["circle", "square", "hexagon", "cross"]
    val = relabelled(tiny_data, tmp_path, [{"id": i, "name": name} for i, name in enumerate(names, start=1)])
    config = replace(tiny_config, data=replace(tiny_config.data, val=val))
    with pytest.raises(RunConfigError, match=r"differ in 2 categories, such as 3 '(hexagon|triangle)'") as caught:
        prepare(config, lambda line: None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["color", "isthing"])
def test_data_sets_may_differ_in_colours_but_not_in_things(tiny_config: RunConfig, tmp_path: Path, field: str) -> None:
    source = make_panoptic(tmp_path)
    train = source.write("train").url
    source.data["categories"][1][field] = {"color": [1, 2, 3], "isthing": 0}[field]
    config = replace(tiny_config, data=replace(tiny_config.data, train=train, val=source.write("val").url))
    refused = pytest.raises(RunConfigError, match="differ in 2 categories, such as 1 'person'")
    with refused if field == "isthing" else nullcontext():
        check(config)


@pytest.mark.parametrize("recipe", ["demo-panoptic", "detr-r50-panoptic-boxes"])
def test_a_panoptic_recipe_refuses_data_of_boxes(tiny_config: RunConfig, tmp_path: Path, recipe: str) -> None:
    config = replace(tiny_config, recipe=recipe)
    with pytest.raises(RunConfigError, match=f"is data of boxes; {recipe} expects panoptic data") as caught:
        check(config)
    assert "\n" not in str(caught.value)
    url = make_panoptic(tmp_path).write().url
    check(replace(config, data=replace(config.data, train=url, val=url)))


def test_fewer_queries_than_boxes_give_a_warning(tiny_config: RunConfig) -> None:
    boxes = load_manifest(tiny_config.data.train).index().boxes_per_image
    queries = int(boxes.max()) - 1
    lost = int((boxes - queries).clip(min=0).sum())
    images = int((boxes > queries).sum())
    assert lost > 0
    lines: list[str] = []
    prepare(replace(tiny_config, model=replace(tiny_config.model, num_queries=queries)), lines.append)
    warning = lines[0]
    assert warning.startswith(f"warning: {lost} boxes in {images} training images cannot be matched")
    assert f"model.num_queries is {queries}" in warning


def test_as_many_queries_as_boxes_give_no_warning(tiny_config: RunConfig) -> None:
    queries = load_manifest(tiny_config.data.train).index().max_boxes
    lines: list[str] = []
    prepare(replace(tiny_config, model=replace(tiny_config.model, num_queries=queries)), lines.append)
    assert not any("warning" in line for line in lines)


def test_missing_data_gives_one_line(tiny_config: RunConfig, tmp_path: Path) -> None:
    config = replace(tiny_config, data=replace(tiny_config.data, val=str(tmp_path / "nowhere")))
    with pytest.raises(ShardError, match=r"nowhere: no manifest\.json here") as caught:
        prepare(config, lambda line: None)
    assert "\n" not in str(caught.value)


def test_finetuning_without_initial_weights_is_refused(tiny_config: RunConfig) -> None:
    for check_it in (check, lambda config: prepare(config, lambda line: None)):
        with pytest.raises(RunConfigError, match="finetune needs --initial models:/NAME@ALIAS or FILE"):
            check_it(replace(tiny_config, recipe="finetune"))


def test_a_mask_head_without_a_detector_is_refused(masks_config: RunConfig) -> None:
    config = replace(masks_config, optim=replace(masks_config.optim, train="mask_head"))
    for check_it in (check, lambda config: prepare(config, lambda line: None)):
        with pytest.raises(RunConfigError, match=r"no detector to put it on.*--initial models:/NAME@ALIAS") as caught:
            check_it(config)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("which", ["train", "val"])
def test_masks_on_data_without_segmentations_are_refused(
    masks_config: RunConfig, tiny_data: Any, tmp_path: Path, which: str
) -> None:
    coco = json.loads((tiny_data.root / "coco" / "annotations" / f"instances_{which}.json").read_text())
    for annotation in coco["annotations"]:
        del annotation["segmentation"]
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(coco))
    url = write_coco(tiny_data.root / "coco" / which, path, tmp_path / "out", WriteConfig()).url
    config = replace(masks_config, data=replace(masks_config.data, **{which: url}))
    for check_it in (check, lambda config: prepare(config, lambda line: None)):
        with pytest.raises(
            ShardError, match=r"image \d+ in shard-000000.tar: annotation \d+ has no segmentation"
        ) as caught:
            check_it(config)
        assert "\n" not in str(caught.value)
    check(replace(config, model=replace(config.model, masks=False)))


def test_check_builds_no_model(tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(initial_weights, "initial_model", lambda *_: pytest.fail("made a model"))
    check(tiny_config)


def test_the_initial_weights_are_written_into_the_run_folder(tiny_config: RunConfig, tmp_path: Path) -> None:
    _, ready = prepare(tiny_config, lambda line: None)
    ready.write_initial_weights(tmp_path / "runs" / "one")
    assert [path.name for path in (tmp_path / "runs" / "one").iterdir()] == ["initial.safetensors"]


def test_the_share_of_passes_with_a_graph_is_known_before_training(tiny_config: RunConfig) -> None:
    config = replace(tiny_config, compute=replace(tiny_config.compute, graphs=True, canvas_multiple=64))
    lines: list[str] = []
    prepare(config, lines.append)
    assert lines[-1].startswith("CUDA graphs for 1 of 1 canvases, expected for 100.0% of the passes")
