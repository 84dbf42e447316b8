"""Both forms of latent attention against keys, values and one softmax at a time in float64."""

import math
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cutp.ops import attention, latent_attention
from cutp.ops.latent_attention import expanded_latent_attention
from cutp.ops.linear import linear_per_head

pytestmark = pytest.mark.filterwarnings("error")
bfloat16 = np.dtype(ml_dtypes.bfloat16)
NOPE, ROPE, VALUE = 5, 2, 4
RAGGED = [(0, 5), (7, 0), (0, 0), (0, 1), (11, 1), (4, 6), (2, 0), (3, 1)]
SCALE = 0.3


@dataclass
class Case:
    """A batch whose pages hold NaN wherever no request has a token, and a table that points nowhere beyond its use."""

    q: np.ndarray
    kv_b: np.ndarray
    pages: np.ndarray
    table: np.ndarray
    offsets: np.ndarray
    cached: np.ndarray
    latents: list[np.ndarray]  # per request [L, R + ROPE]

    @property
    def batch(self):
        return self.pages, self.table, self.offsets, self.cached

    def expanded(self, **options):
        return expanded_latent_attention(self.q, self.kv_b, *self.batch, SCALE, **options)

    def absorbed(self, **options):
        rank = self.kv_b.shape[2]
        q = linear_per_head(self.q[..., :NOPE], self.kv_b[:, :NOPE].transpose(0, 2, 1))
        q = np.concatenate([q, self.q[..., NOPE:]], axis=-1)
        mixed = latent_attention.latent_attention(q, *self.batch, SCALE, rank, **options)
        return linear_per_head(mixed, self.kv_b[:, NOPE:])

    def reference(self):
        out = np.full((*self.q.shape[:2], VALUE), np.nan)
        rank = self.kv_b.shape[2]
        kv_b = self.kv_b.astype(np.float64)
        for b, latents in enumerate(self.latents):
            c, rope = latents[:, :rank].astype(np.float64), latents[:, rank:].astype(np.float64)
            for t in range(self.offsets[b], self.offsets[b + 1]):
                seen = range(int(self.cached[b] + t - self.offsets[b]) + 1)
                for h in range(self.q.shape[1]):
                    nope_query, rope_query = np.split(self.q[t, h].astype(np.float64), [NOPE])
                    logits = [SCALE * float(nope_query @ (kv_b[h, :NOPE] @ c[j]) + rope_query @ rope[j]) for j in seen]
                    weights = [math.exp(s - max(logits)) for s in logits]
                    out[t, h] = sum(w / sum(weights) * (kv_b[h, NOPE:] @ c[j])
                                    for w, j in zip(weights, seen, strict=True))
        return out


def make_case(seed, requests, *, n_heads=3, rank=6, page_size=3, size=1.0, dtype=np.float32):
    """requests: (tokens in the cache, new tokens) each."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return (size * rng.standard_normal(shape)).astype(np.float32).astype(dtype)

    cached, new = np.array(requests, int).reshape(-1, 2).T
    counts = [-(-int(total) // page_size) for total in cached + new]
    pages = np.full((sum(counts) + 2, 1, 1, page_size, rank + ROPE), np.nan, dtype)
    table = np.full((len(requests), max(counts, default=0) + 1), 10**6)
    numbers = iter(rng.permutation(len(pages)))
    latents = []
    for b, total in enumerate(cached + new):
        latents.append(draw(total, rank + ROPE))
        table[b, : counts[b]] = [next(numbers) for _ in range(counts[b])]
        for position in range(total):
            pages[table[b, position // page_size], 0, 0, position % page_size] = latents[b][position]
    offsets = np.concatenate([[0], np.cumsum(new)])
    kv_b = (rng.standard_normal((n_heads, NOPE + VALUE, rank)) / math.sqrt(rank)).astype(np.float32)
    if dtype == bfloat16:
        kv_b = kv_b.astype(bfloat16).astype(np.float32)
    return Case(draw(int(offsets[-1]), n_heads, NOPE + ROPE), kv_b, pages, table, offsets, cached, latents)


def close(got, expected, tolerance=2e-5):
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)


requests = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 6)), min_size=1, max_size=4)


@settings(max_examples=30, derandomize=True, deadline=None)
@given(requests, st.integers(1, 4), st.integers(1, 7), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_both_forms_equal_float64(batch, n_heads, rank, page_size, seed):
    case = make_case(seed, batch, n_heads=n_heads, rank=rank, page_size=page_size)
    close(case.expanded(), case.reference())
    close(case.absorbed(), case.reference())


def test_out():
    case = make_case(1, RAGGED)
    out = np.full((len(case.q), 3, VALUE), np.nan, np.float32)
    assert case.expanded(out=out) is out
    np.testing.assert_array_equal(out, case.expanded())
    q = np.zeros((len(case.q), 3, 6 + ROPE), np.float32)
    mixed = np.full((len(case.q), 3, 6), np.nan, np.float32)
    assert latent_attention.latent_attention(q, *case.batch, SCALE, 6, out=mixed) is mixed
    close(mixed[-1], np.broadcast_to(case.latents[-1][:, :6].mean(axis=0), (3, 6)))  # equal scores


def test_batch_slot_does_not_matter():
    case = make_case(2, RAGGED)
    expanded, absorbed = case.expanded(), case.absorbed()
    for b in range(len(RAGGED)):
        rows = slice(case.offsets[b], case.offsets[b + 1])
        alone = Case(case.q[rows], case.kv_b, case.pages, case.table[b : b + 1],
                     np.array([0, rows.stop - rows.start]), case.cached[b : b + 1], [])
        np.testing.assert_array_equal(alone.expanded(), expanded[rows])
        close(alone.absorbed(), absorbed[rows], 1e-6)  # its products per head run over all rows of the batch


@pytest.mark.parametrize("form", ["expanded", "absorbed"])
def test_chunks_equal_one_shot(form):
    whole = make_case(3, [(0, 11)])
    expected = getattr(whole, form)()
    for start, stop in [(0, 4), (4, 5), (5, 11)]:
        part = Case(whole.q[start:stop], whole.kv_b, whole.pages, whole.table, np.array([0, stop - start]),
                    np.array([start]), [])
        close(getattr(part, form)(), expected[start:stop], 1e-6)


@pytest.mark.parametrize("limit", [1, 40, 500])
def test_blocks_of_heads_and_of_queries_equal_one_block(monkeypatch, limit):
    case = make_case(4, RAGGED)
    expanded, absorbed = case.expanded(), case.absorbed()
    heads = []
    attend = attention.causal_attention
    monkeypatch.setattr(latent_attention, "_MAX_EXPANDED", limit)
    monkeypatch.setattr(attention, "_MAX_SCORES", limit)
    monkeypatch.setattr(latent_attention, "causal_attention",
                        lambda q, *rest, **options: heads.append(q.shape[1]) or attend(q, *rest, **options))
    close(case.expanded(), expanded, 1e-6)
    assert sum(heads) == 3 * sum(new > 0 for _, new in RAGGED) and (limit > 1 or max(heads) == 1)
    close(case.absorbed(), absorbed, 1e-6)


@pytest.mark.parametrize("form", ["expanded", "absorbed"])
def test_bfloat16(form):
    case = make_case(5, RAGGED, dtype=bfloat16)
    got = getattr(case, form)()
    assert got.dtype == bfloat16
    close(got.astype(np.float32), case.reference(), 4e-2)


def test_expanded_keys_and_values_are_rounded():
    """As a projection's results are: 1 + 2^-10 is no bfloat16 number."""
    case = make_case(6, [(0, 1)], n_heads=1, rank=1, dtype=bfloat16)
    case.kv_b[...] = 1 + 2.0**-7
    case.pages[...] = 1 + 2.0**-3
    product = np.float32(1 + 2.0**-7) * np.float32(1 + 2.0**-3)
    assert product != product.astype(bfloat16)
    keys = []
    attend = latent_attention.causal_attention
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latent_attention, "causal_attention",
                      lambda q, k, v, *rest, **options: keys.append((k, v)) or attend(q, k, v, *rest, **options))
        case.expanded()
    [(k, v)] = keys
    np.testing.assert_array_equal(k[0, 0], [product.astype(bfloat16)] * NOPE + [1.125] * ROPE)
    np.testing.assert_array_equal(v[0, 0], [product.astype(bfloat16)] * VALUE)


@pytest.mark.parametrize("dtype", [np.int32, np.uint32])
@pytest.mark.parametrize("form", ["expanded", "absorbed"])
def test_other_integer_types(form, dtype):
    case = make_case(7, RAGGED)
    expected = getattr(case, form)()
    case.table, case.offsets, case.cached = (a.astype(dtype) for a in (case.table, case.offsets, case.cached))
    np.testing.assert_array_equal(getattr(case, form)(), expected)


def test_large_scores_do_not_overflow():
    case = make_case(8, [(3, 4)], size=40.0)
    close(case.expanded(), case.reference(), 1e-3)
    close(case.absorbed(), case.reference(), 1e-3)
