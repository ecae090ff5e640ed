from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from detr.config import ModelConfig
from detr.model import DETR, build_model
from pipeline.config import OptimConfig, RunConfig
from pipeline.schedule import Schedule
from pipeline.training.model import build_trainable_model
from pipeline.training.optim import build_optimizer, learning_rates, set_learning_rates
from shards.plan.steps import Origin
from tests.support.step_samples import MODEL

COCO = 118_287


def resnet(**more: object) -> DETR:
    return build_model(
        ModelConfig(
            backbone="resnet18",
            hidden_dim=16,
            heads=2,
            encoder_layers=1,
            decoder_layers=1,
            feedforward_dim=16,
            **more,  # type: ignore[arg-type]
        ),
        3,
    )


def names_at(model: DETR, optimizer: torch.optim.Optimizer, rate: float) -> set[str]:
    of = {id(parameter): name for name, parameter in model.named_parameters()}
    return {of[id(p)] for group in optimizer.param_groups if group["lr"] == rate for p in group["params"]}


def test_only_the_last_three_stages_train_at_the_backbone_rate() -> None:
    model = resnet()
    optimizer = build_optimizer(model, OptimConfig())
    backbone = names_at(model, optimizer, 1e-5)
    assert {name.split(".")[3] for name in backbone} == {"layer2", "layer3", "layer4"}
    convolutions = {
        name for name, _ in model.named_parameters() if ".body.layer" in name and ".body.layer1" not in name
    }
    assert backbone == convolutions
    others = names_at(model, optimizer, 1e-4)
    assert others == {name for name, _ in model.named_parameters() if "backbone" not in name}


def test_a_rate_of_0_freezes_the_backbone_before_the_model_is_wrapped() -> None:
    frozen = OptimConfig(lr_backbone=0)
    model = build_trainable_model(RunConfig(model=MODEL, optim=frozen), 3)
    assert not any(p.requires_grad for name, p in model.named_parameters() if "backbone" in name)
    assert [group["base_lr"] for group in build_optimizer(model, frozen).param_groups] == [1e-4]
    with pytest.raises(ValueError, match=r"backbone.* expected a frozen backbone"):
        build_optimizer(resnet(), frozen)


def test_every_group_decays_its_weights() -> None:
    optimizer = build_optimizer(resnet(), OptimConfig(weight_decay=0.02))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.02, 0.02]


def test_rates_are_base_rates_times_the_factor_if_set_again() -> None:
    optimizer = build_optimizer(resnet(), OptimConfig())
    for factor in (0.1, 0.1, 0.5):
        set_learning_rates(optimizer, factor)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([5e-5, 5e-6])


def test_rates_have_the_names_of_their_groups_with_a_frozen_backbone_too() -> None:
    deformable = replace(MODEL, variant="deformable", hidden_dim=32)
    others = {"main": 1e-4, "points": 1e-5}
    for rate, expected in ((2e-5, others | {"backbone": 2e-5}), (0, others)):
        config = RunConfig(model=deformable, optim=OptimConfig(lr_backbone=rate))
        model = build_trainable_model(config, 3)
        assert learning_rates(model, build_optimizer(model, config.optim)) == pytest.approx(expected)


def test_a_run_has_as_many_steps_as_its_images_fill_batches() -> None:
    assert Schedule(OptimConfig(), COCO).total_steps == -(-300 * COCO // 64) == 554_471
    assert Schedule(OptimConfig(batch_size=4, epochs=3), 10).total_steps == 8  # 30 images: seven batches and a half
    assert Schedule(OptimConfig(batch_size=64, epochs=3), 10).total_steps == 1  # one batch holds the whole run
    assert Schedule(OptimConfig(max_steps=7), COCO).total_steps == 7
    assert Schedule(OptimConfig(batch_size=4, epochs=3, max_steps=99), 10).total_steps == 8


def test_the_rate_drops_at_the_first_step_of_epoch_200() -> None:
    schedule = Schedule(OptimConfig(), COCO)
    drop = -(-200 * COCO // 64)
    assert drop * 64 >= 200 * COCO > (drop - 1) * 64
    assert [schedule.factor(step) for step in (0, drop - 1, drop, drop + 1)] == [1.0, 1.0, 0.1, 0.1]
    assert schedule.factor(schedule.total_steps - 1) == 0.1


def test_linear_decay_ends_at_the_factor_in_even_steps() -> None:
    schedule = Schedule(OptimConfig(batch_size=1, epochs=10, decay="linear", decay_epoch=5, decay_factor=0.2), images=2)
    factors = [schedule.factor(step) for step in range(20)]
    assert factors[:11] == [1.0] * 11
    assert factors[-1] == pytest.approx(0.2)
    falls = [before - after for before, after in pairwise(factors[10:])]
    assert falls == pytest.approx([0.8 / 9] * 9)


def test_linear_decay_over_no_step_or_one_is_finite() -> None:
    for epochs in (1, 2):
        schedule = Schedule(
            OptimConfig(batch_size=2, epochs=epochs, decay="linear", decay_epoch=1, decay_factor=0.5), images=2
        )
        assert all(0.5 <= schedule.factor(step) <= 1 for step in range(schedule.total_steps))


def test_warm_up_rises_from_the_first_step_to_the_full_rate() -> None:
    schedule = Schedule(OptimConfig(batch_size=4, epochs=10, warmup_epochs=0.4, decay_epoch=9), images=50)
    assert [schedule.factor(step) for step in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


def test_the_epoch_counts_images_and_ends_with_the_run() -> None:
    schedule = Schedule(OptimConfig(batch_size=4, epochs=3), 10)
    assert [schedule.epoch(step) for step in (0, 5, 8)] == [0, 2.0, 3.0]


def test_short_tails_count_whole_steps_per_epoch() -> None:
    schedule = Schedule(OptimConfig(batch_size=4, epochs=3, decay_epoch=2), 10, "short")
    assert schedule.total_steps == 9
    assert [schedule.steps(epochs) for epochs in (0, 0.4, 1, 1.5, 2)] == [0, 1, 3, 5, 6]
    assert [schedule.epoch(step) for step in (0, 2, 3, 5, 9)] == [0, 0.8, 1.0, 1.8, 3.0]
    assert [schedule.factor(step) for step in (5, 6)] == [1.0, 0.1]


def test_smaller_batches_after_a_resume_give_more_steps() -> None:
    schedule = Schedule(OptimConfig(batch_size=3, epochs=3, decay_epoch=2), 10, origin=Origin(step=4, samples=16))
    assert schedule.total_steps == 9  # 14 samples are left: five steps, the last of them filled up
    assert [schedule.samples(step) for step in (4, 5, 9)] == [16, 19, 31]
    assert [schedule.factor(step) for step in (5, 6)] == [1.0, 0.1]


@pytest.mark.parametrize(
    ("config", "batch_size"),
    [
        (OptimConfig(batch_size=1024, epochs=10, decay="linear", decay_epoch=0, decay_factor=0.01), 16),
        (OptimConfig(batch_size=16, epochs=10, decay="linear", decay_epoch=2, decay_factor=0.01), 1024),
        (OptimConfig(batch_size=16, epochs=20, warmup_epochs=10, decay_epoch=19), 512),
    ],
    ids=["decay in smaller batches", "decay in larger ones", "warm-up"],
)
def test_the_rate_does_not_jump_with_another_batch_size(config: OptimConfig, batch_size: int) -> None:
    images = 20_480
    before = Schedule(config, images)
    step = before.steps(5)
    after = Schedule(replace(config, batch_size=batch_size), images, origin=Origin(step, before.samples(step)))
    largest_change = 1024 / (5 * images)
    assert after.factor(step) == pytest.approx(before.factor(step), abs=largest_change)
    assert 0.3 < after.factor(step) < 0.7
    last = after.factor(after.total_steps - 1)
    assert last == pytest.approx(before.factor(before.total_steps - 1), abs=largest_change)


@pytest.mark.parametrize(("batch_size", "images"), [(4, 10), (5, 10), (64, 10), (3, 7), (1, 1)])
def test_a_step_belongs_to_the_last_epoch_that_has_started(batch_size: int, images: int) -> None:
    schedule = Schedule(OptimConfig(batch_size=batch_size, epochs=7), images)
    for step in range(schedule.total_steps):
        started = [epoch for epoch in range(7) if schedule.steps(epoch) <= step]
        assert schedule.epoch_of(step) == started[-1]
