"""Division of the pixels of an image among the queries that are kept, only where its original size keeps them."""

from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from detr.geometry import Size


class Picture:
    """Division of an image into the pixels of its queries, at the rows and columns that the original size keeps."""

    def __init__(self, grids: Tensor, canvas: Size, size: Size, original: Size) -> None:
        """Give each pixel to the query with the largest logit, of equal ones the first; grids: logits [Q, h, w]."""
        device = grids.device
        self._rows = _Axis(grids.shape[1], canvas[0], size[0], original[0], device)
        self._columns = _Axis(grids.shape[2], canvas[1], size[1], original[1], device)
        # Columns first and then rows, in which `F.interpolate` adds as well.
        across, down = self._columns, self._rows
        # `gather` takes a fifth of the time of `index_select` here.
        left, right = (grids.gather(2, at.expand(*grids.shape[:2], -1)) for at in (across.low, across.high))
        self._wide = torch.lerp(left, right, across.share)
        shape = (len(down.share), len(across.share))
        self._winners = torch.full(shape, 0 if len(grids) else -1, dtype=torch.int16, device=device)
        best = torch.full(shape, -torch.inf, device=device)
        for query, grid in enumerate(self._wide):
            values = torch.lerp(grid.index_select(0, down.low), grid.index_select(0, down.high), down.share[:, None])
            self._winners.masked_fill_(values > best, query)
            torch.maximum(best, values, out=best)

    def keep(self, alive: npt.NDArray[np.bool_]) -> None:
        """Give the pixels of all other queries to these, or to none if there are none left."""
        left = np.flatnonzero(alive).tolist()
        lost = ~torch.from_numpy(alive).to(self._winners.device)[self._winners.long()]
        rows, columns = lost.nonzero(as_tuple=True)
        width, share = self._winners.shape[1], self._rows.share[rows]
        low, high = self._rows.low[rows] * width + columns, self._rows.high[rows] * width + columns
        best = torch.full_like(share, -torch.inf)
        winners = torch.full_like(rows, left[0] if left else -1, dtype=torch.int16)
        for query in left:
            grid = self._wide[query].flatten()
            values = torch.lerp(grid.index_select(0, low), grid.index_select(0, high), share)
            winners.masked_fill_(values > best, query)
            torch.maximum(best, values, out=best)
        self._winners[rows, columns] = winners

    def areas(self) -> npt.NDArray[np.int64]:
        """Return the pixels of each query at the original size."""
        owners = self._winners.cpu().numpy().reshape(-1) + 1  # 0: none
        rows, columns = self._rows.repeats, self._columns.repeats
        # Repeats appear only where the original is larger than the image in the model, which is rare.
        pixels = np.outer(rows, columns).reshape(-1) if rows.max() > 1 or columns.max() > 1 else None
        return np.bincount(owners, pixels, minlength=len(self._wide) + 1)[1:].astype(np.int64)

    def indices(self, alive: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32]:
        """Return the query of each pixel at the original size, counted among those `alive`; -1 if there are none."""
        numbers = np.append(np.cumsum(alive) - 1, -1).astype(np.int32)  # the last for a winner of -1
        winners = numbers[self._winners.cpu().numpy()]
        return np.ascontiguousarray(winners.repeat(self._rows.repeats, 0).repeat(self._columns.repeats, 1))


class _Axis:
    """Rows of the canvas that the original size keeps, and the rows of the grid between which they lie; or columns.

    low, high: rows of the grid. share: float32, of the higher one. repeats: how many rows of the original size have it.
    """

    def __init__(self, grid: int, canvas: int, size: int, original: int, device: torch.device) -> None:
        kept, self.repeats = np.unique(_nearest(size, original), return_counts=True)
        # In float32 and without clamping at the far side, as `F.interpolate` does.
        scale = np.float32(grid) / np.float32(canvas)
        position = np.maximum(scale * (kept.astype(np.float32) + np.float32(0.5)) - np.float32(0.5), 0)
        low = position.astype(np.int64)
        self.low = torch.from_numpy(low).to(device)
        self.high = torch.from_numpy(np.minimum(low + 1, grid - 1)).to(device)
        self.share = torch.from_numpy((position - low).astype(np.float32)).to(device)


@lru_cache(maxsize=4096)
def _nearest(size: int, original: int) -> npt.NDArray[np.int32]:
    """Return the row that Pillow's nearest neighbour takes for each row of the original size; columns are alike.

    It differs from exact arithmetic, and so from torch's, at some sizes.
    """
    places = Image.fromarray(np.arange(size, dtype=np.int32)[None])
    row: npt.NDArray[np.int32] = np.asarray(places.resize((original, 1), Image.Resampling.NEAREST))[0]
    return row
