"""Checkpoints whose plans were made before are the same, byte for byte."""

from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.checkpoint import state as checkpoint_state
from pipeline.checkpoint import torch_files
from pipeline.checkpoint.plans import Plans
from pipeline.distributed.parallel import Strategy, distribute
from pipeline.distributed.ranks import Ranks
from shards.store.retry import StoreError
from tests.support.checkpoints import assert_same_state, meta, save_small, small
from tests.support.ranks import run_ranks


def save(ranks: Ranks, root: Path, strategy: Strategy) -> list[bool]:
    """Save four states twice, with plans that are kept and new ones; return if a plan was sent, for each save."""
    torch.manual_seed(1)
    model = distribute(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), ranks, strategy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    kept, sent = Plans(), list[bool]()
    make = kept.planner

    def watched() -> object:
        planner = make()
        plan = planner.create_local_plan

        def create() -> object:
            made = plan()
            sent.append(made.usable)
            return made

        planner.create_local_plan = create  # type: ignore[method-assign, assignment]
        return planner

    kept.planner = watched  # type: ignore[method-assign, assignment]
    for number in range(4):
        model(torch.ones(3, 4)).sum().backward()
        optimizer.step()
        optimizer.param_groups[0]["lr"] /= 2  # a number in the state changes, and its plan does not
        state = checkpoint_state.state_of(model, optimizer)
        checkpoint_state.write(root / "kept", state, meta(number), ranks, plans=kept)
        checkpoint_state.write(root / "new", state, meta(number), ranks)
    return sent


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_plans_are_sent_once_and_change_no_byte(tmp_path: Path, strategy: Strategy) -> None:
    assert run_ranks(2, save, tmp_path, strategy) == [[True, False, False, False]] * 2
    for number in range(4):
        folders = [tmp_path / name / "checkpoints" / f"step-{number:08d}" for name in ("kept", "new")]
        names = [sorted(path.name for path in folder.iterdir()) for folder in folders]
        assert names[0] == names[1]
        assert sum(name.endswith(".distcp") for name in names[0]) == 2
        for name in names[0]:
            if name != ".metadata":  # it has an id of the save
                assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name


def test_a_failed_save_leaves_no_plan_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans, run = Plans(), small(1)
    state = checkpoint_state.state_of(*run)
    checkpoint_state.write(tmp_path, state, meta(1), Ranks(), plans=plans)

    def away(*_: object, **__: object) -> None:
        raise StoreError("no good answer")

    with monkeypatch.context() as patch:
        patch.setattr(torch_files, "save_distributed", away)
        with pytest.raises(StoreError, match="is not saved"):
            checkpoint_state.write(tmp_path, state, meta(2), Ranks(), plans=plans)
    planner = plans.planner()
    planner.set_up_planner(state, is_coordinator=True)
    assert planner.create_local_plan().usable
    checkpoint_state.write(tmp_path, state, meta(2), Ranks(), plans=plans)
    other = small(5)
    checkpoint_state.load(tmp_path / "checkpoints" / "step-00000002", *other, Ranks())
    assert_same_state(other, run)


def test_two_savers_do_not_see_each_others_plans(tmp_path: Path) -> None:
    save_small(tmp_path / "one", 1)
    model = nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = checkpoint_state.state_of(model, optimizer)
    path = checkpoint_state.write(tmp_path / "two", state, meta(1), Ranks())
    loaded = nn.Linear(3, 3)
    checkpoint_state.load_weights(path, loaded)
    assert torch.equal(loaded.weight, model.weight)
