import math

import pytest
import torch

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


def test_no_padding_and_padding_that_is_nowhere_are_the_same() -> None:
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


def test_learned_positions_end_at_fifty_cells() -> None:
    position = LearnedPosition(8)
    assert position(torch.zeros(1, 1, 50, 50), None).shape == (1, 2500, 8)
    with pytest.raises(ValueError, match="got 50x84 cells, expected at most 50"):
        position(torch.zeros(1, 1, 50, 84), None)
