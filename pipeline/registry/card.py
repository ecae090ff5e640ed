"""Files of a registered version: weights (safetensors) and a card (JSON, read strictly), so that nothing is unpickled.

The card describes how to use the weights and where they came from.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
from safetensors.torch import load_file, save_file

from detr.compute import Tf32, set_channels_last
from detr.config import ModelConfig, TransformConfig
from detr.model import DETR, build_model
from detr.original import load_original_state_dict, to_original_state_dict
from pipeline.config import Batching
from pipeline.errors import RegistryError
from shards.dataset.categories import Category

WEIGHTS_NAME = "model.safetensors"
CARD_NAME = "card.json"
DETECTOR_FOLDER = "artifacts/detector"
"""Folder of both in a version, as MLflow names an artifact `detector`."""
FORMAT = 1


class Card(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Description of a set of weights: model, image transform, categories and origin.

    That of an imported model has the run that recorded the import, and empty values in the fields about training.
    """

    format: int = FORMAT
    model: ModelConfig
    transform: TransformConfig
    categories: tuple[Category, ...]
    evaluate_batch_size: int
    evaluate_batching: Batching = "padded"
    """Rule for evaluation batches. Cards of older versions lack it; those models were evaluated `padded`."""
    channels_last: bool = False
    """Memory layout of the evaluation; another one changes results by rounding."""
    tf32: Tf32 = "auto"
    """Rounding of fp32 products on a GPU (`compute.tf32`), in which the run was evaluated."""
    deterministic: bool = False
    """True if the run summed in one order (`compute.deterministic`)."""
    ema: float = 0.0
    """Decay of the moving average that the weights are (`optim.ema`); 0: they are no average."""
    recipe: str
    run_id: str
    checkpoint: str
    step: int
    epoch: float
    metrics: dict[str, float]
    train_digest: str
    val_digest: str
    code_commit: str
    imported_from: str = ""
    """Name and SHA-256 of the file that the weights were imported from; empty if they were trained here."""

    @property
    def panoptic(self) -> bool:
        """True if the model divides pictures into segments of things and stuff."""
        return self.model.masks and any(category.isthing is not None for category in self.categories)


def write_folder(folder: Path, model: DETR, card: Card) -> None:
    """Write the weights, under the original's parameter names, and the card."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().cpu().contiguous() for name, value in to_original_state_dict(model).items()}
    save_file(weights, folder / WEIGHTS_NAME)
    (folder / CARD_NAME).write_bytes(msgspec.json.format(msgspec.json.encode(card), indent=2))
    # safetensors lets only the owner read its files; a server of the store is another user.
    (folder / WEIGHTS_NAME).chmod((folder / CARD_NAME).stat().st_mode & 0o777)


def read_card(folder: Path) -> Card:
    """Read a card; raise `RegistryError` if it is missing, damaged or has unknown fields."""
    try:
        return msgspec.json.decode((folder / CARD_NAME).read_bytes(), type=Card)
    except (OSError, msgspec.DecodeError) as error:
        raise RegistryError(
            f"{folder / CARD_NAME} cannot be used ({error}); expected a model registered by `detr`"
        ) from None


def read_model(folder: Path) -> tuple[DETR, Card]:
    """Return the model, in evaluation mode on the CPU, and its card."""
    card = read_card(folder)
    model = build_model(card.model, len(card.categories))
    load_original_state_dict(model, load_file(folder / WEIGHTS_NAME))
    if card.channels_last:
        set_channels_last(model)
    return model.eval(), card
