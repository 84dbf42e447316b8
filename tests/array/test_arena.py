"""Static buffers, here in NumPy memory."""

import ml_dtypes
import numpy as np
import pytest

from cutp.array.arena import Arena, address
from cutp.errors import CapacityError, ClosedError, ConfigError


def odd_bytes(size: int) -> np.ndarray:
    """`size` bytes at an address that is no multiple of 256."""
    whole = np.zeros(size + 512, np.uint8)
    skip = -whole.ctypes.data % 256 + 8
    return whole[skip : skip + size]


def test_a_name_is_one_place():
    arena = Arena(odd_bytes)
    first = arena.array("hidden", (4, 8), np.float32)
    again = arena.array("hidden", [2, 8], ml_dtypes.bfloat16)
    other = arena.array("logits", 10, np.int32)
    assert first.shape == (4, 8) and again.shape == (2, 8) and again.dtype == ml_dtypes.bfloat16
    assert address(first) == address(again) != address(other)
    assert all(address(a) % 256 == 0 for a in (first, again, other))
    first[...] = 7
    assert other.sum() == 0 and arena.sizes() == {"hidden": 128, "logits": 40} and arena.nbytes == 168


def test_buffers_do_not_grow():
    arena = Arena(odd_bytes)
    arena.array("x", 10, np.float32)
    with pytest.raises(ConfigError, match="'x' has 40 bytes, but 44 are asked for now"):
        arena.array("x", 11, np.float32)


def test_empty_buffers():
    arena = Arena(odd_bytes)
    assert arena.array("none", (0, 5), np.float16).shape == (0, 5)


def test_frozen_and_closed():
    arena = Arena(odd_bytes)
    x = arena.array("x", 10, np.float32)
    arena.freeze("a graph uses this arena")
    assert address(arena.array("x", 10, np.float32)) == address(x)
    with pytest.raises(ConfigError, match="'y' does not exist and can no longer be made: a graph uses this arena"):
        arena.array("y", 10, np.float32)
    arena.close()
    arena.close()
    with pytest.raises(ClosedError):
        arena.array("x", 10, np.float32)
    x[...] = 1  # who still holds an array may still use it


def test_out_of_memory_names_the_buffer():
    def refuse(size):
        raise MemoryError("the device is full")

    with pytest.raises(CapacityError, match="no memory for arena buffer 'kv' of 1024 bytes .* the device is full"):
        Arena(refuse).array("kv", 1000, np.uint8)
