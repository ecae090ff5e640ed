"""Counted work of a run equals what its loop would do."""

from dataclasses import replace

from pipeline.config import CheckpointConfig, EvaluateConfig, OptimConfig, RunConfig
from pipeline.forecast.amounts import amounts
from pipeline.schedule import Schedule, is_evaluated


def config_of(**changes: object) -> RunConfig:
    return RunConfig(optim=OptimConfig(batch_size=4, epochs=6, **changes), evaluate=EvaluateConfig(every=2))  # type: ignore[arg-type]


def test_steps_evaluations_and_checkpoints_are_those_of_the_loop() -> None:
    config = replace(config_of(), checkpoint=CheckpointConfig(every_steps=4, keep=2, keep_every_epochs=3))
    schedule = Schedule(config.optim, 10)
    work = amounts(config, schedule, 50)
    assert (work.steps, work.epochs, work.images) == (15, 6.0, 50)
    assert work.evaluations == sum(is_evaluated(config, schedule, step) for step in range(1, 16)) == 3
    # Steps 4, 5, 8, 10, 12 and 15; the third epoch ends with step 8, the sixth with 15.
    assert work.checkpoints == 6
    assert work.kept == 2 + 1 + 2


def test_a_run_that_continues_has_the_rest() -> None:
    config = config_of()
    schedule = Schedule(config.optim, 10)
    rest = amounts(config, schedule, 50, begin=5)
    assert (rest.steps, rest.evaluations) == (10, 2)
    assert amounts(config, schedule, 50, begin=15).steps == 0


def test_limits_count() -> None:
    config = replace(config_of(max_steps=7), evaluate=EvaluateConfig(every=2, limit=20))
    work = amounts(config, Schedule(config.optim, 10), 50)
    assert (work.steps, work.evaluations, work.images) == (7, 2, 20)
