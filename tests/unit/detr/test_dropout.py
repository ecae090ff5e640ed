"""Dropout on a CPU: as many zeros as asked for, the mean kept, and nothing that repeats between neighbours."""

import pytest
import torch

from detr.config import ModelConfig
from detr.dropout import Dropout, drawn, kept_share
from detr.transformer import Attention


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_the_share_of_zeros_and_the_mean_are_right(probability: float) -> None:
    torch.manual_seed(0)
    x = torch.ones(1000, 401)  # not a multiple of the four elements that share a number
    dropped = Dropout(probability).train()(x)
    assert (dropped == 0).float().mean().item() == pytest.approx(probability, abs=3e-3)
    assert dropped.mean().item() == pytest.approx(1.0, abs=1e-2 / (1 - probability))
    assert dropped.unique().numel() == 2


def test_a_probability_next_to_1_still_keeps_something() -> None:
    assert kept_share(1 - 1e-9) > 0
    assert Dropout(1 - 1e-9).train()(torch.ones(64)).isfinite().all()


def test_elements_that_share_a_number_are_independent() -> None:
    torch.manual_seed(0)
    quarters = drawn(torch.Size((400_000, 4)), 0.5).float()
    correlation = torch.corrcoef(quarters.T)
    assert (correlation - torch.eye(4)).abs().max() < 0.01
    assert kept_share(0.5) == 0.5


def test_the_gradient_passes_where_the_value_does() -> None:
    torch.manual_seed(0)
    x = torch.rand(50, 50, requires_grad=True)
    dropped = Dropout(0.3).train()(x)
    dropped.sum().backward()
    assert torch.equal(x.grad == 0, dropped == 0)
    torch.testing.assert_close(x.grad.max().item(), 1 / kept_share(0.3))


def test_a_seed_gives_the_same_zeros_and_evaluation_none() -> None:
    x = torch.ones(64, 64)
    found = []
    for _ in range(2):
        torch.manual_seed(7)
        found.append(Dropout(0.1).train()(x))
    assert torch.equal(*found)
    assert Dropout(0.1).eval()(x) is x
    assert Dropout(0.0).train()(x) is x


@pytest.mark.parametrize("masked", [False, True])
def test_attention_that_computes_its_scores_twice_is_the_plain_one(
    masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    attention = Attention(ModelConfig(hidden_dim=32, heads=4, dropout=0.0)).train()
    inputs = [torch.randn(2, length, 32, requires_grad=True) for length in (5, 9, 9)]
    mask = torch.arange(9).expand(2, 1, 1, 9) < torch.tensor([9, 6]).view(2, 1, 1, 1) if masked else None
    results = []
    for many in (1 << 30, 0):
        monkeypatch.setattr("detr.transformer._MANY_SCORES", many)
        out = attention(*inputs, mask)
        results.append((out, *torch.autograd.grad(out.square().sum(), [*inputs, *attention.parameters()])))
    for plain, twice in zip(*results, strict=True):
        torch.testing.assert_close(plain, twice, atol=1e-5, rtol=1e-5)


def test_attention_that_computes_its_scores_twice_drops_them_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient is that of the value: a finite difference with the same seed agrees."""
    monkeypatch.setattr("detr.transformer._MANY_SCORES", 0)
    torch.manual_seed(0)
    attention = Attention(ModelConfig(hidden_dim=8, heads=2, dropout=0.4)).double().train()
    query, other = torch.randn(1, 3, 8, dtype=torch.float64), torch.randn(1, 4, 8, dtype=torch.float64)

    def value(key: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)
        return attention(query, key, other)

    key = torch.randn(1, 4, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(value, key)
    assert not torch.equal(value(key), attention.eval()(query, key, other))
