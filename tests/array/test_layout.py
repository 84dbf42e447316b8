"""Layouts of arrays, and what is remembered by them."""

import sys

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.lib.stride_tricks import as_strided

from cutp.array.layout import Layout, layout, optional_layout, remembered
from cutp.comm import run_threads
from cutp.errors import ConfigError

BF16 = np.dtype(ml_dtypes.bfloat16)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(-2, 12)), max_size=4), st.sampled_from([np.int16, np.float32]))
def test_contiguity_is_numpys(axes, dtype):
    shape, steps = tuple(n for n, _ in axes), [step for _, step in axes]
    item = np.dtype(dtype).itemsize
    array = as_strided(np.zeros(1, dtype), shape, [step * item for step in steps])
    assert layout(array).is_contiguous == array.flags.c_contiguous
    assert (layout(array).ndim, layout(array).size, layout(array).nbytes) == (array.ndim, array.size, array.nbytes)


def test_views():
    x = np.zeros((4, 6, 8), np.float32)
    for view in (x, x[1], x[:, 1], x[..., ::2], x.transpose(1, 0, 2), x[::-1], x[:1], x[:, :1, :1], x[2:2],
                 x[0, 0, 0:1]):
        assert layout(view).is_contiguous == view.flags.c_contiguous
        assert layout(view) == (view.shape, view.strides, view.dtype) and layout(view).itemsize == 4
        assert layout(view).inner == layout(view[0]) if view.shape[0] else layout(view).inner.size
    assert type(layout(x)) is Layout and layout(layout(x)) == layout(x)
    assert optional_layout(None) is None and optional_layout(x) == layout(x)


def test_layouts_are_equal_by_value_and_only_then():
    x = np.zeros((4, 8), np.float16)
    equal = [layout(np.ones((4, 8), np.float16)), layout(np.zeros((6, 8), np.float16)[2:])]
    other = [layout(a) for a in (x.astype(BF16), x.view(np.int16), x.reshape(8, 4), np.zeros((4, 16), x.dtype)[:, :8],
                                 np.zeros((8, 4), np.float16).T, x[:3], x[None])]
    assert set(equal) == {layout(x)} and len({layout(x), *other}) == 1 + len(other)


@pytest.fixture
def checked():
    calls = []

    @remembered
    def check(x, count, bias=None):
        calls.append((x, count, bias))
        if not x.is_contiguous:
            raise ConfigError(f"strides {x.strides}")
        return len(calls)

    check.calls = calls
    return check


def test_a_function_is_called_once_for_equal_layouts(checked):
    x = np.zeros((4, 8), np.float16)
    first = checked(layout(x), 1)
    assert checked(layout(np.ones((4, 8), np.float16)), 1) is first and len(checked.calls) == 1
    results = [checked(*args) for args in (
        (layout(x.astype(BF16)), 1), (layout(x[:2]), 1), (layout(x), 2), (layout(x), 1, layout(x)),
        (layout(x.reshape(8, 4)), 1))]
    assert results == [2, 3, 4, 5, 6]


def test_errors_are_raised_every_time(checked):
    x = np.zeros((4, 8), np.float16)
    for _ in range(2):
        checked(layout(x), 1)
        with pytest.raises(ConfigError, match=r"strides \(16, 4\)"):
            checked(layout(x[:, ::2]), 1)
    assert len(checked.calls) == 3


def test_threads_remember_together():
    made = []

    @remembered
    def plan(x, number):
        made.append(number)
        return x.shape, number

    def work(comm):
        for i in range(3000):
            x = np.empty((i % 7 + 1, comm.rank % 2 + 1), np.float32)
            assert plan(layout(x), i % 5) == (x.shape, i % 5)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        run_threads(4, work)
    finally:
        sys.setswitchinterval(interval)
    assert len(made) <= 4 * 7 * 2 * 5
