"""Models, batches and measurements that the sections share."""

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from detr.batch import Batch, collate
from detr.config import ModelConfig
from detr.geometry import Size
from detr.model import DETR, build_model
from tests.bench import cases

CLASSES = 91
_BOXES = 7


@dataclass(frozen=True)
class Setting:
    """Device and size of a call."""

    device: str
    tiny: bool

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"

    @property
    def name(self) -> str:
        """Name of the device for the tables."""
        name = torch.cuda.get_device_name() if self.cuda else "CPU"
        return f"{name}, tiny" if self.tiny else name

    @property
    def model(self) -> ModelConfig:
        """R50, or a small model."""
        if not self.tiny:
            return ModelConfig()
        return ModelConfig(
            backbone="tiny", encoder_layers=1, decoder_layers=2, hidden_dim=64, feedforward_dim=64, num_queries=10
        )

    def sizes(self, *sizes: Size) -> list[Size]:
        """Return the sizes, or small ones."""
        return [(64, 96) if i % 2 else (96, 64) for i in range(min(len(sizes), 2))] if self.tiny else list(sizes)

    def wait(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object], calls: int = 1) -> float:
        """Return the seconds per call, the device's work included."""
        self.wait()
        start = time.perf_counter()
        for _ in range(calls):
            work()
        self.wait()
        return (time.perf_counter() - start) / calls

    def waits(self, work: Callable[[], object]) -> list[str]:
        """Return the lines at which the host waits for the device."""
        if not self.cuda:
            work()
            return []
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        found = [warning for warning in caught if "synchroniz" in str(warning.message)]
        return [f"{Path(warning.filename).name}:{warning.lineno}" for warning in found]


def calm(model: nn.Module) -> None:
    """Shrink residual branches: random ones add up to activations of 1e4, those of ImageNet's weights stay near 1."""
    for name, value in model.state_dict().items():
        if name.startswith("backbone") and name.endswith("bn3.weight"):
            value.fill_(0.25)


def built(config: ModelConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> DETR:
    """Return a model in training mode, on the host, the same for a seed."""
    torch.manual_seed(seed)
    model = build_model(config, CLASSES)
    calm(model)
    return model.to(dtype).train()


def batch_of(sizes: Sequence[Size], *, seed: int = 0, masks: bool = False, pinned: bool = False) -> Batch:
    """Return random images with boxes, on the host."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for (height, width), target in zip(sizes, cases.targets(len(sizes), _BOXES), strict=True):
        drawn = torch.rand(_BOXES, height, width, generator=generator) > 0.5 if masks else None
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)
        samples.append((image, replace(target, masks=drawn)))
    batch = collate(samples)
    return batch.pin_memory() if pinned else batch


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of the difference over the norm of the expected."""
    got, expected = got.detach().double().cpu(), expected.detach().double().cpu()
    return float((got - expected).norm() / expected.norm().clamp(min=1e-300))
