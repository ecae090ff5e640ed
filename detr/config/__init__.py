"""Configuration of the model, its losses and its augmentation: frozen dataclasses that check themselves when built.

The docstrings of the fields are the help texts of the flags. The defaults are the paper's. Departures from it, all off by default:

- `norm="batch" | "group"`: trainable normalisation in the backbone instead of frozen batch norm. Frozen statistics need
  pre-trained weights, so a backbone that starts from random ones needs this.
- `backbone="tiny"`: four small stages (stride 16, 16 to 128 channels) for small images on a CPU.
- `position_temperature` other than 10000: small images have few cells, which 10000 barely tells apart.
- `position_at_input`: the positions are also added once to the encoder's input.
- `decoder_input="queries"`: the decoder starts from the query embeddings instead of zeros.
- `pixels="fast"` (augmentation): crops are cut out before the resize instead of between two, so that images are
  resized once; sizes are the same, pixels are sharper by one interpolation.
- `query_init="grid"`: query embeddings start as the positions of a square grid instead of random normal.
- `tied_attention_init`: query and key projections start equal in the encoder's self-attention and the decoder's
  cross-attention, so that attention starts local.

Fields hold only int, float, str, bool and tuples of them, so every config survives JSON. This module imports no torch.
"""

from detr.config.checks import ConfigError, check_literals, literal_fields
from detr.config.loss import LossConfig
from detr.config.model import GROUPS, DeformableConfig, ModelConfig
from detr.config.transform import TransformConfig

__all__ = [
    "GROUPS",
    "ConfigError",
    "DeformableConfig",
    "LossConfig",
    "ModelConfig",
    "TransformConfig",
    "check_literals",
    "literal_fields",
]
