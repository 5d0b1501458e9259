"""Where something is in an image."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["extent"]


def extent(mask: NDArray[np.bool_], margin: int | Sequence[int] = 0) -> tuple[slice, slice, slice]:
    """The smallest block (X, Y, Z) that holds a mask, which is not empty.

    Quicker than ndimage.find_objects, which wants labels.

    Args:
        margin: voxels around it, the same or for each axis, as far as the array goes.
    """
    found = []
    margins = (margin,) * 3 if isinstance(margin, int) else margin
    for axis, (size, around) in enumerate(zip(mask.shape, margins, strict=True)):
        (there,) = np.nonzero(mask.any(axis=tuple({0, 1, 2} - {axis})))
        first, last = int(there[0]), int(there[-1])
        found.append(slice(max(first - around, 0), min(last + 1 + around, size)))
    x, y, z = found
    return x, y, z
