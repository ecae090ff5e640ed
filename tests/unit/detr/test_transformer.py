from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from detr.config import ModelConfig
from detr.dropout import Dropout, keep_mask, keep_probability
from detr.transformer import Attention, Transformer, _attend_plainly, attend

SMALL: dict[str, Any] = {"hidden_dim": 32, "heads": 4, "feedforward_dim": 64, "dropout": 0.0}


def build(**changes: Any) -> Transformer:
    torch.manual_seed(0)
    return Transformer(ModelConfig(**{**SMALL, "encoder_layers": 2, "decoder_layers": 3, **changes}))


def test_attention_equals_torchs_with_the_same_parameters() -> None:
    torch.manual_seed(0)
    ours, theirs = Attention(ModelConfig(**SMALL)), nn.MultiheadAttention(32, 4, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    query, key, value = torch.randn(2, 5, 32), torch.randn(2, 9, 32), torch.randn(2, 9, 32)
    ignored = torch.zeros(2, 9, dtype=torch.bool)
    ignored[1, 4:] = True
    expected, _ = theirs(query, key, value, key_padding_mask=ignored)
    torch.testing.assert_close(ours(query, key, value, ~ignored[:, None, None]), expected)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_content_of_the_padding_changes_nothing(pre_norm: bool) -> None:
    """The result for an image is the same on a larger canvas with any values in the padding."""
    model = build(pre_norm=pre_norm)
    cells, position, queries = torch.randn(2, 12, 32), torch.randn(2, 12, 32), torch.randn(7, 32)
    canvas, canvas_position = torch.randn(2, 20, 32) * 100, torch.randn(2, 20, 32)
    canvas[:, :12], canvas_position[:, :12] = cells, position
    padding = (torch.arange(20) >= 12).expand(2, -1)
    expected, memory = model(cells, position, queries, None)
    decoded, canvas_memory = model(canvas, canvas_position, queries, padding)
    torch.testing.assert_close(decoded, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(canvas_memory[:, :12], memory, rtol=1e-4, atol=1e-5)


def test_all_decoder_layers_are_returned_and_all_weights_get_gradients() -> None:
    model = build()
    decoded, _ = model(torch.randn(2, 12, 32), torch.randn(1, 12, 32), torch.randn(7, 32), None)
    assert decoded.shape == (3, 2, 7, 32)
    decoded.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_without_encoder_layers_the_memory_is_the_cells() -> None:
    cells = torch.randn(1, 4, 32)
    decoded, memory = build(encoder_layers=0)(cells, torch.randn(1, 4, 32), torch.randn(3, 32), None)
    assert decoded.isfinite().all()
    assert torch.equal(memory, cells)


def test_departures_from_the_paper_have_their_effect() -> None:
    cells, position, queries = torch.randn(1, 12, 32), torch.randn(1, 12, 32), torch.randn(4, 32)
    plain, _ = build()(cells, position, queries, None)
    at_input, _ = build(position_at_input=True)(cells - position, position, queries, None)
    torch.testing.assert_close(at_input, plain, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(build(decoder_input="queries")(cells, position, queries, None)[0], plain)
    tied = build(tied_attention_init=True)
    attention = [layer.self_attn for layer in tied.encoder.layers]
    attention += [layer.multihead_attn for layer in tied.decoder.layers]
    for module in attention:
        query, key, value = module.in_proj_weight.chunk(3)
        assert torch.equal(query, key)
        assert not torch.equal(query, value)


def test_gradients_are_finite_where_attention_saturates() -> None:
    attention = Attention(ModelConfig(**SMALL))
    cells = torch.randn(2, 40, 32) * 1e5
    attention(cells, cells, cells).sum().backward()
    assert attention.in_proj_weight.grad is not None
    assert attention.in_proj_weight.grad.isfinite().all()


@pytest.mark.parametrize("masked", [False, True])
def test_attention_with_recomputed_scores_equals_the_plain_one(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    attention = Attention(ModelConfig(**SMALL)).train()
    inputs = [torch.randn(2, length, 32, requires_grad=True) for length in (5, 9, 9)]
    mask = torch.arange(9).expand(2, 1, 1, 9) < torch.tensor([9, 6]).view(2, 1, 1, 1) if masked else None
    results = []
    for many in (1 << 30, 0):
        monkeypatch.setattr("detr.transformer._MANY_SCORES", many)
        out = attention(*inputs, mask)
        results.append((out, *torch.autograd.grad(out.square().sum(), [*inputs, *attention.parameters()])))
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(plain, recomputed, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("many", [1 << 30, 0], ids=["kept", "recomputed"])
def test_gradient_of_attention_with_dropout_matches_finite_differences(
    many: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("detr.transformer._MANY_SCORES", many)
    torch.manual_seed(0)
    attention = Attention(ModelConfig(hidden_dim=8, heads=2, dropout=0.4)).double().train()
    query, other = torch.randn(1, 3, 8, dtype=torch.float64), torch.randn(1, 4, 8, dtype=torch.float64)

    def value(key: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)
        return attention(query, key, other)

    key = torch.randn(1, 4, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(value, key)
    assert not torch.equal(value(key), attention.eval()(query, key, other))


def test_seed_decides_what_dropout_drops() -> None:
    model = build(dropout=0.3).train()
    inputs = torch.randn(1, 12, 32), torch.randn(1, 12, 32), torch.randn(4, 32), None
    results = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        results.append(model(*inputs)[0])
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    model.eval()
    assert torch.equal(model(*inputs)[0], model(*inputs)[0])


def test_dropout_and_attention_of_a_cpu_equal_torchs() -> None:
    """The branches for CPUs and for other devices: the same values, gradients and share of dropped elements."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 50, 8, requires_grad=True) for _ in range(3))
    mask = (torch.arange(50) < 40).expand(2, 1, 1, -1)
    own = _attend_plainly(q, k, v, mask, None, 0.0)
    torchs = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(own, torchs, rtol=1e-5, atol=1e-6)
    for mine, other in zip(*(torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (own, torchs)), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)

    # With dropout: the same rule for the same draws, and as many elements dropped as by torch.
    keep = keep_mask(torch.Size((2, 4, 50, 50)), 0.1)
    weights = (q * 8**-0.5 @ k.transpose(-2, -1)).masked_fill(~mask, -torch.inf).softmax(-1)
    expected = torch.where(keep, weights, 0.0) / 0.9 @ v
    torch.testing.assert_close(_attend_plainly(q, k, v, mask, keep, 0.1), expected, rtol=1e-4, atol=1e-4)
    ones = torch.ones(400_000)
    own, torchs = Dropout(0.1).train()(ones), F.dropout(ones, 0.1)
    for dropped in (own, torchs):
        assert dropped.mean().item() == pytest.approx(1.0, abs=0.005)
        assert (dropped == 0).float().mean().item() == pytest.approx(0.1, abs=0.005)
        assert dropped.max().item() == pytest.approx(1 / 0.9, rel=1e-4)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_to_few_is_torchs_to_the_last_bit(dtype: torch.dtype, masked: bool) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, length, 4, 8).transpose(1, 2).to(dtype).requires_grad_() for length in (5, 9, 9))
    mask = torch.arange(9).expand(2, 1, 1, 9) < torch.tensor([9, 6]).view(2, 1, 1, 1) if masked else None
    results = []
    for attention in (attend, F.scaled_dot_product_attention):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            attended = attention(q, k, v, mask, 0.1)
        results.append((attended, *torch.autograd.grad(attended.float().square().sum(), (q, k, v))))
    for own, torchs in zip(*results, strict=True):
        assert own.dtype == dtype
        assert torch.equal(own, torchs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dropout_of_a_cpu_gives_values_and_gradients_of_autograd_to_the_last_bit(dtype: torch.dtype) -> None:
    gradient = torch.randn(3, 50).to(dtype)
    results = []
    for own in (True, False):
        x = torch.linspace(-2, 2, 150, dtype=dtype).view(3, 50).requires_grad_()
        torch.manual_seed(0)
        kept = (
            Dropout(0.3).train()(x)
            if own
            else torch.where(keep_mask(x.shape, 0.3), x, 0.0) * (1 / keep_probability(0.3))
        )
        results.append((kept, *torch.autograd.grad(kept, x, gradient)))
    for own, plain in zip(*results, strict=True):
        assert own.dtype == dtype
        assert torch.equal(own, plain)
    assert 0 < (results[0][1] == 0).sum() < 100


def test_dropout_of_a_cpu_can_be_differentiated_twice() -> None:
    x = torch.linspace(1, 2, 50, dtype=torch.float64, requires_grad=True)
    kept = Dropout(0.3).train()(x)
    (first,) = torch.autograd.grad(kept.square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, kept.ne(0).double() * 2 / keep_probability(0.3) ** 2)
