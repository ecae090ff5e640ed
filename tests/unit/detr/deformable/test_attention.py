import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from detr.deformable.attention import DeformableAttention, sample

SHAPES = ((5, 7), (3, 4), (1, 2))


def drawn(batch: int = 2, queries: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    cells = sum(height * width for height, width in SHAPES)
    value = torch.randn(batch, cells, 2, 4, generator=generator, dtype=torch.float64)
    locations = 1.4 * torch.rand(batch, queries, 2, 3, 5, 2, generator=generator, dtype=torch.float64) - 0.2
    weights = torch.rand(batch, queries, 2, 3, 5, generator=generator, dtype=torch.float64)
    return value.requires_grad_(), locations.requires_grad_(), weights.requires_grad_()


def all_at_once(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """The same as in the original's PyTorch: every sample of every level side by side."""
    batch, _, heads, width = value.shape
    found = []
    for number, level in enumerate(value.split([height * width for height, width in SHAPES], 1)):
        maps = level.permute(0, 2, 3, 1).reshape(batch * heads, width, *SHAPES[number])
        grid = (2 * locations - 1)[:, :, :, number].transpose(1, 2).flatten(0, 1)
        found.append(F.grid_sample(maps, grid, align_corners=False))
    shares = weights.transpose(1, 2).reshape(batch * heads, 1, -1, 15)
    summed = (torch.stack(found, -2).flatten(-2) * shares).sum(-1)
    return summed.view(batch, heads * width, -1).transpose(1, 2)


def test_levels_one_after_another_have_the_sums_and_gradients_of_all_at_once() -> None:
    inputs = drawn()
    u = torch.linspace(-1, 1, 2 * 6 * 8, dtype=torch.float64).view(2, 6, 8)
    expected, found = all_at_once(*inputs), sample(*inputs, SHAPES)
    torch.testing.assert_close(found, expected)
    wanted = torch.autograd.grad((expected * u).sum(), inputs)
    torch.testing.assert_close(torch.autograd.grad((found * u).sum(), inputs), wanted)
    with torch.no_grad():
        torch.testing.assert_close(sample(*inputs, SHAPES), expected)


def test_an_empty_batch_has_gradients() -> None:
    attention = DeformableAttention(8, 2, 3, 4)
    output = attention(torch.zeros(0, 5, 8), torch.zeros(1, 5, 3, 2), torch.zeros(0, 49, 8), None, SHAPES)
    output.sum().backward()
    assert output.shape == (0, 5, 8)
    assert all(parameter.grad is not None for parameter in attention.parameters())


def test_offsets_and_samples_stay_in_fp32_under_autocast() -> None:
    attention = DeformableAttention(8, 2, 3, 4)
    attention.reset_parameters()
    torch.manual_seed(0)
    inputs = torch.randn(2, 5, 8), torch.rand(2, 5, 3, 2), torch.randn(2, 49, 8)
    # The offset is a bias of 4 cells + 1/256 of a cell, which bf16 would round to 4.
    torch.nn.init.constant_(attention.sampling_offsets.bias, 4 + 1 / 256)
    seen = []
    exact = F.grid_sample

    def spy(maps: Tensor, grid: Tensor, **options: object) -> Tensor:
        seen.append((maps.dtype, grid.dtype))
        return exact(maps, grid, **options)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
        patch.setattr(F, "grid_sample", spy)
        output = attention(*inputs, None, SHAPES)
    assert set(seen) == {(torch.float32, torch.float32)}
    assert output.dtype == torch.bfloat16
    with torch.no_grad():
        torch.testing.assert_close(output.float(), attention(*inputs, None, SHAPES), atol=0.1, rtol=0.1)


def test_padded_cells_are_read_as_zeros() -> None:
    attention = DeformableAttention(8, 2, 3, 4)
    attention.reset_parameters()
    inputs = torch.randn(1, 5, 8), torch.rand(1, 5, 3, 2), torch.randn(1, 49, 8)
    everything = torch.ones(1, 49, dtype=torch.bool)
    assert torch.equal(attention(*inputs, everything, SHAPES), torch.zeros(1, 5, 8))
