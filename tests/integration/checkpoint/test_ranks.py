"""A checkpoint of one number of workers is a checkpoint of any other."""

from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.checkpoint import catalog
from pipeline.checkpoint import state as checkpoint_state
from pipeline.checkpoint.metadata import read_meta
from pipeline.distributed.parallel import distribute, unwrap
from pipeline.distributed.ranks import Ranks
from tests.support.checkpoints import meta, save_checkpoint
from tests.support.ranks import run_ranks

State = dict[str, Tensor]


def wrapped(ranks: Ranks, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model and its optimizer after a step whose input is every rank's alike."""
    torch.manual_seed(seed)
    model = distribute(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), ranks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(3, 4)).sum().backward()
    optimizer.step()
    return model, optimizer


def state(model: nn.Module, optimizer: torch.optim.Optimizer) -> State:
    moments = optimizer.state_dict()["state"].items()
    flat = {f"{number}.{name}": value for number, values in moments for name, value in values.items()}
    return {**unwrap(model).state_dict(), **flat}


def save(ranks: Ranks, folder: Path) -> State:
    model, optimizer = wrapped(ranks, 1)
    save_checkpoint(folder, model, optimizer, meta(3, world_size=ranks.world_size), ranks)
    return state(model, optimizer)


def load(ranks: Ranks, folder: Path) -> State:
    path = catalog.newest(folder)
    assert path is not None
    assert read_meta(path).step == 3
    model, optimizer = wrapped(ranks, 2 + ranks.rank)
    checkpoint_state.load(path, model, optimizer, ranks)
    return state(model, optimizer)


def assert_same(one: State, other: State) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_saved_by_two_loaded_by_one(tmp_path: Path) -> None:
    saved, _ = run_ranks(2, save, tmp_path)
    assert_same(load(Ranks(), tmp_path), saved)


def test_saved_by_one_loaded_by_two(tmp_path: Path) -> None:
    saved = save(Ranks(), tmp_path)
    for loaded in run_ranks(2, load, tmp_path):
        assert_same(loaded, saved)


def test_weights_saved_by_two_are_read_by_this_process_alone(tmp_path: Path) -> None:
    saved, _ = run_ranks(2, save, tmp_path)
    path = catalog.newest(tmp_path)
    assert path is not None
    model, _ = wrapped(Ranks(), 5)
    checkpoint_state.load_weights(path, model)
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
