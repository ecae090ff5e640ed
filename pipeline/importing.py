"""Weights of the original implementation become a registered version that is used like one trained here.

What the tensors show is read off them; what they do not show comes from the file's own options or from flags, and what
had to be assumed is said. The original takes category ids as labels, so a label is an id here too, and ids that no
category has are named "N/A".
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec

from detr.config import ConfigError, ModelConfig, TransformConfig
from detr.model import DETR, build_model
from detr.original import load_original_state_dict
from detr.recognise import heads_of_mask_head, recognise
from pipeline.config import TrackConfig
from pipeline.errors import ExchangeError, first_line
from pipeline.mlflow_store import TAG_IMPORTED, code_commit, connect, experiment_id, origin_tags
from pipeline.predict import UNNAMED, Card
from pipeline.publish import Registered, check_names, publish
from pipeline.state_file import StateFile, read_state_file
from shards.manifest import Category

_COCO_CLASSES = 91  # the largest category id of COCO's things, and one
_PANOPTIC_CLASSES = 250  # the original's room for things and stuff; things have the ids they always have
_Value = TypeVar("_Value", bool, int, float)


class Recognised(NamedTuple):
    """A file's model with its weights, and what a person should know about it."""

    model: DETR
    epochs: int
    """Epochs of training that the file speaks of; 0 where it says nothing."""
    said: tuple[str, ...]


class Imported(NamedTuple):
    """What an import came to."""

    registered: Registered
    said: tuple[str, ...]


def import_file(
    path: Path,
    *,
    name: str,
    alias: str = "best",
    heads: int | None = None,
    dilation: bool = False,
    categories: Path | None = None,
) -> Imported:
    """Register the model of one of the original's files as a version of `name`, and point `alias` at it.

    heads, dilation: what the tensors do not show; refused where the file itself says otherwise. categories: a JSON file
    with COCO's `categories`. The version evaluates as in the paper, DC5 models one image at a time, others two. Raises
    `ExchangeError`, `ConfigError` or `TrackingError`, each one line.
    """
    check_names(name, alias)
    try:
        model, epochs, said = read_original(path, heads=heads, dilation=dilation)
    except ConfigError:
        raise
    except ValueError as error:
        raise ExchangeError(f"{path}: {error}") from None
    named, how = _categories(model.num_classes, categories)
    said = (*said, how)
    with path.open("rb") as file:
        source = f"{path.name} sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
    client = connect()
    run = client.create_run(
        experiment_id(client, TrackConfig().experiment),
        run_name=f"import {name}",
        tags={**origin_tags(f"detr import {path.name}"), TAG_IMPORTED: source, "detr.imported": "; ".join(said)},
    )
    run_id = str(run.info.run_id)
    card = Card(
        model=model.config,
        transform=TransformConfig(),
        categories=named,
        evaluate_batch_size=1 if model.config.dilation else 2,
        evaluate_batching="padded",
        recipe="",
        run_id=run_id,
        checkpoint="",
        step=0,
        epoch=float(epochs),
        metrics={},
        train_digest="",
        val_digest="",
        code_commit=code_commit(),
        imported_from=source,
    )
    try:
        done = publish(client, model, card, name=name, alias=alias, again=f"detr import {path} --name {name}")
    except BaseException:
        client.set_terminated(run_id, "FAILED")
        raise
    client.set_terminated(run_id, "FINISHED")
    return Imported(done, said)


def read_original(path: Path, *, heads: int | None = None, dilation: bool = False) -> Recognised:
    """Build the model of one of the original's files, with its weights.

    Raises ValueError, one line without the path, for what is no such file or contradicts `heads` or `dilation`.
    """
    file = read_state_file(path)
    options = file.args or {}
    shown = heads_of_mask_head(file.state) or _option(options, "nheads", int)
    dilated = _option(options, "dilation", bool)
    _refuse_contradiction("--heads", heads, shown)
    _refuse_contradiction("--dilation", dilation or None, dilated)
    chosen = {"dropout": _option(options, "dropout", float), "auxiliary": _option(options, "aux_loss", bool)}
    config, classes = recognise(
        file.state,
        heads=heads or shown,
        dilation=dilation or bool(dilated),
        **{field: value for field, value in chosen.items() if value is not None},
    )
    model = build_model(config, classes)
    load_original_state_dict(model, file.state)
    assumed = [f"{config.heads} heads"] * (heads is None and shown is None)
    if not dilation and dilated is None and config.backbone in ("resnet50", "resnet101"):
        named = " although the file's name has dc5 in it" if "dc5" in path.name.lower() else ""
        assumed.append(f"no dilation{named} (a DC5 model needs --dilation)")
    epochs = file.epoch + 1 if file.epoch is not None else 0
    return Recognised(model.eval(), epochs, (_description(config, classes, file), *_assumption(assumed)))


def _option(options: Mapping[str, Any], name: str, kind: type[_Value]) -> _Value | None:
    """One of the original's options, None where it has none of the name."""
    value = options.get(name)
    if value is None:
        return None
    fits = isinstance(value, bool) if kind is bool else isinstance(value, (int, kind)) and not isinstance(value, bool)
    if not fits:
        raise ValueError(f"its args say {name}={value!r}; expected {kind.__name__}")
    return kind(value)


def _refuse_contradiction(flag: str, given: int | None, shown: int | None) -> None:
    if given is not None and shown is not None and given != shown:
        raise ValueError(f"{flag} was given, but the file itself says {shown}; leave out {flag}")


def _description(config: ModelConfig, classes: int, file: StateFile) -> str:
    extras = [
        word
        for word, there in (
            ("DC5", config.dilation),
            ("learned positions", config.position == "learned"),
            ("pre-norm", config.pre_norm),
            ("mask head", config.masks),
        )
        if there
    ]
    return ", ".join(
        [
            config.backbone,
            *extras,
            f"{config.encoder_layers} + {config.decoder_layers} layers",
            f"width {config.hidden_dim}",
            f"{config.heads} heads",
            f"{config.num_queries} queries",
            f"{classes} classes",
            *([f"trained for {file.epoch + 1} epochs"] if file.epoch is not None else []),
        ]
    )


def _assumption(assumed: list[str]) -> tuple[str, ...]:
    return (f"assumed, for the file does not say: {' and '.join(assumed)}",) if assumed else ()


class _Named(msgspec.Struct):
    id: int
    name: str


class _Annotations(msgspec.Struct):
    categories: list[_Named]


def _categories(classes: int, path: Path | None) -> tuple[tuple[Category, ...], str]:
    """One category per label, whose id is the label, and where the names are from."""
    if path is not None:
        names, how = _names_from(path, classes), f"category names from {path.name}"
    elif classes == _COCO_CLASSES:
        names, how = coco_names(), "category ids and names are COCO's"
    elif classes == _PANOPTIC_CLASSES:
        stuff = {label: str(label) for label in range(_COCO_CLASSES, classes)}
        names, how = coco_names() | stuff, "category ids are COCO's, and the names of things; stuff is named by number"
    else:
        names = {label: str(label) for label in range(classes)}
        how = "categories are named by number; give --categories FILE (COCO's `categories`) to name them"
    return tuple(Category(label, names.get(label, UNNAMED)) for label in range(classes)), how


def coco_names() -> dict[int, str]:
    """COCO's 80 things by category id, as torchvision's weights list them."""
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

    listed = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    return {number: name for number, name in enumerate(listed) if number and name != UNNAMED}


def _names_from(path: Path, classes: int) -> dict[int, str]:
    try:
        content = path.read_bytes()
        if content.lstrip().startswith(b"["):
            named = msgspec.json.decode(content, type=list[_Named])
        else:
            named = msgspec.json.decode(content, type=_Annotations).categories
    except (OSError, msgspec.DecodeError) as error:
        raise ExchangeError(
            f"--categories {path}: {first_line(error)}; expected JSON with COCO's `categories` (id and name)"
        ) from None
    outside = [one.id for one in named if not 0 <= one.id < classes]
    if outside or len({one.id for one in named}) < len(named):
        wrong = f"has category id {outside[0]}" if outside else "has an id twice"
        raise ExchangeError(
            f"--categories {path}: {wrong}; expected ids from 0 to {classes - 1}, which are the model's labels"
        )
    return {one.id: one.name for one in named}
