"""Gather from a slice of the vocabulary: rows of owned tokens, exact zeros for the others."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cutp.ops.embedding import embedding

pytestmark = pytest.mark.filterwarnings("error")


@settings(max_examples=40, derandomize=True, deadline=None)
@given(st.integers(0, 20), st.integers(1, 9), st.integers(1, 5), st.integers(0, 30), st.integers(0, 2**32 - 1))
def test_owned_rows_and_zeros(n_tokens, rows, dim, start, seed):
    rng = np.random.default_rng(seed)
    table = rng.standard_normal((rows, dim)).astype(np.float32)
    tokens = rng.integers(0, start + rows + 5, n_tokens)
    out = np.full((n_tokens, dim), np.nan, np.float32)
    assert embedding(tokens, table, start, np.dtype(np.float32), out) is out
    for t, token in enumerate(tokens):
        expected = table[token - start] if start <= token < start + rows else np.zeros(dim)
        np.testing.assert_array_equal(out[t], expected)
    np.testing.assert_array_equal(embedding(tokens, table, start, np.dtype(np.float32)), out)


@pytest.mark.parametrize("borders", [[0, 7], [0, 4, 7], [0, 3, 3, 7], [0, 1, 2, 3, 4, 5, 6, 7, 7]])
def test_shards_sum_to_the_lookup_exactly(borders):
    dtype = np.dtype(ml_dtypes.bfloat16)
    table = np.random.default_rng(0).standard_normal((7, 4)).astype(dtype).astype(np.float32)
    tokens = np.array([6, 0, 3, 3, 2, 1, 5, 4])
    parts = [embedding(tokens, table[lo:hi], lo, dtype) for lo, hi in zip(borders, borders[1:], strict=False)]
    assert all(part.dtype == dtype for part in parts)
    np.testing.assert_array_equal(sum(part.astype(np.float32) for part in parts), table[tokens])


def test_a_poisoned_row_of_another_token_does_not_leak():
    table = np.array([[1, 2], [np.nan, np.inf], [3, 4]], np.float32)
    np.testing.assert_array_equal(embedding(np.array([2, 9, 0]), table, 0, np.dtype(np.float32)),
                                  [[3, 4], [0, 0], [1, 2]])
