import math

import pytest
import torch

from detr.config import ModelConfig
from detr.model import build_model
from detr.position import LearnedPosition, SinePosition

FEATURES = torch.zeros(2, 8, 5, 7)


def test_sines_follow_the_papers_formula() -> None:
    got = SinePosition(16, 10000.0)(FEATURES, None).view(5, 7, 16)
    for row, column, i in ((0, 0, 0), (3, 6, 1), (4, 2, 3)):
        frequency = 2 * math.pi / 10000 ** (2 * i / 8)
        for offset, fraction in ((0, (row + 1) / 5), (8, (column + 1) / 7)):
            assert got[row, column, offset + 2 * i].item() == pytest.approx(math.sin(fraction * frequency), abs=1e-5)
            assert got[row, column, offset + 2 * i + 1].item() == pytest.approx(
                math.cos(fraction * frequency), abs=1e-5
            )


def test_sines_without_padding_equal_all_false_padding() -> None:
    position = SinePosition(16, 20.0)
    padded = position(FEATURES, torch.zeros(2, 5, 7, dtype=torch.bool))
    torch.testing.assert_close(padded, position(FEATURES, None).expand(2, -1, -1))


def test_positions_are_relative_to_the_image_not_to_its_canvas() -> None:
    padding = torch.ones(1, 8, 9, dtype=torch.bool)
    padding[:, :5, :7] = False
    position = SinePosition(16, 10000.0)
    on_canvas = position(torch.zeros(1, 8, 8, 9), padding).view(8, 9, 16)[:5, :7]
    torch.testing.assert_close(on_canvas, position(FEATURES, None).view(5, 7, 16))


def test_positions_first_used_in_inference_mode_can_be_trained_with() -> None:
    position = SinePosition(24, 10000.0)
    with torch.inference_mode():
        position(FEATURES, None)
    weight = torch.ones(24, requires_grad=True)
    (position(FEATURES, None) * weight).sum().backward()
    assert weight.grad is not None


def test_learned_positions_are_column_then_row() -> None:
    position = LearnedPosition(8)
    got = position(FEATURES, None).view(5, 7, 8)
    expected = torch.cat([position.col_embed.weight[6], position.row_embed.weight[3]])
    assert torch.equal(got[3, 6], expected)


def learned(height: int, width: int, position: LearnedPosition) -> torch.Tensor:
    return position(torch.zeros(1, 1, height, width), None).view(height, width, -1)


@pytest.mark.parametrize("cells", [1, 49, 50])
def test_learned_positions_up_to_fifty_cells_equal_the_originals(cells: int) -> None:
    position = LearnedPosition(8)
    got = learned(cells, cells, position)
    assert torch.equal(got[0, :, :4], position.col_embed.weight[:cells])
    assert torch.equal(got[:, 0, 4:], position.row_embed.weight[:cells])


@pytest.mark.parametrize("cells", [51, 84, 200])
def test_learned_positions_are_interpolated_along_each_axis(cells: int) -> None:
    position = LearnedPosition(8)
    table = position.col_embed.weight.detach()
    wide, high = learned(3, cells, position), learned(cells, 50, position)
    # Cell i of n is at vector 49 * i / (n - 1), so the first and last vectors stay at the ends.
    for cell in range(cells):
        row = 49 * cell / (cells - 1)
        low = min(int(row), 48)
        expected = table[low] + (row - low) * (table[low + 1] - table[low])
        torch.testing.assert_close(wide[1, cell, :4].detach(), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(wide[:, 0, 4:], position.row_embed.weight[:3])
    assert torch.equal(high[0, :, :4], position.col_embed.weight)
    torch.testing.assert_close(high[[0, -1], 0, 4:], position.row_embed.weight[[0, 49]])


def test_interpolated_ramp_is_a_ramp() -> None:
    position = LearnedPosition(8)
    with torch.no_grad():
        position.row_embed.weight.copy_(torch.arange(50.0)[:, None].expand(-1, 4))
    rows = learned(84, 2, position)[:, 0, 4].detach()
    steps = rows.diff()
    torch.testing.assert_close(steps, torch.full((83,), 49 / 83), rtol=1e-3, atol=1e-4)
    assert rows[[0, -1]].tolist() == pytest.approx([0, 49], abs=1e-4)


def test_every_learned_vector_gets_a_gradient_from_a_large_image() -> None:
    position = LearnedPosition(8)
    learned(50, 84, position).sum().backward()
    for embedding, total in ((position.row_embed, 84 * 50), (position.col_embed, 50 * 84)):
        gradient = embedding.weight.grad
        assert gradient is not None
        assert (gradient > 0).all()
        # The interpolation weights of each cell sum to 1, so the gradients sum to the number of cells.
        torch.testing.assert_close(gradient.sum(0), torch.full((4,), float(total)), rtol=1e-4, atol=0)


def test_dc5_with_learned_positions_takes_an_image_of_1333_pixels() -> None:
    config = ModelConfig(
        backbone="resnet50", dilation=True, position="learned", hidden_dim=16, heads=2, encoder_layers=1,
        decoder_layers=1, feedforward_dim=16, dropout=0.0, num_queries=3,
    )  # fmt: skip
    with torch.inference_mode():
        outputs = build_model(config, 4).eval()(torch.randn(1, 3, 64, 1333))
    assert outputs.boxes.isfinite().all()
