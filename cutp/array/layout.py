"""What launchers check of an array and choose by: its layout, which is everything about it but where it lies.

Checks are functions of layouts that are `remembered`: a launch with arrays of layouts that were found good before looks
that up instead of checking again.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

remembered = lru_cache(maxsize=16384)
"""Decorates a function of layouts and other hashable values: its result follows from them alone, and nobody changes it.
What it raises is raised anew by every call. Arguments that are equal are the same to it, 0.0 and -0.0 as well, so
floats are no arguments."""


class Layout(NamedTuple):
    """An array's shape, strides in bytes and dtype; what follows from them has the names that arrays give it."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    @property
    def is_contiguous(self) -> bool:
        """Whether elements follow each other in C order; axes of one element may have any stride."""
        expected = self.dtype.itemsize
        for n, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if n != 1 and stride != expected:
                return self.size == 0
            expected *= n
        return True

    @property
    def inner(self) -> Layout:
        """Of what lies at one index of the first axis."""
        return Layout(self.shape[1:], self.strides[1:], self.dtype)


def layout(array: Any) -> Layout:
    """The layout of a NumPy or CuPy array."""
    # Past the class's own __new__, which takes as long as the rest.
    return tuple.__new__(Layout, (array.shape, array.strides, array.dtype))


def optional_layout(array: Any) -> Layout | None:
    """The layout of an array that may be None."""
    return None if array is None else layout(array)
