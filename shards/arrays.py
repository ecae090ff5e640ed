"""Array types and the rounding that the modules of `shards` share."""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]
Records = npt.NDArray[np.void]


def ceil_div(dividend: int, divisor: int) -> int:
    """Return the quotient rounded up, exact for integers of any size."""
    return -(-dividend // divisor)
