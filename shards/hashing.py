"""Hash functions that order samples, the same on every machine."""

import numpy as np
import numpy.typing as npt

_MASK = (1 << 64) - 1


def splitmix64(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Return splitmix64 of each state in `values`: a fixed, well mixed bijection of 64-bit integers."""
    mixed = values + np.uint64(0x9E3779B97F4A7C15)  # wraps around, as intended
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed ^= mixed >> np.uint64(shift)  # in place: an epoch may have a hundred million
        mixed *= np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def hashes(numbers: tuple[int, ...], values: npt.ArrayLike) -> npt.NDArray[np.uint64]:
    """Return a 64-bit hash of (*numbers, value) per value, uint64 of the shape of `values`; [1] for a scalar."""
    state = np.zeros(1, np.uint64)
    for number in numbers:
        state = splitmix64(state ^ np.array([number & _MASK], np.uint64))
    return splitmix64(state ^ np.asarray(values).astype(np.uint64))
