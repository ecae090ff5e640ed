"""Weights from elsewhere: the original's state dicts, whose keys this package shares, and torchvision's ResNets.

If a state dict differs from the model, nothing is loaded; the error says which configuration field the difference
points to.

The original keeps the detector of a model with masks in `detr.`, next to `bbox_attention.` and `mask_head.`; here its
modules have no prefix. This module adds and removes it.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from detr.backbone import ResNet
from detr.mask_head import MASK_MODULES
from detr.model import DETR

_DETECTOR = "detr."
_IN_DECODER = "transformer.decoder."
_COUNTERS = ("num_batches_tracked", "total_ops", "total_params")
# The first prefix that fits a differing key explains the difference; a list of keys would not.
_EXPLANATIONS = {
    "class_embed.": "it was trained for another number of classes",
    "query_embed.": "it has other num_queries or hidden_dim",
    "bbox_embed.": "it is of another variant, or one of the two refines boxes or has two stages",
    "input_proj.": "it is of another variant, or has other levels",
    "backbone.1.": "one of the two has learned positions (position)",
    "backbone.0.body.": "it has another backbone or norm",
    "transformer.encoder.norm.": "one of the two normalises first (pre_norm)",
    "transformer.": "its transformer has other encoder_layers, decoder_layers, hidden_dim or feedforward_dim",
}


def load_original_state_dict(model: DETR, state_dict: Mapping[str, Tensor]) -> None:
    """Load the `model` entry of an original checkpoint, or what `to_original_state_dict` returned.

    Raise `ValueError` if a key is missing, unexpected or of another shape.
    """
    given = _without_counters(state_dict)
    _check(model, given, to_original_state_dict(model))
    for alias, name in model.aliases().items():
        if not torch.equal(given.pop(alias), given[name]):
            raise ValueError(
                f"state dict: got {alias} unlike {name}, expected the same tensor; it was changed after training"
            )
    model.load_state_dict({key.removeprefix(_DETECTOR): value for key, value in given.items()}, strict=False)


def load_detector_state_dict(model: DETR, state_dict: Mapping[str, Tensor]) -> None:
    """Load a detector without masks into a model with masks; the mask head keeps its initial weights.

    It is used to train masks in two steps (section 4.4): the detector first, then the head alone, after
    `freeze_detector`. The state dict is one for `load_original_state_dict`, without a mask head. Raise `ValueError` if a
    key of the detector is missing, unexpected or of another shape.
    """
    given = _without_counters(state_dict)
    own = _without_counters(model.state_dict())
    _check(model, given, {key: value for key, value in own.items() if not key.startswith(MASK_MODULES)})
    model.load_state_dict(given, strict=False)


def to_original_state_dict(model: DETR) -> dict[str, Tensor]:
    """Return the model's state under the original's keys, without batch norm's counters.

    They are the model's own keys; in a model with a mask head, those of the detector get the prefix `detr.`. A tensor
    that the original holds under several names is there under each, as a copy.
    """
    state = _without_counters(model.state_dict())
    state |= {alias: state[name].clone() for alias, name in model.aliases().items()}
    if not model.config.masks:
        return state
    return {key if key.startswith(MASK_MODULES) else _DETECTOR + key: value for key, value in state.items()}


def load_backbone_weights(model: DETR | ResNet, state_dict: Mapping[str, Tensor]) -> None:
    """Load the state dict of a torchvision ResNet, or of this package's `ResNet`, as the model's backbone.

    The classifier (`fc.*`) is ignored. Raise `ValueError` if any other key is missing, unexpected or of another shape.
    """
    body: nn.Module = model.get_submodule("backbone.0.body") if isinstance(model, DETR) else model
    given = {key: value for key, value in _without_counters(state_dict).items() if not key.startswith("fc.")}
    if differing := _differing(given, _without_counters(body.state_dict())):
        raise ValueError(
            f"backbone weights: got {_summary(differing)}, expected the backbone's own keys; "
            "choose the ModelConfig.backbone and norm that the weights were trained with"
        )
    body.load_state_dict(given, strict=False)


def with_class_rows(
    model: DETR, state_dict: Mapping[str, Tensor], change: Callable[[str, Tensor], Tensor]
) -> dict[str, Tensor]:
    """Return the state dict with the rows of all class heads changed: `change` takes an original name and its rows.

    Row 0 of the head that ranks the proposals of a second stage stays in its place, since it is no class there.
    """
    changed = dict(state_dict)
    for name in class_heads(state_dict):
        changed[name] = change(name, state_dict[name])
        if model.proposal_head and name.removeprefix(_IN_DECODER).startswith(model.proposal_head):
            changed[name] = changed[name].clone()
            changed[name][0] = state_dict[name][0]
    return changed


def class_heads(state_dict: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the weights and biases of all class heads, under every name of the original."""
    return [name for name in state_dict if "class_embed." in name]


def _check(model: DETR, given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    if not (differing := _differing(given, expected)):
        return
    raise ValueError(
        f"state dict: got {_summary(differing)}, expected the keys of {model.config} with {model.num_classes} "
        f"classes; {_explain(differing, given, expected)}"
    )


def _explain(differing: list[str], given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    masks_given = any(key.startswith(_DETECTOR) for key in given)
    masks_expected = any(key.startswith(_DETECTOR) for key in expected)
    if masks_given and not masks_expected:
        return "it is a segmentation model, whose detector is under the prefix 'detr.'"
    if masks_expected and not masks_given:
        return "it has no mask head: load_detector_state_dict takes a detector alone"
    names = [key.removeprefix(_DETECTOR) for key in differing]
    for prefix, explanation in _EXPLANATIONS.items():
        if any(name.startswith(prefix) for name in names):
            return explanation
    return "it is not a DETR"


def _without_counters(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # Trainable batch norm counts its batches; frozen batch norm, here and in the original, does not. A profiler left its
    # counts in published files of Deformable DETR.
    return {key: value for key, value in state_dict.items() if not key.endswith(_COUNTERS)}


def _differing(given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    reshaped = [key for key in expected if key in given and given[key].shape != expected[key].shape]
    return sorted(given.keys() ^ expected.keys()) + reshaped


def _summary(differing: list[str]) -> str:
    named = ", ".join(differing[:3]) + (", ..." if len(differing) > 3 else "")
    return f"{len(differing)} keys missing, unexpected or of another shape ({named})"
