"""Configuration of a Conditional DETR in its original's format, from the names and shapes of its tensors.

The tensors do not show the number of attention heads and the dilation.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from detr.config import ModelConfig
from detr.original_config import PAPERS_HEADS, common_fields, shape_of


def is_conditional(state_dict: Mapping[str, Tensor]) -> bool:
    """Return True for the tensors of a Conditional DETR."""
    return "transformer.decoder.query_scale.layers.0.weight" in state_dict


def infer_conditional(
    state_dict: Mapping[str, Tensor], *, heads: int | None = None, dilation: bool = False, **chosen: Any
) -> tuple[ModelConfig, int]:
    """Return the configuration and the number of classes of the model with these tensors.

    heads: None takes the paper's 8. chosen: other fields that no tensor shows (`dropout`).
    Raise `ValueError` naming the first tensor that is missing or of an impossible shape, and `ConfigError` if the
    configuration is impossible. Other differences are found when the state dict is loaded.
    """
    queries, hidden_dim = shape_of(state_dict, "query_embed.weight", 2)
    config = ModelConfig(
        variant="conditional",
        **common_fields(state_dict),
        dilation=dilation,
        hidden_dim=hidden_dim,
        heads=heads or PAPERS_HEADS,
        num_queries=queries,
        **chosen,
    )
    return config, shape_of(state_dict, "class_embed.weight", 2)[0]
