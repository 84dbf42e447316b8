"""Scratch memory: a stack whose addresses depend on the sequence of calls alone."""

import numpy as np
import pytest

from cutp.array import scratch as scratch_module
from cutp.array.arena import address
from cutp.array.scratch import ALIGNMENT, Scratch, frame, on_device, scratch
from cutp.errors import CapacityError, ConfigError
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


def test_arrays_that_are_found_again_are_those_that_fit(stack):
    def run(*wanted):
        with stack.frame():
            return [stack.empty(shape, dtype) for shape, dtype in wanted]

    first = run(((4, 8), np.float32), ((6,), np.int8))
    assert all(a is b for a, b in zip(first, run(((4, 8), np.float32), ((6,), np.int8)), strict=True))
    for wanted in (((4, 8), np.int32), ((8, 4), np.float32), ((32,), np.float32), ([4, 8], np.dtype(np.float32)),
                   (np.int64(32), "float32"), ((4, np.int32(8)), np.float32)):
        (array,) = run(wanted)
        assert array.shape == (tuple(wanted[0]) if not isinstance(wanted[0], np.int64) else (32,))
        assert array.dtype == wanted[1] and address(array) == address(first[0])
    # Behind something else the same array is another one.
    _, second = run(((1000,), np.uint8), ((4, 8), np.float32))
    assert address(second) == address(first[0]) + 1024
    # A block that is full, and an array that begins the next one, are found again, too.
    big = [run(((BLOCK - 512,), np.uint8), ((1024,), np.uint8), ((64,), np.uint8)) for _ in range(2)]
    assert all(a is b for a, b in zip(*big, strict=True)) and address(big[0][2]) == address(big[0][1]) + 1024


def test_no_more_than_some_arrays_are_remembered(stack, monkeypatch):
    monkeypatch.setattr(scratch_module, "_MAX_TAKEN", 10)
    for n in range(1, 40):
        with stack.frame():
            assert stack.empty((n,), np.uint8).shape == (n,)
            assert len(stack._taken) <= 10
    with stack.frame():
        assert address(stack.empty((1,), np.uint8)) == address(stack._blocks[0])


def test_memory_that_cannot_be_had_changes_nothing():
    memory = EmulatedMemory()
    stack = Scratch(memory)
    before = address(stack.empty(10, np.uint8))
    memory.size = memory.used
    for _ in range(2):
        with pytest.raises(CapacityError):
            stack.empty(2 * BLOCK, np.uint8)
    assert address(stack.empty(10, np.uint8)) == before + ALIGNMENT


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
            inside = address(scratch().empty(4, np.uint8))
        assert address(scratch().empty(4, np.uint8)) == inside == first + ALIGNMENT
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
