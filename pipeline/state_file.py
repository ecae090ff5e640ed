"""Reads files of weights that others wrote, without running code that they bring.

Published files of the original are `{"model": state dict}`; its training checkpoints also hold the optimizer's state,
the epoch and the command line's options (`argparse.Namespace`, with a `pathlib` path where SLURM started them). Nothing
but those two classes, tensors and plain values is unpickled.
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

from pipeline.errors import first_line

# Both hold values and do nothing when built.
_ALLOWED: list[Any] = [argparse.Namespace, pathlib.PosixPath]


class StateFile(NamedTuple):
    """What a file of weights holds."""

    state: dict[str, Tensor]
    args: dict[str, Any] | None
    """The options of the original's command line; None where the file has none."""
    epoch: int | None
    """The last epoch that was trained, counted from 0, where the file says so."""


def read_state_file(path: Path) -> StateFile:
    """Read a .safetensors file, or torch's format.

    Raises ValueError, one line without the path, for what is absent, damaged, no state dict, or would run code.
    """
    if not path.is_file():
        raise ValueError("no such file; expected a state dict (.safetensors or .pth)")
    loaded = _load(path)
    wrapped = isinstance(loaded, dict) and "model" in loaded
    state = loaded["model"] if wrapped else loaded
    if not (isinstance(state, Mapping) and all(isinstance(value, Tensor) for value in state.values()) and state):
        raise ValueError("holds no state dict; expected tensors by name, or such under the key `model`")
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
        if foreign is None:  # damaged, or an instruction that weights never need
            raise ValueError(f"not a state dict ({_without_advice(error)})") from None
        raise ValueError(
            f"holds more than tensors, which would have to run as code ({foreign[1]}); expected a plain state dict"
        ) from None
    except Exception as error:  # whatever a damaged or foreign file makes its readers stumble over
        raise ValueError(f"not a state dict ({first_line(error)})") from None


def _without_advice(error: Exception) -> str:
    """torch advises to load with code; what is wrong comes at the end."""
    return first_line(ValueError(str(error).partition("WeightsUnpickler error:")[2].strip() or "cannot be unpickled"))
