"""Size of a checkpoint, from the shapes of the model's tensors."""

from __future__ import annotations

from pipeline.config import RunConfig


def checkpoint_bytes(config: RunConfig, num_classes: int) -> int:
    """Return the bytes of a checkpoint's tensors: weights, AdamW's two moments, and averages of the weights if there are any.

    The model is built without memory, on torch's device `meta`.
    """
    import torch

    from pipeline.training.model import build_trainable_model

    with torch.device("meta"):
        model = build_trainable_model(config, num_classes)
    state = model.state_dict().values()
    weights: int = sum(value.numel() * value.element_size() for value in state)
    trained: int = sum(value.numel() * value.element_size() for value in model.parameters() if value.requires_grad)
    return weights + 2 * trained + (weights if config.optim.ema else 0)
