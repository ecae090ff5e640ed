"""Configuration of a Deformable DETR or H-DETR in its original's format, from the names and shapes of its tensors.

The tensors do not show the number of attention heads, the dilation, `look_forward_twice`, which changes gradients only,
the number of queries of a model with two stages, and how many of the queries of a hybrid one are for training only.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from detr.config import DeformableConfig, ModelConfig
from detr.original_config import PAPERS_HEADS, common_fields, shape_of

_ENCODER, _DECODER = "transformer.encoder.layers.", "transformer.decoder.layers."
_PAPERS_QUERIES = 300


def is_deformable(state_dict: Mapping[str, Tensor]) -> bool:
    """Return True for the tensors of a Deformable DETR."""
    return "transformer.level_embed" in state_dict


def infer_deformable(
    state_dict: Mapping[str, Tensor],
    *,
    heads: int | None = None,
    dilation: bool = False,
    queries: int | None = None,
    look_forward_twice: bool = False,
    **chosen: Any,
) -> tuple[ModelConfig, int]:
    """Return the configuration and the number of classes of the model with these tensors.

    heads: None takes the paper's 8. queries: number of one-to-one queries; None takes all that the tensors show, or the
    paper's 300 if they show none. chosen: other fields that no tensor shows (`dropout`).
    Raise `ValueError` naming the first tensor that is missing or of an impossible shape, and `ConfigError` if the
    configuration is impossible. Other differences are found when the state dict is loaded.
    """
    heads = heads or PAPERS_HEADS
    levels, hidden_dim = shape_of(state_dict, "transformer.level_embed", 2)
    two_stage = "transformer.enc_output.weight" in state_dict
    shown = shape_of(state_dict, "query_embed.weight", 2)[0] if "query_embed.weight" in state_dict else None
    queries = queries or shown or _PAPERS_QUERIES
    if shown is not None and queries > shown:
        raise ValueError(f"query_embed.weight has {shown} rows, expected at least the {queries} queries of its options")
    refine = any(key.startswith("transformer.decoder.bbox_embed.") for key in state_dict)
    config = ModelConfig(
        variant="deformable",
        **common_fields(state_dict),
        dilation=dilation,
        hidden_dim=hidden_dim,
        heads=heads,
        num_queries=queries,
        deformable=DeformableConfig(
            levels=levels,
            encoder_points=_points(state_dict, f"{_ENCODER}0.self_attn", heads * levels),
            decoder_points=_points(state_dict, f"{_DECODER}0.cross_attn", heads * levels),
            box_refine=refine,
            two_stage=two_stage,
            mixed_selection=two_stage and shown is not None,
            look_forward_twice=look_forward_twice and refine,
            one_to_many_queries=(shown or queries) - queries,
        ),
        **chosen,
    )
    return config, shape_of(state_dict, "class_embed.0.weight", 2)[0]


def _points(state_dict: Mapping[str, Tensor], attention: str, samples: int) -> int:
    name = f"{attention}.attention_weights.weight"
    if attention.startswith(_ENCODER) and name not in state_dict:
        return DeformableConfig().encoder_points  # there is no encoder
    rows = shape_of(state_dict, name, 2)[0]
    if rows % samples:
        raise ValueError(
            f"{name} has {rows} rows, expected a multiple of heads times levels, {samples}: give the heads"
        )
    return rows // samples
