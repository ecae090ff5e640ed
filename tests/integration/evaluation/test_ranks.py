"""Evaluation and training do not depend on the number of processes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from detr.model import build_model
from pipeline.checkpoint import catalog
from pipeline.checkpoint import state as checkpoint_state
from pipeline.checkpoint.metadata import read_meta
from pipeline.config import RunConfig
from pipeline.distributed.ranks import Ranks
from pipeline.evaluation.evaluate_model import EvaluateOptions, evaluate_model
from pipeline.training.loop import run
from pipeline.training.model import save_initial
from pipeline.training.state import RunInfo
from shards.dataset.manifest import load_manifest
from tests.support.ranks import run_ranks

Evaluated = tuple[dict[str, float], np.ndarray, np.ndarray, np.ndarray | None] | None


def evaluated(ranks: Ranks, config: RunConfig, limit: int = 0) -> Evaluated:
    torch.manual_seed(0)
    model = build_model(config.model, 4)
    val = load_manifest(config.data.val)
    options = EvaluateOptions(config.transform, batch_size=2, threads=1, limit=limit)
    found = evaluate_model(model, val, val.categories, options, ranks=ranks)
    if found is None:
        return None
    detections = found.detections
    return found.score.metrics, detections.image_ids, detections.boxes_xywh, detections.masks


def test_metrics_do_not_depend_on_the_number_of_ranks(tiny_config: RunConfig) -> None:
    expected = evaluated(Ranks(), tiny_config)
    assert expected is not None
    first, second = run_ranks(2, evaluated, tiny_config)
    assert second is None
    assert first[0] == expected[0]
    np.testing.assert_array_equal(first[1], expected[1])
    np.testing.assert_array_equal(first[2], expected[2])
    images = load_manifest(tiny_config.data.val).index().images["image_id"]
    queries = tiny_config.model.num_queries
    np.testing.assert_array_equal(first[1], np.repeat(np.sort(images), queries))


def test_masks_are_gathered_over_the_ranks(masks_config: RunConfig) -> None:
    expected = evaluated(Ranks(), masks_config)
    assert expected is not None
    found = run_ranks(2, evaluated, masks_config)[0]
    assert len(expected[0]) == 24
    assert found[0] == expected[0]
    assert found[3].tolist() == expected[3].tolist()
    assert len(set(expected[3])) >= 5  # random weights give masks, and each image others
    # One batch, so that the second rank has neither images nor masks.
    few = evaluated(Ranks(), masks_config, 2)
    assert few is not None
    assert run_ranks(2, evaluated, masks_config, 2)[0][3].tolist() == few[3].tolist()


def test_ranks_without_a_batch_take_part(tiny_config: RunConfig) -> None:
    # Five images in batches of two: the fourth rank has none.
    expected = evaluated(Ranks(), tiny_config)
    assert expected is not None
    assert run_ranks(4, evaluated, tiny_config)[0][0] == expected[0]


def go_on(ranks: Ranks, config: RunConfig, folder: Path) -> None:
    run(config, RunInfo("run", folder, "commit"), ranks, None)


def test_another_number_of_workers_ends_with_the_same_weights(tiny_config: RunConfig, tmp_path: Path) -> None:
    # Without dropout, whose mask depends on the rank, and on equal canvases.
    config = replace(
        tiny_config,
        model=replace(tiny_config.model, dropout=0.0),
        transform=replace(tiny_config.transform, train_scales=(64,)),
    )
    torch.manual_seed(0)
    model = build_model(config.model, 4)
    for name in ("alone", "together"):
        save_initial(model, tmp_path / name)
    go_on(Ranks(), config, tmp_path / "alone")
    for steps, world_size in ((2, 1), (3, 2), (5, 3), (0, 2)):
        part = replace(config, optim=replace(config.optim, max_steps=steps))
        if world_size == 1:
            go_on(Ranks(), part, tmp_path / "together")
        else:
            run_ranks(world_size, go_on, part, tmp_path / "together")
    states = []
    for name in ("alone", "together"):
        path = catalog.newest(tmp_path / name)
        assert path is not None
        assert read_meta(path).step == 6
        checkpoint_state.load_weights(path, model)
        states.append({key: value.clone() for key, value in model.state_dict().items()})
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=1e-4, atol=1e-5, msg=key)
