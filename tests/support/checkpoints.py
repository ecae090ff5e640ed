"""Checkpoints for tests: a small model with an optimizer, metadata, and saving without a thread."""

from typing import Any

import msgspec
import torch
from torch import nn

from pipeline.checkpoint import state as checkpoint_state
from pipeline.checkpoint.location import Location
from pipeline.checkpoint.metadata import Meta
from pipeline.config import RunConfig, to_json
from pipeline.distributed.ranks import Ranks

Run = tuple[nn.Module, torch.optim.Optimizer]


def small(seed: int) -> Run:
    """Return a model and its optimizer after one step, so that there is state to keep."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.rand(3, 4)).sum().backward()
    optimizer.step()
    return model, optimizer


def assert_same_state(actual: Run, expected: Run) -> None:
    """Check that weights and the optimizer's state are equal bit for bit."""
    for name, value in actual[0].state_dict().items():
        assert torch.equal(value, expected[0].state_dict()[name]), name
    state, expected_state = (optimizer.state_dict()["state"] for _, optimizer in (actual, expected))
    assert state.keys() == expected_state.keys()
    for number, moments in state.items():
        assert all(torch.equal(value, expected_state[number][key]) for key, value in moments.items())


def meta(step: int, **fields: Any) -> Meta:
    """Return the metadata of a checkpoint of the default configuration."""
    values: dict[str, Any] = {
        "epoch": step / 4,
        "samples": step * 2,
        "run_id": "r",
        "config": msgspec.json.decode(to_json(RunConfig())),
        "train_digest": "d",
        "num_classes": 2,
        "code_commit": "c",
        "world_size": 1,
        "versions": {"torch": "2.11"},
    }
    return Meta(step=step, **(values | fields))


def save_checkpoint(
    root: Location,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    meta: Meta,
    ranks: Ranks,
    averages: checkpoint_state.Averages | None = None,
) -> Location:
    """Write a checkpoint and wait for it; a collective call."""
    return checkpoint_state.write(root, checkpoint_state.state_of(model, optimizer, averages), meta, ranks)


def save_small(root: Location, step: int, seed: int = 0) -> Any:
    """Write a checkpoint of the small model and return its location, a `Path` or `Url` like `root`."""
    return save_checkpoint(root, *small(seed), meta(step), Ranks())
