"""Messages of a worker that runs out of memory, on real allocations that are refused."""

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from detr.batch import Batch
from pipeline.config import RunConfig
from pipeline.distributed.ranks import Ranks
from pipeline.training.out_of_memory import MemoryShortage, explaining, is_shortage

TOO_MUCH = 1 << 47  # bytes: more than a process can address


def batch(images: int) -> Batch:
    return Batch(torch.zeros(images, 3, 64, 48), torch.zeros(images, 64, 48, dtype=torch.bool), [])


def shortage(config: RunConfig, ranks: Ranks, act: Callable[[], object], images: int = 4) -> str:
    model = nn.Linear(512, 256, bias=False)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 512)).sum().backward()
    optimizer.step()
    with pytest.raises(MemoryShortage) as caught, explaining(model, optimizer, [batch(images)], config, ranks, 12):
        act()
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_the_message_names_step_sizes_and_settings_to_lower(tiny_config: RunConfig) -> None:
    ranks = Ranks(1, 2)
    message = shortage(tiny_config, ranks, lambda: torch.empty(TOO_MUCH, dtype=torch.uint8))
    assert message.startswith("step 12: worker 1 ran out of host memory in a pass of 4 images of 64x48 ")
    assert re.search(
        r"weights 524288 bytes, gradients 524288 bytes, optimizer 1\.0 MiB, peak \d+(\.\d+)? [KMG]iB", message
    ), message
    assert "131072.00 GiB more were wanted" in message
    for flag in ("--compute.max-microbatch 2", "--compute.recompute both", "bf16", "--cluster.strategy fsdp"):
        assert flag in message


def test_settings_already_in_use_are_not_advised(tiny_config: RunConfig) -> None:
    compute = replace(tiny_config.compute, precision="bf16", recompute="both")
    message = shortage(
        replace(tiny_config, compute=compute), Ranks(), lambda: torch.empty(TOO_MUCH, dtype=torch.uint8), 1
    )
    assert message.endswith("expected a step that fits: smaller images (--transform.max-size)")


def test_graphs_are_given_up_first_and_what_they_refuse_is_not_advised(tiny_config: RunConfig) -> None:
    graphed = replace(tiny_config, compute=replace(tiny_config.compute, graphs=True))
    message = shortage(graphed, Ranks(0, 2), lambda: torch.empty(TOO_MUCH, dtype=torch.uint8))
    flags = "--compute.no-graphs or --compute.max-microbatch 2 or --compute.precision bf16"
    assert message.endswith(f"expected a step that fits: {flags}")


def test_a_memory_error_of_python_is_explained_as_well(tiny_config: RunConfig) -> None:
    assert "ran out of host memory" in shortage(tiny_config, Ranks(), lambda: bytearray(TOO_MUCH))


def test_other_errors_pass(tiny_config: RunConfig) -> None:
    model = nn.Linear(1, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    with (
        pytest.raises(RuntimeError, match=r"^shapes differ$"),
        explaining(model, optimizer, [batch(1)], tiny_config, Ranks(), 0),
    ):
        raise RuntimeError("shapes differ")


def test_a_gpu_that_is_full_is_a_shortage() -> None:
    assert is_shortage(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB."))
    assert not is_shortage(OSError("Cannot allocate memory"))
