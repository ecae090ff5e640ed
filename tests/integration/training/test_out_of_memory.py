"""A real rank whose memory is bounded by the operating system."""

import resource
from dataclasses import replace
from pathlib import Path

from pipeline.config import RunConfig
from pipeline.distributed.ranks import Ranks
from pipeline.driver.preflight import prepare
from pipeline.training import loop
from pipeline.training.out_of_memory import MemoryShortage
from pipeline.training.state import RunInfo
from tests.support.ranks import run_ranks


def with_less(ranks: Ranks, config: RunConfig, folder: Path, spare: int) -> str:
    """Return the error of a run whose address space may grow by this many bytes only."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + spare
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        loop.run(config, RunInfo("run", folder, "commit"), ranks, None)
    except MemoryShortage as error:
        return str(error)
    return ""


def test_a_step_that_does_not_fit_is_one_line_with_the_options_to_lower(tiny_config: RunConfig, tmp_path: Path) -> None:
    config = replace(
        tiny_config,
        transform=replace(tiny_config.transform, train_scales=(1600,), max_size=1600),
        optim=replace(tiny_config.optim, max_steps=1),
    )
    config, ready = prepare(config, lambda _: None)
    ready.write_initial_weights(tmp_path)
    (message,) = run_ranks(1, with_less, config, tmp_path, 700 << 20)
    assert message.startswith("step 0: worker 0 ran out of host memory in a pass of 4 images of 1600x1600 (weights ")
    assert "iB more were wanted); expected a step that fits: --compute.max-microbatch 2" in message
    assert len(message.splitlines()) == 1
