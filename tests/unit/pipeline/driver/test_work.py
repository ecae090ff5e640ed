"""Work of a driver without Ray and MLflow: what it refuses, what it sends, and the status that its errors have."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow.exceptions import MlflowException

from pipeline.checkpoint.catalog import write_evaluation
from pipeline.config import RunConfig, TrackConfig
from pipeline.driver import conclusion, work
from pipeline.driver.launch import Launch
from pipeline.driver.lease import Claims, Lease
from pipeline.driver.position import Position
from pipeline.driver.record import new_record, read_record
from pipeline.driver.work import Work
from pipeline.errors import RunConfigError
from pipeline.registry.publish import Registered
from pipeline.tracking.mlflow_runs import create_run
from pipeline.tracking.pages.experiment import TAG_VIEW
from pipeline.tracking.tags import TAG_FOLDER, TAG_JOB, TAG_KEY, TAG_NOTE, TAG_VAL_DIGEST
from shards.dataset.manifest import load_manifest
from tests.support.checkpoints import save_small

READY: Any = SimpleNamespace(schedule=SimpleNamespace(total_steps=6))


def work_at(folder: Path, config: RunConfig, lines: list[str], client: Any = None) -> Work:
    """Return the work of a driver on a run whose workers and MLflow are not there."""
    record = new_record(folder.name, config, config, ("", "")).but(run_id="0123456789", status="running")
    return Work(folder, Launch(say=lines.append), Lease(Claims(folder), folder.name), record, client)


def test_a_new_run_takes_no_checkpoints_that_lie_in_its_store(tiny_config: RunConfig, tmp_path: Path) -> None:
    save_small(tmp_path / "it", 3)
    with pytest.raises(RunConfigError, match=r"it has a checkpoint of another run already \(step-00000003\)") as caught:
        work_at(tmp_path / "it", tiny_config, []).create(tiny_config, READY, SimpleNamespace())  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("lost", ["", "taken over by process 7 on elsewhere"])
def test_what_is_left_is_sent_after_ray_by_the_lease_s_driver(
    lost: str, tiny_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    monkeypatch.setattr(conclusion, "send_left", lambda *_: order.append("sent"))
    client = SimpleNamespace(search_experiments=lambda **_: None)
    driver = work_at(tmp_path / "it", tiny_config, [], client)
    driver._lease.lost = lost
    cluster = SimpleNamespace(gpu=False, run=lambda *_, **__: order.append("ran"))
    driver._run(cluster, tiny_config, lambda: order.append("disconnected"), accept_change=False)
    assert order == ["ran", "disconnected", "disconnected"] + ([] if lost else ["sent"])


@pytest.mark.parametrize(("asked", "only_if_better"), [("best", True), ("always", False), ("never", None)])
def test_a_finished_run_registers_what_it_was_asked_to(
    asked: Any, only_if_better: bool | None, tiny_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(tiny_config, track=TrackConfig(register=asked))
    calls: list[Any] = []
    lines: list[str] = []

    def register(*_: object, only_if_better: bool, **__: object) -> Registered:
        calls.append(only_if_better)
        return Registered("3", True)

    monkeypatch.setattr("pipeline.registry.registration.register", register)
    run = SimpleNamespace(data=SimpleNamespace(tags={}), info=SimpleNamespace(experiment_id="1"))
    client: Any = SimpleNamespace(
        set_tag=lambda *_: None, get_run=lambda _: run, search_logged_models=lambda *_, **__: []
    )
    save_small(tmp_path / "it", 3)
    write_evaluation(tmp_path / "it" / "checkpoints" / "step-00000003", {"AP": 0.5})
    driver = work_at(tmp_path / "it", config, lines, client)
    outcome = driver._conclude(config, 3, 0)
    assert calls == ([] if only_if_better is None else [only_if_better])
    assert (outcome.metrics, outcome.version) == ({"AP": 0.5}, "" if asked == "never" else "3")
    assert any("`detr register 01234567 --name NAME`" in line for line in lines) is (asked == "never")


@pytest.mark.parametrize(
    ("known", "val", "named"),
    [("another", None, ["training"]), (None, "another", ["validation"]), ("", "", []), (None, None, [])],
)
def test_a_run_that_continues_on_other_data_names_them(
    known: str | None, val: str | None, named: list[str], tiny_config: RunConfig, tmp_path: Path
) -> None:
    manifest, inputs = load_manifest(tiny_config.data.train), []
    client: Any = SimpleNamespace(
        log_inputs=lambda _, entries: inputs.extend(entries),
        log_batch=lambda *_, **__: None,
        get_run=lambda _: SimpleNamespace(data=SimpleNamespace(tags={})),
        update_run=lambda *_, **__: None,
    )
    driver = work_at(tmp_path / "it", tiny_config, [], client)
    digests = [manifest.digest if digest is None else digest for digest in (known, val)]
    driver.record = driver.record.but(train_digest=digests[0], val_digest=digests[1])
    position: Any = SimpleNamespace(train=manifest, val=manifest, tags=lambda _: {})
    driver._begin(tiny_config, tiny_config, position, {})
    assert [entry.dataset.digest for entry in inputs] == [manifest.digest[:36]] * len(named)
    assert [tag.value for entry in inputs for tag in entry.tags] == named


@pytest.mark.parametrize("lost", ["", "taken over by process 7 on elsewhere"])
def test_the_time_of_a_driver_that_is_stopped_counts_for_its_run(
    lost: str, tiny_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conclusion, "send_left", lambda *_: True)
    driver = work_at(tmp_path / "it", tiny_config, [])
    driver._lease.lost = lost
    driver.record = driver.record.but(worked_s=1000.0)

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        driver._run(SimpleNamespace(gpu=False, run=stopped), tiny_config, lambda: None, accept_change=False)
    known = read_record(tmp_path / "it")
    assert (known is None) if lost else (known is not None and known.worked_s > 1000.0)


class Prepared(Exception):
    """Raised where the data of a run would be checked."""


@pytest.mark.parametrize("made", [True, False])
def test_a_run_that_a_killed_driver_has_made_keeps_its_options(
    made: bool, tiny_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = replace(tiny_config, initial="w.pth")
    known = new_record("it", asked, replace(asked, initial="/first/w.pth"), ("", ""))
    prepared: list[RunConfig] = []

    def prepare(config: RunConfig, _: object) -> None:
        prepared.append(config)
        raise Prepared

    monkeypatch.setattr(work, "connecting", lambda *_, **__: nullcontext())
    monkeypatch.setattr(work, "connect", lambda: None)
    monkeypatch.setattr(work, "prepare", prepare)
    monkeypatch.setattr(work, "run_with_key", lambda *_: "0123456789" if made else "")
    lease = Lease(Claims(tmp_path), "it")

    def create(config: RunConfig) -> None:
        work.create(config, "it", False, tmp_path, Launch(), lease, known)

    with pytest.raises(Prepared):
        create(asked)
    assert prepared[0].initial == ("/first/w.pth" if made else "w.pth")
    with pytest.raises(RunConfigError if made else Prepared):
        create(replace(asked, initial="other.pth"))


def test_a_run_of_the_same_name_in_another_storage_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [str(tmp_path / "it"), "/elsewhere/it-01234567", "/elsewhere/it"]
    runs = [SimpleNamespace(data=SimpleNamespace(tags={TAG_FOLDER: folder})) for folder in folders]
    monkeypatch.setattr("pipeline.tracking.mlflow_runs._runs", lambda *_, **__: iter(runs))
    lines: list[str] = []
    client: Any = None
    work._warn_of_other(client, "it", tmp_path / "it", Launch(say=lines.append))
    assert len(lines) == 1
    assert "a run it in /elsewhere/it already" in lines[0]
    assert lines[0].endswith("give --storage /elsewhere")


def test_parameters_that_a_killed_driver_has_logged_stay(tiny_config: RunConfig) -> None:
    logged: list[str] = []
    run = SimpleNamespace(
        info=SimpleNamespace(run_id="0123456789"), data=SimpleNamespace(params={"cluster.workers": "7"})
    )
    client: Any = SimpleNamespace(
        get_experiment_by_name=lambda _: SimpleNamespace(experiment_id="1", lifecycle_stage="active"),
        get_experiment=lambda _: SimpleNamespace(tags={TAG_VIEW: "a view", TAG_NOTE: "a note"}),
        search_runs=lambda *_, **__: [run],
        get_run=lambda _: run,
        update_run=lambda *_, status: logged.append(status),
        log_batch=lambda _, params: logged.extend(param.key for param in params),
        log_text=lambda *_: None,
        log_inputs=lambda *_: None,
    )
    assert create_run(client, tiny_config, {}, {TAG_KEY: "k"}) == "0123456789"
    assert logged[0] == "RUNNING"
    assert "optim.lr" in logged
    assert "cluster.workers" not in logged


def test_a_trained_run_waits_for_mlflow_before_it_sends_and_registers(
    tiny_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.tracking.server.outage._AGAIN_S", 0.001)
    order: list[str] = []
    lines: list[str] = []
    answers = iter([True, False])

    def search(**_: int) -> None:
        if next(answers):
            order.append("away")
            raise MlflowException("no answer")  # which MLflow gives a code of errors that may pass

    monkeypatch.setattr(conclusion, "send_left", lambda *_: order.append("sent") or True)
    patient = replace(tiny_config, track=replace(tiny_config.track, wait_s=600.0))
    driver = work_at(tmp_path / "it", patient, lines, SimpleNamespace(search_experiments=search))
    cluster = SimpleNamespace(gpu=False, run=lambda *_, **__: order.append("ran"))
    driver._run(cluster, patient, lambda: None, accept_change=False)
    assert order == ["ran", "away", "sent"]
    assert "the registration waits for it, 10 min at most" in lines[0]
    assert lines[1].startswith("MLflow answers again after")


def test_a_continued_run_names_its_job_and_keeps_its_output(
    tiny_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tags: dict[str, str] = {}
    kept: list[str] = []
    monkeypatch.setenv("DETR_JOB", "it-second")
    monkeypatch.setattr(work, "write_tags", lambda _client, _run, written: tags.update(written))
    monkeypatch.setattr(work, "keep_output", lambda _client, run_id: kept.append(run_id))
    monkeypatch.setattr(work, "connected", lambda *_, **__: nullcontext(SimpleNamespace(gpu=False)))
    monkeypatch.setattr(work, "run_link", lambda *_: "")
    run = SimpleNamespace(
        info=SimpleNamespace(experiment_id="1", status="KILLED"), data=SimpleNamespace(tags={TAG_JOB: "it-first"})
    )
    client = SimpleNamespace(get_run=lambda _: run, update_run=lambda *_, **__: None)
    driver = work_at(tmp_path / "it", tiny_config, [], client)
    position: Any = SimpleNamespace(
        step=1,
        schedule=SimpleNamespace(total_steps=6),
        is_trained=lambda _: False,
        stream=SimpleNamespace(changes=False),
        rate_change="",
        train=SimpleNamespace(digest=""),
        val=SimpleNamespace(digest=""),
        tags=dict,
    )
    for name, result in (("_position", position), ("_run", None), ("_conclude", None), ("_compare", None)):
        monkeypatch.setattr(driver, name, lambda *_, _result=result, **__: _result)
    monkeypatch.setattr(driver, "_finish", lambda outcome: outcome)
    driver.go_on(tiny_config, tiny_config, False, SimpleNamespace(address=None))  # type: ignore[arg-type]
    assert tags[TAG_JOB] == "it-second"
    assert kept == ["0123456789"]


def test_a_run_that_continues_on_other_validation_data_is_tagged_with_them() -> None:
    position: Any = SimpleNamespace(
        stream=SimpleNamespace(changes=[]),
        val=SimpleNamespace(digest="new"),
        schedule=SimpleNamespace(total_steps=6, epoch=lambda _: 2.0),
    )
    assert Position.tags(position, {TAG_VAL_DIGEST: "old"})[TAG_VAL_DIGEST] == "new"
    assert TAG_VAL_DIGEST not in Position.tags(position, {TAG_VAL_DIGEST: "new"})
