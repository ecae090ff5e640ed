"""Times that were measured with this code (`BENCHMARKS.md`), for those who have no run of their own yet.

There is no figure for a GPU: none has been measured, and a guess would be worth less than two hundred steps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from detr.config import ModelConfig, TransformConfig
from pipeline.config import RunConfig
from pipeline.forecast.prices import Prices
from pipeline.recipes import DEMO, DETR_R50

_SHAPE = 4 / 3  # of most of COCO's images


@dataclass(frozen=True)
class Figure:
    """A measured time of a model on a processor."""

    model: ModelConfig
    device: str
    threads: int
    train_s: float
    """Seconds of a training step per image."""
    train_pixels: float
    """Pixels of such an image."""
    evaluate_s: float | None = None
    """Seconds of inference per image."""
    evaluate_pixels: float = 1.0
    start_s: float | None = None
    """Seconds from the command to the first step on a machine of its own; where Ray runs already it takes less."""
    end_s: float | None = None
    """Seconds from the last step to the end."""


FIGURES = (
    Figure(DETR_R50.model, "AMD EPYC", 2, 5.982 / 4, 640 * 640, 1.149, 800 * 1066),
    Figure(
        *(DEMO.model, "a processor with 2 cores", 1, 0.120 / 16, 96 * 96, 0.7 * 2 / 100, 96 * 96 * _SHAPE),
        start_s=26.0,
        end_s=8.0,
    ),
)


def shipped_prices(config: RunConfig, images: int) -> Prices | None:
    """Return prices on processors from the figures of this package, or None if there is none for the model.

    A figure is scaled to the pixels of the run's images and to the threads of its workers.
    """
    figure = next((figure for figure in FIGURES if _same(figure.model, config.model)), None)
    if figure is None or config.compute.precision != "fp32":
        return None
    workers, threads = config.cluster.workers, figure.threads / config.cluster.cpus_per_worker
    per_worker = -(-config.optim.batch_size // workers)
    train = figure.train_s * _train_pixels(config.transform) / figure.train_pixels
    evaluation = None
    if figure.evaluate_s is not None:
        pixels = config.transform.eval_size**2 * _SHAPE
        evaluation = images / workers * threads * figure.evaluate_s * pixels / figure.evaluate_pixels
    return Prices(
        source=(
            f"a figure of this package (BENCHMARKS.md: {figure.device}, threads: {figure.threads}), scaled to the images and "
            "the threads of a worker: expect the order of magnitude"
        ),
        device=figure.device,
        step_s=per_worker * threads * train,
        evaluation_s=evaluation,
        start_s=figure.start_s,
        end_s=figure.end_s,
    )


def _train_pixels(transform: TransformConfig) -> float:
    """Return the mean number of pixels of a training image."""
    longest = transform.max_size
    if max(transform.train_scales) == longest:  # square images
        return sum(scale**2 for scale in transform.train_scales) / len(transform.train_scales)
    shapes = [(scale, min(scale * _SHAPE, longest)) for scale in transform.train_scales]
    return sum(short * long for short, long in shapes) / len(shapes)


def _same(known: ModelConfig, model: ModelConfig) -> bool:
    """Return True if two models differ at most in the weights that they start from."""
    return replace(known, backbone_weights=model.backbone_weights) == model
