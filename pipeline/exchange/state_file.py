"""Reader for weight files from other sources, which runs no code that they contain.

Published files of the original are `{"model": state dict}`; its training checkpoints also hold the optimizer's state,
the epoch and the command-line options (`argparse.Namespace`, with a `pathlib` path if SLURM started them). Only those two
classes, tensors and plain values are unpickled.
"""

from __future__ import annotations

import argparse
import pathlib
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from shards.errors import one_line

# Building either of them runs no code of the file.
_ALLOWED: list[Any] = [argparse.Namespace, pathlib.PosixPath]


class StateFile(NamedTuple):
    """Content of a weight file."""

    state: dict[str, Tensor]
    args: dict[str, Any] | None
    """Command-line options of the original; None if the file has none."""
    epoch: int | None
    """Last epoch that was trained, counted from 0; None if the file does not say."""


def read_state_file(path: Path) -> StateFile:
    """Read a .safetensors file or a file in torch's format.

    Raise `ValueError`, one line without the path, if the file is missing, damaged, no state dict, or would run code.
    """
    if not path.is_file():
        raise ValueError("no such file; expected a state dict (.safetensors or .pth)")
    loaded = _load(path)
    wrapped = isinstance(loaded, dict) and "model" in loaded
    state = loaded["model"] if wrapped else loaded
    if not (isinstance(state, Mapping) and all(isinstance(value, Tensor) for value in state.values()) and state):
        raise ValueError("holds no state dict; expected tensors by name, at the top or under the key `model`")
    args = loaded.get("args") if wrapped else None
    epoch = loaded.get("epoch") if wrapped else None
    return StateFile(
        {str(name): value for name, value in state.items()},
        vars(args) if isinstance(args, argparse.Namespace) else None,
        epoch if isinstance(epoch, int) else None,
    )


def _load(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(_ALLOWED):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
        if foreign is None:  # damaged, or a pickle instruction that weights never need
            raise ValueError(f"not a state dict ({_without_advice(error)})") from None
        raise ValueError(
            f"holds more than tensors, which would have to run as code ({foreign[1]}); expected a plain state dict"
        ) from None
    except Exception as error:  # damaged and foreign files raise errors of many types
        raise ValueError(f"not a state dict ({one_line(error)})") from None


def _without_advice(error: Exception) -> str:
    """Return torch's message without its advice to load the file with code; the reason is at the end."""
    return one_line(ValueError(str(error).partition("WeightsUnpickler error:")[2].strip() or "cannot be unpickled"))
