"""Interface of the variants of the model: their predictions, and the class that all of them extend."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from detr.config import ModelConfig


class Outputs(NamedTuple):
    """Predictions of one decoder layer; a named tuple, which DDP, FSDP and `torch.compile` can look into.

    logits: [B, Q, K + 1], the last class is "no object". boxes: [B, Q, 4] cxcywh as fractions of the image.
    auxiliary: predictions of the decoder layers before the last, first to last; empty if not configured.
    masks: logits [B, Q, h, w] of each query's mask on the backbone's stride-4 grid over the canvas; None without a
    mask head, and in `auxiliary`.
    """

    logits: Tensor
    boxes: Tensor
    auxiliary: tuple["Outputs", ...] = ()
    masks: Tensor | None = None


class SigmoidOutputs(NamedTuple):
    """Predictions with one sigmoid per class and no class for "no object": several classes of a query can be likely.

    logits: [B, Q, K]. boxes and auxiliary: as in `Outputs`. masks: always None.
    encoder: proposals of every cell in training, where class 0 is "an object"; None without a second stage.
    one_to_many: predictions of the queries that share objects, with their own auxiliary ones; None outside training.
    """

    logits: Tensor
    boxes: Tensor
    auxiliary: tuple["SigmoidOutputs", ...] = ()
    masks: Tensor | None = None
    encoder: "SigmoidOutputs | None" = None
    one_to_many: "SigmoidOutputs | None" = None


def nested(layers: Sequence[SigmoidOutputs]) -> SigmoidOutputs:
    """Return the predictions of the last layer, with those of the others as its auxiliary ones."""
    *auxiliary, last = layers
    return SigmoidOutputs(last.logits, last.boxes, tuple(auxiliary))


def tensors_of(outputs: Outputs | SigmoidOutputs) -> list[Tensor]:
    """Return every tensor of the predictions, those of all layers and sets included."""
    found: list[Tensor] = []
    for value in outputs:
        if isinstance(value, Tensor):
            found.append(value)
        elif value is not None:
            nested = (value,) if isinstance(value, SigmoidOutputs) else value
            found += [tensor for layer in nested for tensor in tensors_of(layer)]
    return found


class DETR(nn.Module):
    """Detector, built by `detr.model.build_model`, which chooses the class by `ModelConfig.variant`.

    Every variant has a `backbone` (a `Backbone` and its positions) and a `transformer` whose `encoder` and `decoder` hold
    `layers`; its parameters have the names of the variant's original.
    """

    backbone: nn.ModuleList
    transformer: Any
    no_object: bool
    """True if the class heads have a last row for "no object"."""
    proposal_head: str = ""
    """Prefix of the names of a class head whose class 0 means "an object", that of a second stage; empty without one."""

    def __init__(self, config: ModelConfig, num_classes: int) -> None:
        super().__init__()
        self.config = config
        self.num_classes = num_classes

    def forward(self, images: Tensor, padding: Tensor | None = None) -> Any:
        """Return `Outputs` or `SigmoidOutputs` for normalised float images [B, 3, H, W]; B may be 0.

        padding: bool [B, H, W], true where there is no image; None if no image is padded.
        Every variant has its own; this class, which only names what they share, raises `NotImplementedError`.
        """
        raise NotImplementedError

    def aliases(self) -> Mapping[str, str]:
        """Return the original's further names of parameters: name -> the name in this model."""
        return {}
