from types import SimpleNamespace

import msgspec
import pytest
import torch

from detr.config import ModelConfig, TransformConfig
from pipeline.checkpoint.location import location
from pipeline.config import ComputeConfig, RunConfig
from pipeline.inference import evaluate as evaluating
from pipeline.registry import registration
from pipeline.registry.card import Card
from shards.dataset.categories import Category
from tests.support.cards import make_card


def settings() -> tuple[bool, bool, bool]:
    matmul, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    return matmul.allow_tf32, convolutions.allow_tf32, torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    ("tf32", "deterministic", "expected"),
    [("no", False, (False, False, False)), ("yes", True, (True, True, True)), ("auto", False, None)],
)
def test_a_version_is_scored_in_the_arithmetic_of_its_run(
    tf32: str, deterministic: bool, expected: tuple[bool, bool, bool] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = settings()
    card = make_card(ModelConfig(), TransformConfig(), (Category(1, "thing"),))
    card = msgspec.structs.replace(card, tf32=tf32, deterministic=deterministic)
    monkeypatch.setattr(evaluating, "read_version", lambda uri: (torch.nn.Identity(), card))
    for name in ("load_manifest", "check_sizes", "check_fits_cache"):
        monkeypatch.setattr(evaluating, name, lambda given: given)
    monkeypatch.setattr(evaluating, "evaluate_model", lambda *given, **named: settings())
    assert evaluating.evaluate("models:/tiny/1", "data") == (expected or before)
    monkeypatch.setattr(evaluating, "evaluate_layers", lambda *given, **named: settings())
    assert evaluating.evaluate_per_layer("models:/tiny/1", "data") == (expected or before)
    assert settings() == before


def test_the_card_of_a_version_keeps_the_arithmetic_of_its_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stopped(Exception):
        """Raised in place of publishing."""

    def publish(client: object, model: object, card: Card, **_: object) -> None:
        raise Stopped(card.tf32, card.deterministic)

    manifest = SimpleNamespace(num_classes=1, categories=(Category(1, "thing"),), digest="")
    meta = SimpleNamespace(ema=0.0, step=1, epoch=1.0, train_digest="", code_commit="")
    monkeypatch.setattr(registration, "load_manifest", lambda url: manifest)
    monkeypatch.setattr(registration, "read_meta", lambda path: meta)
    monkeypatch.setattr(registration, "build_trainable_model", lambda config, classes: None)
    monkeypatch.setattr(registration.checkpoint_state, "load_weights", lambda path, model, averaged: None)
    monkeypatch.setattr(registration, "holder_if_known", lambda client, name, alias: None)
    monkeypatch.setattr(registration, "publish", publish)
    config = RunConfig(compute=ComputeConfig(tf32="no", deterministic=True))
    with pytest.raises(Stopped) as stopped:
        registration.register(object(), "r", config, location("checkpoint"), {}, name="tiny", alias="best")
    assert stopped.value.args == ("no", True)
