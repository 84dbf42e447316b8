"""Paged attention against one softmax at a time in float64."""

import math
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cutp.ops import attention
from cutp.ops.attention import paged_attention

pytestmark = pytest.mark.filterwarnings("error")
bfloat16 = np.dtype(ml_dtypes.bfloat16)
GROUPS = (1, 2, 3, 4, 8)


@dataclass
class Case:
    """A batch whose pages hold NaN wherever no request has a token, and a table that points nowhere beyond its use."""

    q: np.ndarray
    pages: np.ndarray
    table: np.ndarray
    offsets: np.ndarray
    cached: np.ndarray
    keys: list[np.ndarray]  # per request [L, H_kv, D]
    values: list[np.ndarray]

    def run(self, scale=0.3, **options):
        return paged_attention(self.q, self.pages, self.table, self.offsets, self.cached, scale, **options)

    def reference(self, scale=0.3, **options):
        return reference(self.q, self.keys, self.values, self.offsets, self.cached, scale, **options)


def make_case(seed, requests, *, group=1, n_kv_heads=2, head_dim=4, page_size=3, size=1.0, dtype=np.float32):
    """requests: (tokens in the cache, new tokens) each."""
    rng = np.random.default_rng(seed)
    cached, new = np.array(requests, int).reshape(-1, 2).T
    counts = [-(-int(total) // page_size) for total in cached + new]
    num_pages = sum(counts) + 2
    pages = np.full((num_pages, 2, n_kv_heads, page_size, head_dim), np.nan, dtype)
    table = np.full((len(requests), max(counts, default=0) + 1), 10**6)
    numbers = iter(rng.permutation(num_pages))
    keys, values = [], []
    for b, total in enumerate(cached + new):
        k, v = (size * rng.standard_normal((2, total, n_kv_heads, head_dim))).astype(np.float32).astype(dtype)
        table[b, : counts[b]] = [next(numbers) for _ in range(counts[b])]
        for position in range(total):
            page = table[b, position // page_size]
            pages[page, 0, :, position % page_size] = k[position]
            pages[page, 1, :, position % page_size] = v[position]
        keys.append(k)
        values.append(v)
    offsets = np.concatenate([[0], np.cumsum(new)])
    q = (size * rng.standard_normal((offsets[-1], group * n_kv_heads, head_dim))).astype(np.float32).astype(dtype)
    return Case(q, pages, table, offsets, cached, keys, values)


def reference(q, keys, values, offsets, cached, scale, window=None, softcap=None, sinks=None):
    n_heads = q.shape[1]
    out = np.full(q.shape, np.nan)
    for b in range(len(cached)):
        for t in range(offsets[b], offsets[b + 1]):
            position = int(cached[b] + t - offsets[b])
            seen = range(0 if window is None else max(0, position - window + 1), position + 1)
            for h in range(n_heads):
                kv = h // (n_heads // keys[b].shape[1])
                query = q[t, h].astype(np.float64)
                logits = [scale * float(query @ keys[b][j, kv].astype(np.float64)) for j in seen]
                if softcap is not None:
                    logits = [softcap * math.tanh(s / softcap) for s in logits]
                peak = max(logits + ([] if sinks is None else [float(sinks[h])]))
                weights = [math.exp(s - peak) for s in logits]
                total = sum(weights) + (0.0 if sinks is None else math.exp(float(sinks[h]) - peak))
                out[t, h] = sum(w / total * values[b][j, kv].astype(np.float64)
                                for w, j in zip(weights, seen, strict=True))
    return out


def close(got, expected, tolerance=2e-5):
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)


RAGGED = [(0, 5), (7, 0), (0, 0), (0, 1), (11, 1), (4, 6), (2, 0), (3, 1)]
requests = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 6)), min_size=1, max_size=4)


@settings(max_examples=40, derandomize=True, deadline=None)
@given(requests, st.sampled_from(GROUPS), st.integers(1, 3), st.integers(1, 6), st.integers(1, 5),
       st.sampled_from([None, 1, 2, 5, 40]), st.sampled_from([None, 2.0, 30.0]), st.booleans(),
       st.integers(0, 2**32 - 1))
def test_equals_float64(batch, group, n_kv_heads, head_dim, page_size, window, softcap, has_sinks, seed):
    case = make_case(seed, batch, group=group, n_kv_heads=n_kv_heads, head_dim=head_dim, page_size=page_size)
    sinks = None
    if has_sinks:
        sinks = np.random.default_rng(seed).uniform(-3, 3, group * n_kv_heads).astype(np.float32)
    options = dict(window=window, softcap=softcap, sinks=sinks)
    out = np.full(case.q.shape, np.nan, np.float32)
    assert case.run(out=out, **options) is out
    close(out, case.reference(**options))
    np.testing.assert_array_equal(case.run(**options), out)


@pytest.mark.parametrize("group", GROUPS)
def test_each_query_head_reads_its_key_value_head(group):
    case = make_case(0, RAGGED, group=group, n_kv_heads=3)
    for kv in range(3):  # values that tell the head they came from
        case.pages[:, 1, kv] = np.where(np.isnan(case.pages[:, 1, kv]), np.nan, kv)
    np.testing.assert_allclose(case.run()[..., 0], np.tile(np.repeat(np.arange(3), group), (len(case.q), 1)), rtol=1e-6)


# Lengths of the one request are 9 cached and 4 new: 13 in all.
@pytest.mark.parametrize("window", [1, 2, 3, 9, 12, 13, 14, 100])
def test_window(window):
    case = make_case(1, [(9, 4), (0, 13)], group=2)
    close(case.run(window=window), case.reference(window=window))
    if window >= 13:
        np.testing.assert_array_equal(case.run(window=window), case.run())
    if window == 1:
        close(case.run(window=1)[0], np.repeat(case.values[0][9], 2, axis=0))


def test_keys_before_the_window_are_not_read():
    case = make_case(2, [(10, 1)], page_size=4)
    expected = case.run(window=3)
    assert np.isfinite(expected).all()
    case.pages[case.table[0, :2]] = np.nan  # positions 0 .. 7; the window holds 8, 9 and 10
    np.testing.assert_array_equal(case.run(window=3), expected)


@pytest.mark.parametrize("softcap", [0.5, 5.0, 50.0])
def test_softcap_of_large_scores(softcap):
    case = make_case(3, RAGGED, group=2, size=6.0)
    close(case.run(softcap=softcap), case.reference(softcap=softcap), 1e-4)


@pytest.mark.parametrize("sink", [-200.0, -30.0, 0.0, 30.0, 200.0])
def test_sinks(sink):
    case = make_case(4, RAGGED, group=2)
    sinks = np.array([sink, -sink, 1.5, sink], np.float32)
    got = case.run(sinks=sinks)
    np.testing.assert_allclose(got, case.reference(sinks=sinks), rtol=2e-5, atol=1e-18)
    if sink < 0:
        close(got[:, 0], case.run()[:, 0])
    if sink > 0:
        assert np.abs(got[:, 0]).max() < 1e-9 < np.abs(got[:, 1]).max()


def test_large_scores_do_not_overflow():
    case = make_case(5, [(3, 4)], size=60.0)
    got = case.run(scale=1.0)
    assert np.isfinite(got).all()
    close(got, case.reference(scale=1.0), 1e-3)


def test_requests_share_pages():
    """Two requests with a common prefix read the same pages; their results are those of separate copies."""
    case = make_case(6, [(6, 2), (6, 3)], page_size=3)
    for source in (case.keys, case.values):
        source[1][:6] = source[0][:6]
    case.table[1, :2] = case.table[0, :2]
    close(case.run(), case.reference())


def test_page_numbers_do_not_matter():
    case = make_case(7, RAGGED, group=2)
    expected = case.run(window=6)
    order = np.random.default_rng(1).permutation(len(case.pages))
    inverse = np.argsort(order)
    case.pages = case.pages[order]
    case.table = np.where(case.table < 10**6, inverse[np.minimum(case.table, len(order) - 1)], 10**6)
    np.testing.assert_array_equal(case.run(window=6), expected)


@pytest.mark.parametrize("cuts", [[1], [5], [9], [3, 4, 8], list(range(1, 10))])
@pytest.mark.parametrize("window", [None, 4])
def test_chunks_equal_one_shot(cuts, window):
    case = make_case(8, [(0, 10)], group=3)
    whole = case.run(window=window)
    for start, stop in zip([0, *cuts], [*cuts, 10], strict=True):
        # Slots of later tokens hold NaN until their chunk comes.
        pages = case.pages.copy()
        for position in range(stop, 10):
            pages[case.table[0, position // 3], :, :, position % 3] = np.nan
        part = paged_attention(case.q[start:stop], pages, case.table, np.array([0, stop - start]), np.array([start]),
                               0.3, window=window)
        close(part, whole[start:stop], 1e-6)


@pytest.mark.parametrize("limit", [1, 37, 200])
@pytest.mark.parametrize("options", [{}, {"window": 4}, {"softcap": 3.0, "sinks": np.ones(6, np.float32)}], ids=str)
def test_blocks_of_queries_equal_one_block(monkeypatch, limit, options):
    case = make_case(9, RAGGED, group=3)
    whole = case.run(**options)
    blocks = []
    attend = attention._attend
    monkeypatch.setattr(attention, "_MAX_SCORES", limit)
    monkeypatch.setattr(attention, "_attend", lambda q, *rest: blocks.append(len(q)) or attend(q, *rest))
    close(case.run(**options), whole, 1e-6)
    assert sum(blocks) == len(case.q) and (limit > 1 or max(blocks) == 1)


def test_batch_slot_does_not_matter():
    case = make_case(10, RAGGED, group=2)
    whole = case.run(softcap=20.0)
    for b in range(len(RAGGED)):
        rows = slice(case.offsets[b], case.offsets[b + 1])
        alone = paged_attention(case.q[rows], case.pages, case.table[b : b + 1],
                                np.array([0, rows.stop - rows.start]), case.cached[b : b + 1], 0.3, softcap=20.0)
        np.testing.assert_array_equal(alone, whole[rows])


@pytest.mark.parametrize("dtype", [np.int32, np.uint32])
def test_other_integer_types(dtype):
    case = make_case(11, RAGGED, group=2)
    expected = case.run(window=3)
    case.table, case.offsets, case.cached = (a.astype(dtype) for a in (case.table, case.offsets, case.cached))
    np.testing.assert_array_equal(case.run(window=3), expected)


@pytest.mark.parametrize("dtype, tolerance", [(bfloat16, 2e-2), (np.dtype(np.float16), 2e-3)])
def test_16_bit(dtype, tolerance):
    case = make_case(12, RAGGED, group=4, dtype=dtype)
    sinks = np.linspace(-2, 2, 8).astype(np.float32)
    got = case.run(window=5, sinks=sinks)
    assert got.dtype == dtype
    close(got.astype(np.float32), case.reference(window=5, sinks=sinks), tolerance)


def test_probabilities_are_rounded_and_their_sum_is_not():
    """Keys 0 and -1, values 0 and 1: the result is round(e) / (1 + e) with e = exp(-score)."""
    scores = np.linspace(0.02, 6, 97).astype(np.float32).astype(bfloat16)
    rounded_only_at_the_end = 0
    for score in scores:
        pages = np.zeros((1, 2, 1, 2, 1), bfloat16)
        pages[0, :, 0, 0, 0] = -1, 1
        q = np.array([[[score]]])
        got = float(paged_attention(q, pages, np.array([[0]]), np.array([0, 1]), np.array([1]), 1.0)[0, 0, 0])
        e = math.exp(-float(score))
        e_rounded = float(np.float32(e).astype(bfloat16))
        assert got == float(np.float32(e_rounded / (1 + e)).astype(bfloat16))
        rounded_only_at_the_end += got != float(np.float32(e / (1 + e)).astype(bfloat16))
    assert rounded_only_at_the_end > 5


def test_output_may_be_the_query():
    case = make_case(13, RAGGED, group=2)
    expected = case.run()
    assert case.run(out=case.q) is case.q
    np.testing.assert_array_equal(case.q, expected)
