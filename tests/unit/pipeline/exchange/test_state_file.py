"""Files of weights from elsewhere: what they bring is read, what would run is refused, what is damaged is one line."""

import argparse
import os
import pathlib
import random
import re
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pipeline.exchange.state_file import read_state_file

STATE = OrderedDict(a=torch.arange(6.0).view(2, 3), b=torch.ones(4))


def training_checkpoint(**options: Any) -> dict[str, Any]:
    """All that the original's main.py saves, from real torch objects."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([{"params": [weight]}, {"params": [torch.nn.Parameter(torch.ones(2))], "lr": 1e-5}])
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 200)
    weight.sum().backward()
    optimizer.step()
    scheduler.step()
    return {
        "model": STATE,
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": scheduler.state_dict(),
        "epoch": 7,
        "args": argparse.Namespace(nheads=8, dilation=False, **options),
    }


@pytest.mark.parametrize("old_format", [False, True], ids=["zip", "before torch 1.6"])
def test_a_training_checkpoint_gives_weights_options_and_epoch(tmp_path: Path, old_format: bool) -> None:
    path = tmp_path / "checkpoint.pth"
    # A job of the original's on SLURM keeps its folder as a path.
    saved = training_checkpoint(output_dir=pathlib.PosixPath("/x/y"))
    torch.save(saved, path, _use_new_zipfile_serialization=not old_format)
    file = read_state_file(path)
    assert list(file.state) == ["a", "b"]
    assert all(torch.equal(file.state[name], STATE[name]) for name in STATE)
    assert file.args == {"nheads": 8, "dilation": False, "output_dir": Path("/x/y")}
    assert file.epoch == 7


@pytest.mark.parametrize("kind", ["published", "plain", "safetensors"])
def test_a_file_without_options_gives_its_weights(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pth")
    if kind == "safetensors":
        save_file(STATE, path)
    else:
        torch.save({"model": STATE} if kind == "published" else STATE, path)
    file = read_state_file(path)
    assert {name: value.tolist() for name, value in file.state.items()} == {k: v.tolist() for k, v in STATE.items()}
    assert (file.args, file.epoch) == (None, None)


@dataclass
class Bomb:
    """Unpickling it as pickle would makes a file."""

    target: Path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


class Foreign:
    """Harmless, and nobody asked for it."""


@pytest.mark.parametrize("old_format", [False, True], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("place", ["alone", "beside", "in args", "in the state", "in the optimizer"])
def test_code_is_refused_by_name_and_not_run(tmp_path: Path, place: str, old_format: bool) -> None:
    bomb = Bomb(tmp_path / "harm")
    contents: dict[str, Any] = {
        "alone": bomb,
        "beside": training_checkpoint() | {"extra": bomb},
        "in args": training_checkpoint(extra=bomb),
        "in the state": {"model": {**STATE, "c": bomb}},
        "in the optimizer": training_checkpoint() | {"optimizer": [bomb]},
    }
    torch.save(contents[place], tmp_path / "w.pth", _use_new_zipfile_serialization=not old_format)
    with pytest.raises(ValueError, match=r"would have to run as code \((posix|os)\.mkdir\)") as caught:
        read_state_file(tmp_path / "w.pth")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "harm").exists()
    # The same file does harm where code is run: the test would notice.
    torch.load(tmp_path / "w.pth", weights_only=False)
    assert (tmp_path / "harm").exists()


def test_a_foreign_class_is_refused_by_name(tmp_path: Path) -> None:
    torch.save(training_checkpoint(extra=Foreign()), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=re.escape(f"({Foreign.__module__}.Foreign)")):
        read_state_file(tmp_path / "w.pth")


def test_the_classes_that_pass_here_pass_nowhere_else(tmp_path: Path) -> None:
    before = torch.serialization.get_safe_globals()
    assert argparse.Namespace not in before
    torch.save(training_checkpoint(), tmp_path / "w.pth")
    read_state_file(tmp_path / "w.pth")
    assert set(torch.serialization.get_safe_globals()) == set(before)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(1)], "holds no state dict; expected tensors by name"),
        ({"model": {"epoch": 3}}, "holds no state dict"),
        ({"state_dict": STATE}, "at the top or under the key `model`"),
        ({"model": None}, "holds no state dict"),
        ({}, "holds no state dict"),
        (7, "holds no state dict"),
    ],
)
def test_a_file_without_a_state_dict_gives_one_line(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=message) as caught:
        read_state_file(tmp_path / "w.pth")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("old_format", [False, True], ids=["zip", "before torch 1.6"])
def test_a_damaged_file_is_one_line_or_whole(tmp_path: Path, old_format: bool) -> None:
    path, chance = tmp_path / "w.pth", random.Random(0)
    torch.save(training_checkpoint(), path, _use_new_zipfile_serialization=not old_format)
    whole = path.read_bytes()
    for _ in range(40):
        path.write_bytes(whole[: chance.randrange(len(whole) - 100)])
        notes = refusal(path)
        assert notes is not None
        assert "\n" not in notes
    for _ in range(200):
        changed = bytearray(whole)
        changed[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        path.write_bytes(changed)
        assert "\n" not in (refusal(path) or "")


def refusal(path: Path) -> str | None:
    """Return the error about the file, None if it can be read. Only a ValueError may be raised."""
    try:
        read_state_file(path)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", ["empty.pth", "text.pth", "text.safetensors", "absent.pth", "."])
def test_a_file_without_weights_gives_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty.pth").touch()
    for text in ("text.pth", "text.safetensors"):
        (tmp_path / text).write_text("no weights")
    with pytest.raises(ValueError, match=r"not a state dict|no such file") as caught:
        read_state_file(tmp_path / name)
    assert "\n" not in str(caught.value)
