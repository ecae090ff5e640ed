"""The record of a run in a folder and in memory of fsspec, and the names that runs may have."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.checkpoint.location import Location, Url
from pipeline.config import RunConfig
from pipeline.driver.record import Outcome, check_name, new_record, read_record, write_record
from pipeline.errors import RunConfigError


@pytest.fixture(params=["folder", "url"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    return tmp_path / "it" if request.param == "folder" else Url(f"memory://{tmp_path.name}/it")


def test_a_record_is_read_as_it_was_written(place: Location, tiny_config: RunConfig) -> None:
    assert read_record(place) is None
    asked = replace(tiny_config, storage="runs")
    record = new_record("it", asked, tiny_config, ("a", "b"))
    write_record(place, record)
    assert read_record(place) == record
    assert (record.asked_config, record.run_config) == (asked, tiny_config)
    assert new_record("it", asked, tiny_config, ("a", "b")).key != record.key


def test_a_finished_run_s_outcome_is_in_its_record(place: Location, tiny_config: RunConfig) -> None:
    record = new_record("it", tiny_config, tiny_config, ("a", "b")).but(run_id="1234567890")
    assert record.outcome(place) is None
    outcome = Outcome("1234567890", place, place / "checkpoints" / "step-00000006", {"AP": 0.5}, "3", "detr-it", True)
    write_record(place, record.with_outcome(outcome, unsent=False))
    found = read_record(place)
    assert found is not None
    assert found.outcome(place) == outcome


def test_a_run_is_resumed_by_a_name_that_no_other_run_has(tiny_config: RunConfig) -> None:
    record = new_record("tiny-01234567", tiny_config, tiny_config, ("", "")).but(run_id="1234567890")
    assert record.handle == "12345678"
    assert record.but(name="tiny").handle == "tiny"


def test_a_damaged_record_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"name": 3}')
    with pytest.raises(
        RunConfigError, match=r"run\.json cannot be read .*; expected the record of a run: give another"
    ):
        read_record(tmp_path)


@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", "it's", 'a"b', "a b", ".hidden", "-flag", "x" * 129, "a\n"])
def test_a_name_that_is_no_folder_is_refused(name: str) -> None:
    with pytest.raises(RunConfigError, match="expected 1 to 128 letters") as caught:
        check_name(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["r50", "Run_1.2-b", "7", "lr=1e-4+ema"])
def test_a_name_of_letters_and_digits_is_taken(name: str) -> None:
    check_name(name)


def test_the_record_is_reached_without_torch_ray_and_mlflow() -> None:
    code = "import sys, pipeline.train, jobs.cli; print({'torch', 'ray', 'mlflow', 'numpy'} & set(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "set()"
