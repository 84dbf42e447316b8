"""New keys and values land in their slots, and nothing else changes."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cutp.ops.kv_write import kv_write, latent_write

pytestmark = pytest.mark.filterwarnings("error")


@settings(max_examples=40, derandomize=True, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 6), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_writes_its_slots_only(num_pages, heads, page_size, dim, seed):
    rng = np.random.default_rng(seed)
    tokens = int(rng.integers(0, num_pages * page_size + 1))
    slots = rng.permutation(num_pages * page_size)[:tokens]
    k, v = rng.standard_normal((2, tokens, heads, dim)).astype(np.float32)
    pages = np.full((num_pages, 2, heads, page_size, dim), np.nan, np.float32)
    expected = pages.copy()
    for t, slot in enumerate(slots):
        for h in range(heads):
            expected[slot // page_size, 0, h, slot % page_size] = k[t, h]
            expected[slot // page_size, 1, h, slot % page_size] = v[t, h]
    kv_write(k, v, pages, slots)
    np.testing.assert_array_equal(pages, expected)


def test_values_are_rounded_to_the_cache():
    pages = np.full((1, 2, 1, 2, 1), np.nan, ml_dtypes.bfloat16)
    kv_write(np.full((1, 1, 1), 257.5, np.float32), np.full((1, 1, 1), -1.0, np.float32), pages, np.array([1]))
    assert pages[0, 0, 0, 1, 0] == 258 and pages[0, 1, 0, 1, 0] == -1
    assert np.isnan(pages[0, :, 0, 0, 0].astype(np.float32)).all()


@settings(max_examples=25, derandomize=True, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_latents_go_to_their_slots_only(num_pages, page_size, channels, seed):
    rng = np.random.default_rng(seed)
    tokens = int(rng.integers(0, num_pages * page_size + 1))
    slots = rng.permutation(num_pages * page_size)[:tokens]
    latent = rng.standard_normal((tokens, channels)).astype(np.float32)
    pages = np.full((num_pages, 1, 1, page_size, channels), np.nan, np.float32)
    expected = pages.copy()
    for t, slot in enumerate(slots):
        expected[slot // page_size, 0, 0, slot % page_size] = latent[t]
    latent_write(latent, pages, slots)
    np.testing.assert_array_equal(pages, expected)
