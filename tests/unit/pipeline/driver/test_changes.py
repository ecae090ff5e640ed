"""Options that may differ between a run and the command that continues it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import RunConfig
from pipeline.driver.changes import ResumeOptions, agreed, continued, differences
from pipeline.driver.record import new_record
from pipeline.errors import RunConfigError


def changed(config: RunConfig, **sections: Any) -> RunConfig:
    """Return the configuration with options changed, by section; a value that is no dictionary is an option itself."""
    return replace(
        config,
        **{
            name: replace(getattr(config, name), **value) if isinstance(value, dict) else value
            for name, value in sections.items()
        },
    )


def test_the_same_command_has_no_differences(tiny_config: RunConfig) -> None:
    differing = differences(tiny_config, changed(tiny_config, storage="elsewhere", data={"train": "moved"}))
    differing.check("it", accept=False)
    assert str(differing) == ""


def test_what_is_not_trained_may_differ(tiny_config: RunConfig) -> None:
    now = changed(
        tiny_config,
        cluster={"workers": 4, "max_failures": 9},
        compute={"max_microbatch": 2, "recompute": "both"},
        evaluate={"pictures": 0},
        checkpoint={"every_steps": 7},
        track={"log_every": 3},
    )
    differing = differences(tiny_config, now)
    differing.check("it", accept=False)
    assert str(differing) == (
        "compute.max_microbatch 0 -> 2, compute.recompute none -> both, evaluate.pictures 1 -> 0, "
        "checkpoint.every_steps 0 -> 7, cluster.workers 1 -> 4, cluster.max_failures 3 -> 9, track.log_every 1 -> 3"
    )
    record = new_record("it", tiny_config, tiny_config, ("", ""))
    assert continued(record, now, differing) == now


def test_another_end_or_batch_must_be_accepted(tiny_config: RunConfig) -> None:
    now = changed(tiny_config, optim={"epochs": 3, "batch_size": 5})
    differing = differences(tiny_config, now)
    named = r"optim\.batch_size 4 -> 5, optim\.epochs 2 -> 3; expected the same, or --accept-change"
    with pytest.raises(RunConfigError, match=named):
        differing.check("it", accept=False)
    differing.check("it", accept=True)
    assert continued(new_record("it", tiny_config, tiny_config, ("", "")), now, differing) == now


def test_another_model_is_refused_with_every_difference(tiny_config: RunConfig) -> None:
    now = changed(tiny_config, model={"heads": 4}, optim={"lr": 1e-2, "epochs": 3}, cluster={"workers": 2})
    named = r"model\.heads 2 -> 4, optim\.lr 0\.001 -> 0\.01, optim\.epochs 2 -> 3; expected the same: leave out"
    for accept in (False, True):
        with pytest.raises(RunConfigError, match=named):
            differences(tiny_config, now).check("it", accept)


def test_a_run_gets_no_shorter(tiny_config: RunConfig) -> None:
    with pytest.raises(RunConfigError, match="--epochs 1 is less than the run's 2"):
        differences(tiny_config, changed(tiny_config, optim={"epochs": 1})).check("it", accept=True)
    with pytest.raises(RunConfigError, match="--epochs 1 is less than the run's 2"):
        ResumeOptions(epochs=1).of(tiny_config)


def test_the_number_of_workers_is_trained_where_losses_depend_on_it(tiny_config: RunConfig) -> None:
    before = changed(tiny_config, optim={"normalise": "per_rank"})
    now = changed(before, cluster={"workers": 2, "max_failures": 0})
    with pytest.raises(RunConfigError, match=r"cluster\.workers 1 -> 2; expected the same, or --accept-change"):
        differences(before, now).check("it", accept=False)
    with pytest.raises(RunConfigError, match="per_rank; expected the same number, or --accept-change"):
        ResumeOptions(cluster={"workers": 2}).of(before)
    assert ResumeOptions(cluster={"workers": 2}, accept=True).of(before).cluster.workers == 2


def test_data_that_lies_elsewhere_is_read_there(tiny_config: RunConfig) -> None:
    now = changed(tiny_config, data={"train": "/moved/train", "built_in": True})
    config = continued(new_record("it", tiny_config, tiny_config, ("", "")), now, differences(tiny_config, now))
    assert config == now


def test_the_shape_of_the_model_that_a_run_started_from_stays(tiny_config: RunConfig) -> None:
    trained = changed(tiny_config, model={"heads": 4})  # adopted from --initial
    now = changed(tiny_config, cluster={"workers": 2})
    config = continued(new_record("it", tiny_config, trained, ("", "")), now, differences(tiny_config, now))
    assert config == changed(trained, cluster={"workers": 2})


def test_a_resume_changes_cluster_and_computation(tiny_config: RunConfig) -> None:
    options = ResumeOptions(cluster={"workers": 2, "min_workers": 1}, compute={"max_microbatch": 1})
    wanted = changed(tiny_config, cluster={"workers": 2, "min_workers": 1}, compute={"max_microbatch": 1})
    assert options.of(tiny_config) == wanted
    with pytest.raises(RunConfigError, match=r"cluster\.min_workers"):
        ResumeOptions(cluster={"min_workers": 3}).of(tiny_config)


def test_a_changed_cache_is_absolute(tiny_config: RunConfig) -> None:
    record, lines = new_record("it", tiny_config, tiny_config, ("", "")), list[str]()
    for given, wanted in (("shards", str(Path("shards").absolute())), ("off", "off"), ("~/shards", "~/shards")):
        config = agreed(record, changed(tiny_config, data={"cache": given}), False, lines.append)
        assert config.data.cache == wanted
    assert lines[0] == "run it continues with data.cache none -> shards"
