"""Checkpoints on an S3 server that checks credentials: saved by several ranks, through outages, refused in one line."""

from __future__ import annotations

import os
from collections.abc import Iterator

import fsspec
import pytest
import torch
from torch import nn

from pipeline.checkpoint import catalog, location
from pipeline.checkpoint import state as checkpoint_state
from pipeline.checkpoint.location import Url
from pipeline.checkpoint.saver import Saver
from pipeline.distributed.parallel import distribute, unwrap
from pipeline.distributed.ranks import Ranks
from pipeline.errors import CheckpointError, RunConfigError
from shards.store import retry, storage
from tests.support.checkpoints import meta
from tests.support.command import until
from tests.support.ranks import run_ranks
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


def test_a_store_that_breaks_ends_in_one_line_and_what_it_holds_stays(
    server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "ATTEMPTS", 2)
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
        with pytest.raises(CheckpointError, match=r"step-00000002 could not be written .*no good answer") as caught:
            train()
        with pytest.raises(CheckpointError, match=r"cannot be read .*no good answer"):
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
