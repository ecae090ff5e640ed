"""First weights of a run: the backbone's, files that hold none, and the file that the workers read."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from detr.model import DETR
from detr.original import to_original_state_dict
from pipeline.config import RunConfig
from pipeline.distributed.ranks import Ranks
from pipeline.driver.initial_weights import initial_model
from pipeline.errors import CheckpointError, RunConfigError
from pipeline.training.model import read_initial, save_initial
from shards.errors import one_line
from tests.support.first_weights import CLASSES, assert_same, seeded

BACKBONE = "backbone.0.body."


def backbone_of(model: DETR) -> dict[str, Tensor]:
    state = to_original_state_dict(model)
    return {name.removeprefix(BACKBONE): value for name, value in state.items() if name.startswith(BACKBONE)}


def with_backbone(config: RunConfig, path: Path | str) -> RunConfig:
    return replace(config, model=replace(config.model, backbone_weights=str(path)))


def test_random_weights_depend_on_the_seed_and_are_reported(tiny_config: RunConfig) -> None:
    one, notes = initial_model(tiny_config, CLASSES, None)
    torch.manual_seed(0)
    two, _ = initial_model(tiny_config, CLASSES, None)
    other, _ = initial_model(replace(tiny_config, seed=1), CLASSES, None)
    assert notes == ("the backbone starts from random weights, as asked",)
    assert_same(to_original_state_dict(one), to_original_state_dict(two))
    assert not torch.equal(one.class_embed.weight, other.class_embed.weight)


@pytest.mark.parametrize("kind", ["safetensors", "pth", "pth under model"])
def test_the_backbone_starts_from_a_file(tiny_config: RunConfig, tmp_path: Path, kind: str) -> None:
    weights = backbone_of(seeded(tiny_config, 4))
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pth")
    if kind == "safetensors":
        save_file(weights, path)
    else:
        torch.save({"model": weights} if "under" in kind else weights, path)
    model, notes = initial_model(with_backbone(tiny_config, path), CLASSES, None)
    assert_same(backbone_of(model), weights)
    assert notes == (f"the backbone starts from {path}",)


@dataclass
class Bomb:
    target: Path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.target,)


def test_a_pickle_with_code_is_refused_and_not_run(tiny_config: RunConfig, tmp_path: Path) -> None:
    for number, content in enumerate((Bomb(tmp_path / "harm"), {"model": {}, "extra": Bomb(tmp_path / "harm")})):
        path = tmp_path / f"{number}.pth"
        torch.save(content, path)
        with pytest.raises(RunConfigError, match="holds more than tensors, which would have to run as code") as caught:
            initial_model(with_backbone(tiny_config, path), CLASSES, None)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "harm").exists()


def bad_files(folder: Path) -> dict[str, Path]:
    paths = {name: folder / name for name in ("empty.pth", "text.pth", "list.pth", "text.safetensors", "plain.pth")}
    paths["empty.pth"].write_bytes(b"")
    paths["text.pth"].write_text("no weights")
    paths["text.safetensors"].write_text("no weights")
    torch.save([torch.zeros(1)], paths["list.pth"])
    torch.save({"epoch": 3}, paths["plain.pth"])
    return paths | {"absent": folder / "absent.pth", "folder": folder}


@pytest.mark.parametrize(
    "name", ["empty.pth", "text.pth", "list.pth", "text.safetensors", "plain.pth", "absent", "folder"]
)
@pytest.mark.parametrize("option", ["model.backbone-weights", "initial"])
def test_a_wrong_file_gives_one_line_with_option_and_file(
    tiny_config: RunConfig, tmp_path: Path, name: str, option: str
) -> None:
    path = bad_files(tmp_path)[name]
    config = replace(tiny_config, initial=str(path)) if option == "initial" else with_backbone(tiny_config, path)
    with pytest.raises(RunConfigError) as caught:
        initial_model(config, CLASSES, None)
    assert str(caught.value).startswith(f"--{option} {path}: ")
    assert "\n" not in str(caught.value)


def test_weights_of_another_backbone_are_refused(tiny_config: RunConfig, tmp_path: Path) -> None:
    save_file({"conv1.weight": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(RunConfigError, match=r"--model\.backbone-weights .*expected the backbone's own keys"):
        initial_model(with_backbone(tiny_config, tmp_path / "w.safetensors"), CLASSES, None)


def test_there_are_no_imagenet_weights_of_the_tiny_backbone(tiny_config: RunConfig) -> None:
    with pytest.raises(RunConfigError, match="no ImageNet weights of backbone 'tiny'; expected one of resnet18"):
        initial_model(with_backbone(tiny_config, "imagenet"), CLASSES, None)


def test_an_unreachable_host_gives_no_random_weights(
    tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from torchvision.models import ResNet18_Weights

    def unreachable(*_: object, **__: object) -> None:
        print("Downloading: https://...", file=sys.stderr)  # as torch does
        raise OSError("Name or service not known\nmore")

    monkeypatch.setattr(ResNet18_Weights, "get_state_dict", unreachable)
    config = replace(tiny_config, model=replace(tiny_config.model, backbone="resnet18", backbone_weights="imagenet"))
    with pytest.raises(RunConfigError, match=r"could not be fetched \(Name or service not known\).*`random`") as caught:
        initial_model(config, CLASSES, None)
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().err == ""


def test_an_error_without_a_message_is_named_by_its_class() -> None:
    assert one_line(KeyboardInterrupt()) == "KeyboardInterrupt"
    assert one_line(OSError("one\ntwo")) == "one"


def test_a_state_dict_that_is_no_detr_is_one_line(tiny_config: RunConfig, tmp_path: Path) -> None:
    path = tmp_path / "backbone.safetensors"
    save_file(backbone_of(seeded(tiny_config, 4)), path)
    with pytest.raises(RunConfigError, match=r"^--initial .*backbone.safetensors: ") as caught:
        initial_model(replace(tiny_config, initial=str(path)), CLASSES, None)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_not_the_driver_s_is_one_line(tiny_config: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"initial\.safetensors is not there on .*--storage that every node sees"):
        read_initial(seeded(tiny_config, 4), tmp_path, Ranks())


def test_the_first_weights_stay_with_the_run(tiny_config: RunConfig, tmp_path: Path) -> None:
    model = seeded(tiny_config, 4)
    save_initial(model, tmp_path / "new" / "run")
    other = seeded(tiny_config, 4, seed=8)
    read_initial(other, tmp_path / "new" / "run", Ranks())
    assert_same(to_original_state_dict(other), to_original_state_dict(model))
