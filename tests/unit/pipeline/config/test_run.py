import dataclasses
import math
from dataclasses import replace
from typing import Any, get_type_hints

import msgspec
import pytest

from detr.config import ConfigError, ModelConfig, literal_fields
from pipeline.config import (
    CheckpointConfig,
    ClusterConfig,
    ComputeConfig,
    DataConfig,
    EvaluateConfig,
    OptimConfig,
    RunConfig,
    TrackConfig,
    flatten,
    from_json,
    to_json,
)
from pipeline.errors import RunConfigError
from pipeline.recipes import RECIPES


def changed(path: str, value: Any) -> str:
    """Return the paper's recipe as JSON with one field set."""
    raw = msgspec.json.decode(to_json(RECIPES["detr-r50"]))
    *parents, last = path.split(".")
    node = raw
    for name in parents:
        node = node[name]
    node[last] = value
    return msgspec.json.encode(raw).decode()


def test_training_a_mask_head_needs_a_model_with_masks() -> None:
    with pytest.raises(
        RunConfigError, match=r"optim.train is 'mask_head' but the model has none.*--model.masks"
    ) as caught:
        RunConfig(optim=OptimConfig(train="mask_head"))
    assert "\n" not in str(caught.value)
    assert RunConfig(optim=OptimConfig(train="mask_head"), model=ModelConfig(masks=True)).model.masks


def config_classes() -> dict[str, type]:
    """Return the classes of a run's configuration, by the prefix of their fields."""
    hints = get_type_hints(RunConfig)
    sections = {f"{name}.": hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)}
    return {"": RunConfig, **sections}


LITERALS = [
    (kind, prefix, name, choices)
    for prefix, kind in config_classes().items()
    for name, choices in literal_fields(kind).items()
]


def test_choices_are_found_in_every_section_that_has_them() -> None:
    found = {prefix + name for _, prefix, name, _ in LITERALS}
    assert {"optim.decay", "cluster.gpu", "evaluate.batching", "model.norm", "transform.pixels"} <= found
    annotated = {
        prefix + field.name
        for prefix, kind in config_classes().items()
        for field in dataclasses.fields(kind)
        if "Literal" in str(field.type) or str(field.type) in ("Batching", "Scorer")
    }
    assert found == annotated


@pytest.mark.parametrize(("kind", "prefix", "name", "choices"), LITERALS)
def test_a_value_that_is_no_choice_of_its_field_is_refused(
    kind: type, prefix: str, name: str, choices: tuple[str, ...]
) -> None:
    with pytest.raises((RunConfigError, ConfigError), match=rf"{name}.*'neither'.*expected one of") as caught:
        kind(**{name: "neither"})
    assert all(choice in str(caught.value) for choice in choices)
    if kind.__module__.startswith("pipeline.config."):
        assert isinstance(caught.value, RunConfigError)
        assert str(caught.value).startswith(f"{prefix}{name} is 'neither'")
    else:
        assert isinstance(caught.value, ConfigError)


def test_unknown_decay_and_gpu_are_refused() -> None:
    with pytest.raises(RunConfigError, match=r"optim\.decay is 'cosine'; expected one of step, linear"):
        OptimConfig(decay="cosine")  # type: ignore[arg-type]
    with pytest.raises(RunConfigError, match=r"cluster\.gpu is 'maybe'; expected one of auto, yes, no"):
        ClusterConfig(gpu="maybe")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_survives_json_unchanged(name: str) -> None:
    assert from_json(to_json(RECIPES[name])) == RECIPES[name]


def test_fields_that_are_absent_take_their_defaults() -> None:
    assert from_json("{}") == RunConfig()


@pytest.mark.parametrize("path", ["learning_rate", "optim.learning_rate", "model.layers", "transform.scales"])
def test_an_unknown_field_is_named_with_its_path(path: str) -> None:
    with pytest.raises(RunConfigError, match=rf"unknown field \$\.{path} "):
        from_json(changed(path, 1))


@pytest.mark.parametrize(
    ("path", "value"),
    [("optim.lr", "fast"), ("optim.epochs", 1.5), ("model.backbone", "vgg"), ("cluster.gpu", True), ("seed", None)],
)
def test_a_mistyped_field_is_named_with_its_path(path: str, value: Any) -> None:
    with pytest.raises(RunConfigError, match=rf"`\$\.{path}`"):
        from_json(changed(path, value))


@pytest.mark.parametrize("text", ["", "lr: 1", "[]", '{"seed": 1', b"\xff"])
def test_text_that_is_no_configuration_gives_a_one_line_error(text: str | bytes) -> None:
    with pytest.raises(RunConfigError, match=r"not valid.*expected what `detr show` prints") as caught:
        from_json(text)
    assert "\n" not in str(caught.value)


def test_an_impossible_value_in_json_is_refused_as_in_python() -> None:
    with pytest.raises(RunConfigError, match=r"optim\.batch_size is 0; expected at least 1"):
        from_json(changed("optim.batch_size", 0))
    with pytest.raises((RunConfigError, ConfigError), match="num_queries"):
        from_json(changed("model.num_queries", 0))


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (DataConfig, "reader_threads", 0),
        (OptimConfig, "batch_size", 0),
        (OptimConfig, "epochs", 0),
        (OptimConfig, "lr", 0.0),
        (OptimConfig, "lr", math.nan),
        (OptimConfig, "lr", math.inf),
        (OptimConfig, "lr_backbone", -1e-5),
        (OptimConfig, "weight_decay", -1e-4),
        (OptimConfig, "weight_decay", math.inf),
        (OptimConfig, "clip_norm", 0.0),
        (OptimConfig, "clip_norm", math.inf),
        (OptimConfig, "decay_epoch", -1),
        (OptimConfig, "decay_factor", 0.0),
        (OptimConfig, "decay_factor", 1.5),
        (OptimConfig, "warmup_epochs", -0.5),
        (OptimConfig, "warmup_epochs", math.inf),
        (OptimConfig, "max_steps", -1),
        (EvaluateConfig, "every", 0),
        (EvaluateConfig, "batch_size", 0),
        (EvaluateConfig, "limit", -1),
        (EvaluateConfig, "pictures", -1),
        (CheckpointConfig, "every_steps", -1),
        (CheckpointConfig, "keep", 0),
        (ClusterConfig, "workers", 0),
        (ClusterConfig, "cpus_per_worker", 0),
        (ClusterConfig, "max_failures", -2),
        (ClusterConfig, "min_workers", -1),
        (ClusterConfig, "min_workers", 2),  # more than there may be
        (ClusterConfig, "collective_timeout_s", 0),
        (ClusterConfig, "wait_s", -1),
        (TrackConfig, "experiment", ""),
        (TrackConfig, "log_every", 0),
        (TrackConfig, "register_as", "team/detr"),
        (TrackConfig, "register_as", "detr:best"),
        (RunConfig, "seed", -1),
        (RunConfig, "seed", 2**32),
    ],
)
def test_an_impossible_value_is_refused_when_built(kind: type, field: str, value: Any) -> None:
    with pytest.raises(RunConfigError, match=rf"{field} is .*; expected"):
        kind(**{field: value})


def test_more_workers_than_images_in_a_batch_are_refused() -> None:
    with pytest.raises(RunConfigError, match=r"cluster\.workers is 8 but optim\.batch_size.*is 4"):
        RunConfig(optim=OptimConfig(batch_size=4), cluster=ClusterConfig(workers=8))
    assert RunConfig(optim=OptimConfig(batch_size=8), cluster=ClusterConfig(workers=8)).cluster.workers == 8


def test_parameters_are_listed_by_path_with_every_leaf_once() -> None:
    flat = flatten(RECIPES["detr-r50"])
    assert flat["optim.lr"] == "0.0001"
    assert flat["transform.crop_scales"] == "400,500,600"
    assert flat["seed"] == "42"
    assert all(isinstance(value, str) for value in flat.values())
    assert not {"optim", "model", "data"} & flat.keys()


def test_run_and_model_are_named_after_the_recipe_by_default() -> None:
    paper = RECIPES["detr-r50"]
    assert (paper.run_name, paper.model_name) == ("detr-r50", "detr-r50")
    assert RECIPES["demo"].model_name == "detr-demo"
    named = replace(paper, track=TrackConfig(run_name="mine", register_as="ours"))
    assert (named.run_name, named.model_name) == ("mine", "ours")
    assert RunConfig().run_name == "run"


@pytest.mark.parametrize("parts", ["backbone", "both"])
def test_recomputing_trainable_batch_norm_is_refused(parts: str) -> None:
    trained = ModelConfig(norm="batch")
    RunConfig(model=trained, compute=ComputeConfig(recompute="encoder"))
    with pytest.raises(
        RunConfigError, match=r"compute\.recompute is .* every image twice; expected .*use frozen_batch"
    ):
        RunConfig(model=trained, compute=ComputeConfig(recompute=parts))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cluster": ClusterConfig(gpu="no")}, r"cluster\.gpu is 'no'; expected GPUs with compute\.graphs"),
        ({"cluster": ClusterConfig(workers=2, strategy="fsdp")}, r"cluster\.strategy is 'fsdp'; expected ddp"),
        ({"compute": ComputeConfig(graphs=True, compile=True)}, r"compute\.compile is True; expected one of the two"),
        (
            {"compute": ComputeConfig(graphs=True, recompute="encoder")},
            r"compute\.recompute is 'encoder'; expected none",
        ),
        ({"model": ModelConfig(norm="batch")}, r"model\.norm is 'batch'; expected frozen_batch or group"),
    ],
    ids=["CPU", "sharded", "compiled", "recomputed", "trained batch norm"],
)
def test_options_that_cannot_be_captured_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RunConfigError, match=message):
        RunConfig(**{"compute": ComputeConfig(graphs=True), **changes})


def test_a_deformable_model_repeats_its_sums_on_processors_alone() -> None:
    small = RECIPES["small"]
    compute = replace(small.compute, deterministic=True)
    with pytest.raises(RunConfigError, match=r"expected another variant, --cluster\.gpu no"):
        replace(small, compute=compute, cluster=replace(small.cluster, gpu="auto"))
    assert replace(small, compute=compute, cluster=replace(small.cluster, gpu="no")).compute.deterministic


def test_a_record_from_before_an_option_existed_takes_its_default() -> None:
    raw = msgspec.json.decode(to_json(RECIPES["detr-r50"]))
    for name in ("graphs", "max_graphs", "tf32", "deterministic"):
        del raw["compute"][name]
    assert from_json(msgspec.json.encode(raw)) == RECIPES["detr-r50"]
