"""Import of the original's weights as a registered version, which is used like one trained here.

The architecture is read from the tensors. What they do not show comes from the options stored in the file or from flags;
assumptions are reported. The original uses category ids as labels, so a label is an id here too, and ids without a
category are named "N/A".
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import msgspec

from detr.conditional.original_config import infer_conditional, is_conditional
from detr.config import ConfigError, ModelConfig, TransformConfig
from detr.deformable.original_config import infer_deformable, is_deformable
from detr.model import DETR, build_model
from detr.original import load_original_state_dict
from detr.original_config import heads_of_mask_head, infer_config
from pipeline.config import TrackConfig
from pipeline.errors import ExchangeError
from pipeline.exchange.panoptic_labels import ORIGINAL_CLASSES, is_export_of_others, is_panoptic, with_contiguous_labels
from pipeline.exchange.state_file import StateFile, read_state_file
from pipeline.registry.card import Card
from pipeline.registry.pages import write_pages
from pipeline.registry.publish import Registered, check_names, publish
from pipeline.tracking.mlflow_client import connect
from pipeline.tracking.mlflow_runs import experiment_id, origin_tags
from pipeline.tracking.provenance import code_commit
from pipeline.tracking.tags import TAG_IMPORT_NOTES, TAG_IMPORTED_FROM
from shards.dataset.categories import UNNAMED, Category
from shards.errors import one_line
from shards.panoptic.coco_categories import coco_categories

_COCO_CLASSES = 91  # the largest category id of COCO's things plus 1
_Level = Annotated[int, msgspec.Meta(ge=0, le=255)]
_Value = TypeVar("_Value", bool, int, float)


class OriginalModel(NamedTuple):
    """Model of one of the original's files with its weights, and lines about it for the user."""

    model: DETR
    epochs: int
    """Epochs of training according to the file; 0 if it does not say."""
    notes: tuple[str, ...]


class Imported(NamedTuple):
    """Registered version of an import, and lines about it for the user."""

    registered: Registered
    notes: tuple[str, ...]


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

    `heads` and `dilation` are not shown by the tensors; they are refused if the file itself has other values.
    `categories` is a JSON file with COCO's `categories`. The version is evaluated as in the paper: DC5 and panoptic
    models one image at a time, others two. Raise `ExchangeError`, `ConfigError` or `TrackingError` with a one-line message.
    """
    check_names(name, alias)
    try:
        model, epochs, notes = read_original(path, heads=heads, dilation=dilation)
    except ConfigError:
        raise
    except ValueError as error:
        raise ExchangeError(f"{path}: {error}") from None
    named, names_source = _categories(model.num_classes, categories)
    if categories is None and model.num_classes == ORIGINAL_CLASSES and is_export_of_others(model, named):
        raise ExchangeError(
            f"{path}: was exported with other things and stuff than COCO's; expected their names: give --categories FILE"
        )
    notes = (*notes, names_source)
    if is_panoptic(named):
        classes = model.num_classes
        model, named = with_contiguous_labels(model, named)
        notes = (*notes, f"the rows of {len(named)} things and stuff are kept of a head of {classes} classes")
    with path.open("rb") as file:
        source = f"{path.name} sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
    card = _card(model, named, epochs, source)
    client = connect()
    run = client.create_run(
        experiment_id(client, TrackConfig().experiment),
        run_name=f"import {name}",
        tags={**origin_tags(f"detr import {path.name}"), TAG_IMPORTED_FROM: source, TAG_IMPORT_NOTES: "; ".join(notes)},
    )
    run_id = str(run.info.run_id)
    card = msgspec.structs.replace(card, run_id=run_id)
    try:
        registered = publish(
            client, model, card, name=name, alias=alias, retry_command=f"detr import {path} --name {name}"
        )
    except BaseException:
        client.set_terminated(run_id, "FAILED")
        raise
    client.set_terminated(run_id, "FINISHED")
    write_pages(client, name, registered.version)
    return Imported(registered, notes)


def _card(model: DETR, categories: tuple[Category, ...], epochs: int, source: str) -> Card:
    """Return the card of an imported model, still without its run."""
    return Card(
        model=model.config,
        transform=TransformConfig(),
        categories=categories,
        # One image has no padding, which moves the masks of things and stuff.
        evaluate_batch_size=1 if model.config.dilation or (model.config.masks and is_panoptic(categories)) else 2,
        evaluate_batching="padded",
        recipe="",
        run_id="",
        checkpoint="",
        step=0,
        epoch=float(epochs),
        metrics={},
        train_digest="",
        val_digest="",
        code_commit=code_commit(),
        imported_from=source,
    )


def read_original(path: Path, *, heads: int | None = None, dilation: bool = False) -> OriginalModel:
    """Build the model of one of the original's files, with its weights.

    Raise `ValueError`, one line without the path, if the file is not the original's or contradicts `heads` or `dilation`.
    """
    file = read_state_file(path)
    options = file.args or {}
    shown = heads_of_mask_head(file.state) or _option(options, "nheads", int)
    dilated = _option(options, "dilation", bool)
    _refuse_contradiction("--heads", heads, shown)
    _refuse_contradiction("--dilation", dilation or None, dilated)
    chosen: dict[str, float | None] = {
        "dropout": _option(options, "dropout", float),
        "auxiliary": _option(options, "aux_loss", bool),
    }
    infer: Callable[..., tuple[ModelConfig, int]] = infer_config
    if deformable := is_deformable(file.state):
        infer = infer_deformable
        chosen["queries"] = _option(options, "num_queries_one2one", int) or _option(options, "num_queries", int)
        chosen["look_forward_twice"] = _option(options, "look_forward_twice", bool)
    elif is_conditional(file.state):
        infer = infer_conditional
    config, classes = infer(
        file.state,
        heads=heads or shown,
        dilation=dilation or bool(dilated),
        **{field: value for field, value in chosen.items() if value is not None},
    )
    model = build_model(config, classes)
    load_original_state_dict(model, file.state)
    assumed = []
    if heads is None and shown is None:
        assumed.append(f"{config.heads} heads")
    if deformable and config.deformable.two_stage and chosen["queries"] is None:
        assumed.append(f"{config.num_queries} queries")
    if not dilation and dilated is None and config.backbone in ("resnet50", "resnet101"):
        hint = " although the file's name has dc5 in it" if "dc5" in path.name.lower() else ""
        assumed.append(f"no dilation{hint} (a DC5 model needs --dilation)")
    epochs = file.epoch + 1 if file.epoch is not None else 0
    notes = [_description(config, classes, file)]
    if assumed:
        notes.append(f"assumed, for the file does not say: {' and '.join(assumed)}")
    return OriginalModel(model.eval(), epochs, tuple(notes))


def _option(options: Mapping[str, Any], name: str, kind: type[_Value]) -> _Value | None:
    """Return the original's option `name`, or None if it is absent; raise `ValueError` if it is not a `kind`."""
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
    features = {
        config.variant: config.variant != "detr",
        "box refinement": config.deformable.box_refine,
        "two stages": config.deformable.two_stage,
        "DC5": config.dilation,
        "learned positions": config.position == "learned",
        "pre-norm": config.pre_norm,
        "mask head": config.masks,
    }
    extras = [name for name, present in features.items() if present]
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


class _Named(msgspec.Struct):
    id: int
    name: str
    isthing: Literal[0, 1] | bool | None = None
    color: tuple[_Level, _Level, _Level] | None = None


class _Annotations(msgspec.Struct):
    categories: list[_Named]


def _categories(classes: int, path: Path | None) -> tuple[tuple[Category, ...], str]:
    """Return one category per label, with the label as its id, and a line that names the source of the names."""
    known: dict[int, Category] = {}
    names: dict[int, str] = {}
    if path is not None:
        known, source = _categories_from(path, classes), f"category names from {path.name}"
    elif classes == _COCO_CLASSES:
        names, source = coco_names(), "category ids and names are COCO's"
    elif classes == ORIGINAL_CLASSES:
        source = (
            f"assumed, for the file has {classes} classes: category ids and names of things and stuff are COCO's; give "
            "--categories FILE for others"
        )
        known = dict(coco_categories())
    else:
        names = {label: str(label) for label in range(classes)}
        source = "categories are named by number; give --categories FILE (COCO's `categories`) to name them"
    known |= {label: Category(label, name) for label, name in names.items()}
    return tuple(known.get(label, Category(label, UNNAMED)) for label in range(classes)), source


def coco_names() -> dict[int, str]:
    """Return the names of COCO's 80 things by category id, as listed by torchvision."""
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

    listed = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    return {number: name for number, name in enumerate(listed) if number and name != UNNAMED}


def _categories_from(path: Path, classes: int) -> dict[int, Category]:
    try:
        content = path.read_bytes()
        if content.lstrip().startswith(b"["):
            named = msgspec.json.decode(content, type=list[_Named])
        else:
            named = msgspec.json.decode(content, type=_Annotations).categories
    except (OSError, msgspec.DecodeError) as error:
        raise ExchangeError(
            f"--categories {path}: {one_line(error)}; expected JSON with COCO's `categories` (id and name)"
        ) from None
    ids = [category.id for category in named]
    outside = [number for number in ids if not 0 <= number < classes]
    if outside or len(set(ids)) < len(ids):
        wrong = f"has category id {outside[0]}" if outside else "has an id twice"
        raise ExchangeError(
            f"--categories {path}: {wrong}; expected ids from 0 to {classes - 1}, which are the model's labels"
        )
    if len({category.isthing is None for category in named}) > 1:
        raise ExchangeError(
            f"--categories {path}: only some categories have `isthing`; expected it in all of a panoptic model, else in none"
        )
    kinds = {category.id: None if category.isthing is None else bool(category.isthing) for category in named}
    return {category.id: Category(category.id, category.name, kinds[category.id], category.color) for category in named}
