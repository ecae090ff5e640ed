"""Cards of registered models for tests that need no run."""

from detr.config import ModelConfig, TransformConfig
from pipeline.registry.card import Card
from shards.dataset.categories import Category


def make_card(
    model: ModelConfig, transform: TransformConfig, categories: tuple[Category, ...], *, recipe: str = ""
) -> Card:
    """Return the card of a model without figures, data or checkpoint."""
    return Card(
        model=model,
        transform=transform,
        categories=categories,
        evaluate_batch_size=2,
        recipe=recipe,
        run_id="r",
        checkpoint="",
        step=0,
        epoch=0.0,
        metrics={},
        train_digest="",
        val_digest="",
        code_commit="",
    )
