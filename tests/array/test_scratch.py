"""Scratch memory: a stack whose addresses depend on the sequence of calls alone."""

import numpy as np
import pytest

from cutp.array.arena import address
from cutp.array.scratch import ALIGNMENT, Scratch, frame, on_device, scratch
from cutp.errors import ConfigError
from tests.device_arrays import DeviceArray, EmulatedMemory

BLOCK = 64 << 20


@pytest.fixture
def stack():
    return Scratch(EmulatedMemory())


def test_arrays_are_aligned_apart_and_of_the_right_kind(stack):
    taken = [stack.empty(shape, dtype) for shape, dtype in (
        ((3, 5), np.float32), (7, np.uint8), ((2, 0), np.int64), (np.int64(1), np.int32), ([4], np.float16))]
    assert [a.shape for a in taken] == [(3, 5), (7,), (2, 0), (1,), (4,)]
    assert [a.dtype for a in taken] == [np.float32, np.uint8, np.int64, np.int32, np.float16]
    for array in taken:
        assert on_device(array) and array.flags.c_contiguous and address(array) % ALIGNMENT == 0
    for i, array in enumerate(taken):
        assert not any(np.shares_memory(array.host, other.host) for other in taken[:i])
    assert not on_device(np.zeros(1))


def test_equal_calls_get_equal_addresses(stack):
    def run():
        with stack.frame():
            first = address(stack.empty(1000, np.float32))
            with stack.frame():
                inner = address(stack.empty(BLOCK // 2, np.uint8)), address(stack.empty(BLOCK, np.uint8))
            return first, inner, address(stack.empty((10, 10), np.int64))

    found = run()
    size = stack.nbytes
    assert [run() for _ in range(3)] == [found] * 3 and stack.nbytes == size
    assert found[1][0] == found[2]  # what the inner frame took is free again


def test_a_frame_gives_back_after_an_error(stack):
    with pytest.raises(ZeroDivisionError), stack.frame():
        before = address(stack.empty(5, np.uint8))
        raise ZeroDivisionError
    assert address(stack.empty(5, np.uint8)) == before


def test_blocks_grow_and_what_is_in_use_stays(stack):
    kept = stack.empty(BLOCK // 4, np.uint8)
    kept[...] = 7
    large = stack.empty(3 * BLOCK, np.uint8)  # more than a block
    large[...] = 8
    more = stack.empty(BLOCK, np.uint8)
    more[...] = 9
    assert (kept.host == 7).all() and (large.host == 8).all()
    assert stack.nbytes == 5 * BLOCK
    with stack.frame():
        # Beside the last one no block is looked at again: arrays below never move.
        assert not any(np.shares_memory(stack.empty(BLOCK, np.uint8).host, other.host) for other in (kept, large, more))


def test_use_nests_and_ends():
    with pytest.raises(ConfigError, match="need memory") as caught:
        scratch()
    assert "scratch.use()" in str(caught.value.hint)
    outer, inner = Scratch(EmulatedMemory()), Scratch(EmulatedMemory())
    with outer.use():
        first = address(scratch().empty(4, np.uint8))
        with pytest.raises(ValueError), inner.use():
            assert scratch() is inner
            raise ValueError
        assert scratch() is outer
        with frame():
            scratch().empty(4, np.uint8)
    with outer.use():
        assert address(scratch().empty(4, np.uint8)) == first
    with pytest.raises(ConfigError), frame():  # a frame of nothing is nothing
        scratch()


def test_arrays_on_a_device_refuse_arithmetic():
    """What the emulated engine's tests rely on: NumPy in the place of a kernel is an error."""
    array = EmulatedMemory().empty(3, np.float32)
    assert type(array[1:]) is DeviceArray and np.isnan(array.host).all()
    for wrong in (lambda: array + 1, lambda: np.concatenate([array, array]), lambda: bool(array[:1]),
                  lambda: list(array), lambda: array.__setitem__(0, np.zeros(1))):
        with pytest.raises(AssertionError):
            wrong()
