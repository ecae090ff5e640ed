from typing import Any

import pytest
import torch
from torch import nn

from detr.config import ModelConfig
from detr.transformer import Attention, Transformer

SMALL: dict[str, Any] = {"hidden_dim": 32, "heads": 4, "feedforward_dim": 64, "dropout": 0.0}


def build(**changes: Any) -> Transformer:
    torch.manual_seed(0)
    return Transformer(ModelConfig(**{**SMALL, "encoder_layers": 2, "decoder_layers": 3, **changes}))


def test_attention_is_torchs_with_its_parameters() -> None:
    torch.manual_seed(0)
    ours, theirs = Attention(ModelConfig(**SMALL)), nn.MultiheadAttention(32, 4, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    query, key, value = torch.randn(2, 5, 32), torch.randn(2, 9, 32), torch.randn(2, 9, 32)
    ignored = torch.zeros(2, 9, dtype=torch.bool)
    ignored[1, 4:] = True
    expected, _ = theirs(query, key, value, key_padding_mask=ignored)
    torch.testing.assert_close(ours(query, key, value, ~ignored[:, None, None]), expected)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_what_lies_in_the_padding_changes_nothing(pre_norm: bool) -> None:
    """The same image on a larger canvas, with anything in the rest of it, decodes to the same."""
    model = build(pre_norm=pre_norm)
    cells, position, queries = torch.randn(2, 12, 32), torch.randn(2, 12, 32), torch.randn(7, 32)
    canvas, canvas_position = torch.randn(2, 20, 32) * 100, torch.randn(2, 20, 32)
    canvas[:, :12], canvas_position[:, :12] = cells, position
    padding = (torch.arange(20) >= 12).expand(2, -1)
    expected, memory = model(cells, position, queries, None)
    decoded, canvas_memory = model(canvas, canvas_position, queries, padding)
    torch.testing.assert_close(decoded, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(canvas_memory[:, :12], memory, rtol=1e-4, atol=1e-5)


def test_every_decoder_layer_is_returned_and_all_weights_get_gradients() -> None:
    model = build()
    decoded, _ = model(torch.randn(2, 12, 32), torch.randn(1, 12, 32), torch.randn(7, 32), None)
    assert decoded.shape == (3, 2, 7, 32)
    decoded.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_no_encoder_layers_leave_the_cells_as_memory() -> None:
    cells = torch.randn(1, 4, 32)
    decoded, memory = build(encoder_layers=0)(cells, torch.randn(1, 4, 32), torch.randn(3, 32), None)
    assert decoded.isfinite().all()
    assert torch.equal(memory, cells)


def test_departures_change_what_they_say() -> None:
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
