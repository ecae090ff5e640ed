"""Weights from elsewhere: the original's state dicts, whose keys this package shares, and torchvision's ResNets.

Every difference is an error that says what it tells about the model; nothing is loaded then.

The original keeps the detector of a model with masks in `detr.`, next to `bbox_attention.` and `mask_head.`; here the
three stand side by side. The prefix is added and removed at this boundary.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from detr.backbone import ResNet
from detr.model import DETR
from detr.segmentation import MASK_MODULES

_DETECTOR = "detr."
# The first prefix that fits explains a difference better than the list of its keys does.
_EXPLANATIONS = {
    "class_embed.": "it was trained for another number of classes",
    "query_embed.": "it has other num_queries or hidden_dim",
    "backbone.1.": "one of the two has learned positions (position)",
    "backbone.0.body.": "it has another backbone or norm",
    "transformer.encoder.norm.": "one of the two normalises first (pre_norm)",
    "transformer.": "its transformer has other encoder_layers, decoder_layers, hidden_dim or feedforward_dim",
}


def load_original_state_dict(model: DETR, state_dict: Mapping[str, Tensor]) -> None:
    """Load the `model` entry of an original checkpoint, or what `to_original_state_dict` returned.

    Raises ValueError if a key is missing, unexpected or of another shape.
    """
    given = _without_counters(state_dict)
    _check(model, given, to_original_state_dict(model))
    model.load_state_dict({key.removeprefix(_DETECTOR): value for key, value in given.items()}, strict=False)


def load_detector_state_dict(model: DETR, state_dict: Mapping[str, Tensor]) -> None:
    """Load a detector without masks into a model with them, whose mask head keeps its fresh weights.

    This is how masks are trained in two steps (section 4.4): the detector first, then the head alone, after
    `freeze_detector`. The state dict is an original one as in `load_original_state_dict`, without a mask head. Raises
    ValueError if a key of the detector is missing, unexpected or of another shape.
    """
    given = _without_counters(state_dict)
    _check(model, given, {key: value for key, value in _own_state(model).items() if not key.startswith(MASK_MODULES)})
    model.load_state_dict(given, strict=False)


def to_original_state_dict(model: DETR) -> dict[str, Tensor]:
    """Return the model's state under the original's keys, without batch norm's counters.

    They are the model's own keys, behind `detr.` where a mask head stands beside the detector.
    """
    state = _own_state(model)
    if not model.config.masks:
        return state
    return {key if key.startswith(MASK_MODULES) else _DETECTOR + key: value for key, value in state.items()}


def load_backbone_weights(model: DETR | ResNet, state_dict: Mapping[str, Tensor]) -> None:
    """Load the state dict of a torchvision ResNet, or of this package's `ResNet`, as the model's backbone.

    The classifier (`fc.*`) is left out. Raises ValueError if any other key is missing, unexpected or of another shape.
    """
    body: nn.Module = model.get_submodule("backbone.0.body") if isinstance(model, DETR) else model
    given = {key: value for key, value in _without_counters(state_dict).items() if not key.startswith("fc.")}
    if differing := _differing(given, _without_counters(body.state_dict())):
        raise ValueError(
            f"backbone weights: got {_summary(differing)}, expected the backbone's own keys; "
            "choose the ModelConfig.backbone and norm that the weights were trained with"
        )
    body.load_state_dict(given, strict=False)


def _own_state(model: DETR) -> dict[str, Tensor]:
    return _without_counters(model.state_dict())


def _check(model: DETR, given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    if not (differing := _differing(given, expected)):
        return
    raise ValueError(
        f"state dict: got {_summary(differing)}, expected the keys of {model.config} with {model.num_classes} "
        f"classes; {_explain(differing, given, expected)}"
    )


def _explain(differing: list[str], given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    masked, masks_expected = (any(key.startswith(_DETECTOR) for key in keys) for keys in (given, expected))
    if masked and not masks_expected:
        return "it is a segmentation model, whose detector is under the prefix 'detr.'"
    if masks_expected and not masked:
        return "it has no mask head: load_detector_state_dict takes a detector alone"
    names = [key.removeprefix(_DETECTOR) for key in differing]
    fitting = (why for prefix, why in _EXPLANATIONS.items() if any(name.startswith(prefix) for name in names))
    return next(fitting, "it is not a DETR")


def _without_counters(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # Trainable batch norm counts its batches; frozen batch norm, like the original's, does not.
    return {key: value for key, value in state_dict.items() if not key.endswith("num_batches_tracked")}


def _differing(given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    reshaped = [key for key in expected if key in given and given[key].shape != expected[key].shape]
    return sorted(given.keys() ^ expected.keys()) + reshaped


def _summary(differing: list[str]) -> str:
    named = ", ".join(differing[:3]) + (", ..." if len(differing) > 3 else "")
    return f"{len(differing)} keys missing, unexpected or of another shape ({named})"
