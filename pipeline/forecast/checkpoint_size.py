"""Size of a checkpoint, from the shapes of the model's tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipeline.config import RunConfig

if TYPE_CHECKING:
    from torch.overrides import TorchFunctionMode


def checkpoint_bytes(config: RunConfig, num_classes: int) -> int:
    """Return the bytes of a checkpoint's tensors: weights, AdamW's two moments, and averages of the weights if there are any.

    The model is built without memory, on torch's device `meta`.
    """
    import torch

    from pipeline.training.model import build_trainable_model

    with torch.device("meta"), _without_random_values():
        model = build_trainable_model(config, num_classes)
    state = model.state_dict().values()
    weights: int = sum(value.numel() * value.element_size() for value in state)
    trained: int = sum(value.numel() * value.element_size() for value in model.parameters() if value.requires_grad)
    return weights + 2 * trained + (weights if config.optim.ema else 0)


def _without_random_values() -> TorchFunctionMode:
    """Return a mode in which no values are drawn: on `meta`, torch would import its compiler for that, in two seconds."""
    from torch.overrides import TorchFunctionMode

    class Undrawn(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if getattr(func, "__name__", "") in ("normal_", "uniform_", "trunc_normal_"):
                return args[0] if args else kwargs["tensor"]
            return func(*args, **(kwargs or {}))

    return Undrawn()
