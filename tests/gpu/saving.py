"""A checkpoint that is written while training continues, and the line about a step that does not fit."""

import tempfile
from pathlib import Path

import torch

from pipeline.checkpoint import catalog
from pipeline.checkpoint import state as checkpoint_state
from pipeline.checkpoint.saver import Saver
from pipeline.training.ema import Ema
from pipeline.training.model import build_trainable_model
from pipeline.training.optim import build_optimizer
from pipeline.training.out_of_memory import MemoryShortage, explaining
from tests.gpu.results import Results
from tests.gpu.steps import Kind, Step, run_config
from tests.gpu.work import CLASSES, Setting, batch_of
from tests.support.checkpoints import meta


def run(results: Results, setting: Setting) -> None:
    config = run_config(setting, compute={"precision": "bf16"}, optim={"ema": 0.999})
    batch = batch_of(setting.sizes(*[(800, 1066)] * 8), pinned=setting.cuda)
    step = Step(Kind(config, [batch]), setting)
    for _ in range(2):
        step()
    results.attempt("checkpoint", lambda: _checkpoints(results, setting, step))
    if setting.cuda:
        results.attempt("shortage", lambda: _shortage(results, step))


def _checkpoints(results: Results, setting: Setting, step: Step) -> None:
    """Save three times, with steps beside it, and compare each checkpoint with copies made before."""
    assert step.averages is not None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        saver = Saver(folder, step.optimizer, step.ranks, keep=3)
        for number in (1, 2, 3):
            alone = setting.seconds(step, 2)
            expected = _copied(step)
            before = saver.stalled_s
            saver.save(step.model, step.optimizer, meta(number), step.averages.averages)
            beside = setting.seconds(step, 4)
            saver.finish()
            results.put(
                f"checkpoint {number}",
                tensors_that_differ=_differing(folder, step, expected),
                stalled_ms=(saver.stalled_s - before) * 1e3,
                step_ms=alone * 1e3,
                step_beside_ms=beside * 1e3,
            )
        saver.close()


def _copied(step: Step) -> dict[str, torch.Tensor]:
    assert step.averages is not None
    return {name: value.detach().clone() for name, value in _named(step.model, step.optimizer, step.averages).items()}


def _named(model: torch.nn.Module, optimizer: torch.optim.Optimizer, averages: Ema) -> dict[str, torch.Tensor]:
    moments = enumerate(optimizer.state.values())
    return {
        **model.state_dict(),
        **{f"{i}.{key}": value for i, state in moments for key, value in state.items()},
        **{f"average.{name}": value for name, value in averages.averages.items()},
    }


def _differing(folder: Path, step: Step, expected: dict[str, torch.Tensor]) -> int:
    config = step.kind.config
    torch.manual_seed(5)
    model = build_trainable_model(config, CLASSES).to(step.ranks.device)
    optimizer, averages = build_optimizer(model, config.optim), Ema(model, config.optim.ema)
    path = catalog.newest(folder)
    assert path is not None
    checkpoint_state.load(path, model, optimizer, step.ranks, averages.averages)
    found = _named(model, optimizer, averages)
    return sum(not torch.equal(value, found[name]) for name, value in expected.items())


def _shortage(results: Results, step: Step) -> None:
    """Take most of the memory away, and read the line."""
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**28) / total)
    try:
        with explaining(step.model, step.optimizer, step.kind.batches, step.kind.config, step.ranks, 7):
            step()
        results.put("a step that does not fit", message="no error")
    except MemoryShortage as error:
        results.put("a step that does not fit", message=str(error))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    results.put("a step after it", loss=float(step().losses.total.detach()))
