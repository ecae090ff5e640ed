"""Checkpoints on an S3 server that checks credentials: saved by several ranks, through outages, refused in one line."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
import torch
from torch import nn

from pipeline.checkpoint import catalog, location, patience, torch_files
from pipeline.checkpoint import state as checkpoint_state
from pipeline.checkpoint.location import Url
from pipeline.checkpoint.saver import Saver
from pipeline.config import RunConfig
from pipeline.distributed.parallel import Strategy, distribute, unwrap
from pipeline.distributed.ranks import Ranks
from pipeline.errors import Postponed, RunConfigError
from pipeline.training.loop import run
from pipeline.training.requests import LoopHooks
from pipeline.training.state import RunInfo
from shards.store import retry, storage
from shards.store.retry import StoreError
from tests.support import runs
from tests.support.checkpoints import meta, save_checkpoint
from tests.support.command import until
from tests.support.ranks import run_ranks
from tests.support.runs import start
from tests.support.s3_server import S3Server

ROOT = Url("s3://sets/runs/tiny-1")
Run = tuple[nn.Module, torch.optim.Optimizer]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    server = S3Server(tmp_path_factory.mktemp("s3"), written=True)
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def _client(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_CONFIG_FILE", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    fsspec.filesystem("s3").clear_instance_cache()
    yield
    for name in storage.listing(str(ROOT)):
        storage.remove(str(ROOT / name))
    fsspec.filesystem("s3").clear_instance_cache()


def made(seed: int, ranks: Ranks | None = None) -> Run:
    torch.manual_seed(seed)
    model = distribute(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), ranks or Ranks())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    step((model, optimizer))
    return model, optimizer


def step(run: Run) -> None:
    run[1].zero_grad()
    run[0](torch.ones(3, 4)).sum().backward()
    run[1].step()


def values(run: Run) -> dict[str, torch.Tensor]:
    moments = run[1].state_dict()["state"].items()
    flat = {f"{number}.{name}": value.clone() for number, state in moments for name, value in state.items()}
    return {**{name: value.clone() for name, value in unwrap(run[0]).state_dict().items()}, **flat}


def loaded(number: int) -> dict[str, torch.Tensor]:
    run = made(99)
    checkpoint_state.load(catalog.folder_of(ROOT, number), *run, Ranks())
    return values(run)


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name, value in one.items() if not torch.equal(value, other[name])] == []


def save_of_ranks(ranks: Ranks, environment: dict[str, str]) -> dict[str, torch.Tensor]:
    """Three saves, one after the other in the saver's thread, of which two stay."""
    os.environ.update(environment)  # the processes fork from a server that may be older than the store
    run = made(1, ranks)
    with Saver(ROOT, run[1], ranks, keep=2) as saver:
        for number in range(3):
            kept = values(run)
            saver.save(*run, meta(number))
            step(run)
    return kept


def load_of_ranks(ranks: Ranks, environment: dict[str, str]) -> dict[str, torch.Tensor]:
    os.environ.update(environment)
    newest = catalog.newest(ROOT)
    assert newest is not None
    run = made(5 + ranks.rank, ranks)
    checkpoint_state.load(newest, *run, ranks)
    return values(run)


def test_two_ranks_save_to_the_store_and_any_number_loads_from_it(server: S3Server) -> None:
    kept, _ = run_ranks(2, save_of_ranks, server.environment)
    assert [str(path) for path in catalog.list_checkpoints(ROOT)] == [
        f"{ROOT}/checkpoints/step-0000000{n}" for n in (1, 2)
    ]
    names = [name for name in storage.listing(str(ROOT)) if name.endswith(".distcp")]
    assert sorted(name.rpartition("/")[2] for name in names) == ["__0_0.distcp"] * 2 + ["__1_0.distcp"] * 2
    assert_same(loaded(2), kept)
    for of_rank in run_ranks(2, load_of_ranks, server.environment):
        assert_same(of_rank, kept)


def test_store_that_is_away_for_a_while_delays_a_checkpoint_and_loses_none(
    server: S3Server, caplog: pytest.LogCaptureFixture
) -> None:
    run = made(1)
    with Saver(ROOT, run[1], Ranks(), keep=2) as saver:
        saver.save(*run, meta(1))
        saver.finish()
        server.stop()
        kept = values(run)
        saver.save(*run, meta(2))
        step(run)  # training continues while the store is away
        until(lambda: "attempt 2 of 8" in caplog.text, "the saver tries again")
        server.start()
        saver.finish()
    assert_same(loaded(2), kept)


def watched_run(ranks: Ranks, environment: dict[str, str], config: RunConfig, marks: Path) -> list[str]:
    """Train to the end; return the warnings. Leave a file in `marks` when a step is saved, and with the first warning."""
    os.environ.update(environment)
    messages: list[str] = []

    class Record(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())
            (marks / "warned").touch()

    logging.getLogger("pipeline.checkpoint").addHandler(Record(logging.WARNING))
    retry.ATTEMPTS, retry.FIRST_WAIT_S, patience.AGAIN_S = 2, 0.05, 0.2
    for_rank_0 = (marks / "saved").touch if ranks.first else lambda: None
    run(config, RunInfo("run", ROOT, "commit"), ranks, None, LoopHooks(keep_unsent=for_rank_0))
    return messages


def test_a_run_whose_store_goes_away_and_comes_back_ends_with_the_same_weights(
    server: S3Server, tiny_config: RunConfig, tmp_path: Path
) -> None:
    """Everything that the run leaves is in the store. Its server is killed after the first save and started later."""
    config = replace(
        tiny_config,
        checkpoint=replace(tiny_config.checkpoint, every_steps=1),
        cluster=replace(tiny_config.cluster, workers=2),
    )
    start(config, ROOT)

    def cut() -> None:
        until(lambda: (tmp_path / "saved").exists(), "a step is saved")
        server.stop()
        until(lambda: (tmp_path / "warned").exists(), "the run warns")
        server.start()

    with ThreadPoolExecutor(1) as thread:
        cutting = thread.submit(cut)
        messages, others = run_ranks(2, watched_run, server.environment, config, tmp_path)
        cutting.result()
    assert others == [], "rank 0 warns for all"
    # The save that failed, and the wait of the next one where the server starts slowly: each is one message.
    assert len([text for text in messages if "training" in text]) in (1, 2)
    assert messages[-1].startswith("the store answers again")
    (tmp_path / "plain").mkdir()
    start(config, tmp_path / "plain")
    run_ranks(2, plain_run, config, tmp_path / "plain")
    runs.assert_same(runs.weights(config, ROOT), runs.weights(config, tmp_path / "plain"))
    found = catalog.best(ROOT)
    assert found is not None
    assert {name.partition("/")[0] for name in storage.listing(str(ROOT))} == {
        "initial.safetensors",
        "checkpoints",
        "saved",
    }


def plain_run(ranks: Ranks, config: RunConfig, folder: Path) -> None:
    run(config, RunInfo("run", folder, "commit"), ranks, None)


def bytes_read(ranks: Ranks, environment: dict[str, str], strategy: Strategy) -> tuple[int, int]:
    """Save a model and load it; return the bytes of the state in the store, and those that this rank read."""
    os.environ.update(environment)
    torch_files._GAP = 0
    torch.manual_seed(1)
    model = distribute(nn.Sequential(*[nn.Linear(128, 128) for _ in range(4)]), ranks, strategy)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 128)).sum().backward()
    optimizer.step()
    path = save_checkpoint(ROOT, model, optimizer, meta(1), ranks)
    found, read = list[int](), storage.read_range
    storage.read_range = lambda *asked: (content := read(*asked), found.append(len(content)))[0]
    try:
        checkpoint_state.load(path, model, optimizer, ranks)
    finally:
        storage.read_range = read
    sizes = storage.listing(str(path)).items()
    return sum(size for name, size in sizes if name.endswith(".distcp")), sum(found)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ranks_do_not_read_what_another_rank_reads(server: S3Server, strategy: Strategy) -> None:
    (size, first), (_, second) = run_ranks(2, bytes_read, server.environment, strategy)
    assert 0.9 * size < first + second <= 1.1 * size
    assert second == 0 if strategy == "ddp" else second < 0.6 * size


def test_a_store_that_breaks_ends_in_one_line_and_what_it_holds_stays(
    server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "ATTEMPTS", 2)
    monkeypatch.setattr(patience, "PATIENCE_S", 0.0)
    run = made(1)
    kept = values(run)

    def train() -> None:
        with Saver(ROOT, run[1], Ranks(), keep=2) as saver:
            saver.save(*run, meta(1))
            saver.finish()
            server.stop()
            saver.save(*run, meta(2))
            step(run)

    try:
        with pytest.raises(Postponed, match=r"the store has not answered .*step-00000002 is not saved") as caught:
            train()
        with pytest.raises(StoreError, match=r"no good answer"):
            loaded(1)
    finally:
        server.start()
    assert "\n" not in str(caught.value)
    assert "earlier checkpoints are intact: restore the store" in str(caught.value)
    assert catalog.newest(ROOT) == catalog.folder_of(ROOT, 1)
    assert_same(loaded(1), kept)


def test_wrong_credentials_and_an_absent_bucket_are_one_line_before_a_run_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    location.check("s3://sets/runs")
    assert storage.listing("s3://sets/runs") == {}
    with pytest.raises(RunConfigError, match=r"^checkpoint\.store s3://nowhere/runs cannot be written") as caught:
        location.check("s3://nowhere/runs")
    assert "\n" not in str(caught.value)
    with monkeypatch.context() as patch:
        patch.setenv("AWS_SECRET_ACCESS_KEY", "another")
        fsspec.filesystem("s3").clear_instance_cache()
        with pytest.raises(
            RunConfigError,
            match=r"^checkpoint\.store s3://sets/runs: access denied .*expected credentials that allow it",
        ) as denied:
            location.check("s3://sets/runs")
    fsspec.filesystem("s3").clear_instance_cache()
    assert "\n" not in str(denied.value)


def test_a_store_that_does_not_answer_is_one_line_within_seconds(
    server: S3Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "shards.store.retry")
    server.stop()
    try:
        with pytest.raises(RunConfigError) as caught:
            location.check("s3://sets/runs/")
    finally:
        server.start()
    assert caplog.text.count(" of 3 in ") == 2  # two waits of a second at most
    message = str(caught.value)
    assert message.startswith("checkpoint.store s3://sets/runs: no good answer in 3 attempts; check the address")
    assert message.endswith('/sets/runs")')  # with the endpoint, whole, that was asked
    assert message.count("s3://") == 1
    assert "\n" not in message
    assert ".detr-" not in message
