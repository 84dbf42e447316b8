"""prefill_attention.cu against the NumPy attention, and against itself in other batches and chunks, bit for bit."""

from contextlib import nullcontext

import ml_dtypes
import numpy as np
import pytest

from cutp.array.kernel import use_backend
from cutp.errors import ConfigError
from cutp.ops.attention import paged_attention
from cutp.ops.prefill_attention_cuda import prefill_attention, prefill_work_list
from tests.emulation.emulator import EmulatorBackend
from tests.ops.test_attention import make_case

DTYPES = {"bf16": np.dtype(ml_dtypes.bfloat16), "f16": np.dtype(np.float16), "f32": np.dtype(np.float32)}
# Of a row: |error| / |row|. Weights and results are rounded to the dtype, at other places than in the reference.
LARGEST_ERROR = {"bf16": 8e-3, "f16": 1e-3, "f32": 1e-5}
# Each head dim once, and each kind of code; a GPU runs the others too.
EMULATED = [("bf16", 64), ("f16", 80), ("f32", 96), ("bf16", 128), ("f16", 256), ("f32", 256)]
ALL = [(name, head_dim) for name in DTYPES for head_dim in (64, 80, 96, 128, 256)]


class Batch:
    """A batch on the device. Pages hold NaN where no request has a token; unused numbers of pages are impossible."""

    def __init__(self, device, requests, name="bf16", head_dim=64, *, group=2, n_kv_heads=1, page_size=16, seed=0,
                 size=1.0):
        self.device, self.name, self.group = device, name, group
        self.case = make_case(seed, requests, group=group, n_kv_heads=n_kv_heads, head_dim=head_dim,
                              page_size=page_size, dtype=DTYPES[name], size=size)
        self.case.table = np.ascontiguousarray(self.case.table[:, :-1])  # no entry more than the longest request needs
        self.scale = head_dim**-0.5
        self.pages = device.array(self.case.pages)

    def run(self, requests=None, work_list=None, q=None, table=None, **options):
        """`requests`: (which, tokens in the cache, new tokens) to attend for, if not all with all their new tokens."""
        case, array = self.case, lambda x: self.device.array(np.asarray(x, np.int32))
        new = np.diff(case.offsets)
        if requests is None:
            requests = [(b, case.cached[b], new[b]) for b in range(len(new))]
        which, cached, new = np.array(requests, int).reshape(-1, 3).T
        rows = [case.q[case.offsets[b] + c - case.cached[b]:][:n] for b, c, n in requests]
        q = self.device.array(np.concatenate(rows)) if q is None else q
        if work_list is None:
            work_list = prefill_work_list(new, cached, self.group)
        if options.get("sinks") is not None:
            options["sinks"] = self.device.array(np.asarray(options["sinks"], np.float32))
        out = self.device.poisoned(q.shape, case.q.dtype)
        prefill_attention(q, self.pages, array((case.table if table is None else table)[which]),
                          array(np.concatenate([[0], np.cumsum(new)])), array(cached), array(work_list), self.scale,
                          out=out, pdl=True, **options)
        return self.device.numpy(out)

    def reference(self, **options):
        case = self.case
        return paged_attention(case.q, case.pages, case.table, case.offsets, case.cached, self.scale, **options)

    def check(self, tolerance=None, **options):
        got, expected = self.run(**options).astype(np.float64), self.reference(**options).astype(np.float64)
        error = np.linalg.norm(got - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
        assert error.max(initial=0) <= (tolerance or LARGEST_ERROR[self.name])


def same_bits(a, b):
    return a.shape == b.shape and a.tobytes() == b.tobytes()


def test_head_dims_and_dtypes(device):
    for name, head_dim in EMULATED if device.emulated else ALL:
        batch = Batch(device, [(37, 45), (9, 0), (0, 1), (100, 33)], name, head_dim, n_kv_heads=2, page_size=48)
        batch.check()
        batch.check(window=29, softcap=3.0, sinks=np.linspace(-2, 2, 4, dtype=np.float32))


@pytest.mark.parametrize("group", [1, 3, 4, 5, 7, 8, 16])
def test_groups_of_query_heads(device, group):
    sinks = np.linspace(-1, 1, group, dtype=np.float32)
    Batch(device, [(3, 43), (70, 2)], group=group, page_size=32).check(sinks=sinks)


@pytest.mark.parametrize("name", ["bf16", "f32"])
@pytest.mark.parametrize("window", [1, 2, 31, 32, 33, 63, 64, 65, 1000])
def test_windows(device, window, name):
    Batch(device, [(30, 100), (0, 20)], name, 64 if name == "bf16" else 96).check(window=window)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 64, 65, 127, 128, 129])
def test_lengths_around_blocks_and_pages(device, length):
    Batch(device, [(0, length), (length, 1), (length - 1, 64)], group=1, page_size=64).check()


def test_random_batches(device):
    rng = np.random.default_rng(0)
    for seed in range(5 if device.emulated else 100):
        name, head_dim = EMULATED[seed % 6] if device.emulated else ALL[seed % 15]
        longest = 90 if device.emulated else 700
        requests = [tuple(rng.integers(0, longest, 2)) for _ in range(rng.integers(1, 5))]
        group, page_size = int(rng.choice([1, 2, 3, 4, 6])), int(rng.choice([16, 32, 48, 64, 128]))
        batch = Batch(device, requests, name, head_dim, group=group, n_kv_heads=int(rng.integers(1, 3)),
                      page_size=page_size, seed=seed)
        batch.check(window=int(rng.integers(1, longest)) if rng.random() < 0.5 else None,
                    softcap=2.0 if rng.random() < 0.5 else None)


def test_every_order_of_threads_gives_the_same_bits(device):
    for name, head_dim in (("bf16", 128), ("f32", 256)):
        batch = Batch(device, [(20, 60), (0, 3)], name, head_dim)
        expected = batch.run(window=40)
        for seed in (1, 2, 3):
            with use_backend(EmulatorBackend(order_seed=seed)) if device.emulated else nullcontext():
                assert same_bits(batch.run(window=40), expected)


@pytest.mark.parametrize(("name", "head_dim"), [("bf16", 64), ("f16", 80), ("bf16", 128), ("f32", 96), ("f32", 256)])
@pytest.mark.parametrize("options", [{}, {"window": 37, "softcap": 2.0, "sinks": [0.5, -3.0]}], ids=["plain", "window"])
def test_chunks_give_the_bits_of_one_shot(device, name, head_dim, options):
    length = 150 if device.emulated else 1500
    batch = Batch(device, [(0, length)], name, head_dim, size=3.0)
    whole = batch.run(**options)
    begin = 0
    for chunk in (70, 1, 8, 57, length - 136):
        part = batch.run(requests=[(0, begin, chunk)], **options)
        assert same_bits(part, whole[begin: begin + chunk])
        begin += chunk


@pytest.mark.parametrize(("name", "head_dim"), [("bf16", 128), ("f32", 96)])
def test_a_request_has_the_same_bits_in_every_batch(device, name, head_dim):
    requests = [(5, 40), (0, 77), (90, 1), (33, 16)]
    batch = Batch(device, requests, name, head_dim, group=3)
    together = np.split(batch.run(window=50), batch.case.offsets[1:-1])
    for b, (cached, new) in enumerate(requests):
        assert same_bits(batch.run(requests=[(b, cached, new)], window=50), together[b])
    backwards = [(b, *requests[b]) for b in (3, 2, 1, 0)]
    assert same_bits(batch.run(requests=backwards, window=50), np.concatenate(together[::-1]))


def test_pages_before_the_window_are_not_looked_up(device):
    batch = Batch(device, [(200, 30)])
    table = batch.case.table.copy()
    table[0, : (200 - 20 + 1) // 16] = 10**6
    assert same_bits(batch.run(table=table, window=20), batch.run(window=20))


def test_requests_may_share_pages(device):
    batch = Batch(device, [(64, 20), (64, 20)])
    batch.case.table[1, :4] = batch.case.table[0, :4]
    batch.check()


@pytest.mark.parametrize("sink", [-30.0, 30.0])
def test_extreme_sinks(device, sink):
    Batch(device, [(0, 40)]).check(sinks=np.array([sink, 0.0], np.float32))


@pytest.mark.parametrize("name", ["bf16", "f32"])
def test_large_scores(device, name):
    # Scores of some hundred: their own rounding moves a weight by a part in 1e4.
    batch = Batch(device, [(10, 90)], name, 64 if name == "bf16" else 96, size=8.0)
    batch.check(tolerance=max(LARGEST_ERROR[name], 1e-4))


def test_equal_scores_average_the_values(device):
    batch = Batch(device, [(0, 100)])
    batch.case.q[:] = 0
    batch.check()


def test_a_query_of_nan_stays_alone(device):
    batch = Batch(device, [(0, 70)])
    before = batch.run()
    batch.case.q[33, 1] = np.nan
    after = batch.run()
    assert np.isnan(after[33, 1].astype(np.float32)).all()
    before[33, 1] = after[33, 1] = 0
    assert same_bits(before, after)


def test_queries_inside_of_a_wider_array(device):
    batch = Batch(device, [(12, 40)], group=2, n_kv_heads=2)
    q = batch.case.q
    wide = device.array(np.concatenate([q, np.full_like(q, np.nan)], axis=1))
    assert same_bits(batch.run(q=wide[:, : q.shape[1]]), batch.run())


def test_work_list():
    # 32 tokens an item at 4 heads; the item with the most keys first, equal ones in order.
    listed = prefill_work_list([70, 0, 33, 1], [0, 5, 100, 69], 4)
    assert listed.dtype == np.int32
    assert listed.tolist() == [[2, 32], [2, 0], [0, 64], [3, 0], [0, 32], [0, 0]]
    assert prefill_work_list([43], [0], 3).tolist() == [[0, 42], [0, 0]]
    assert prefill_work_list([], [], 1).shape == (0, 2)
    with pytest.raises(ConfigError, match="129 query heads"):
        prefill_work_list([1], [0], 129)


def test_only_listed_work_is_done(device):
    batch = Batch(device, [(3, 100), (0, 30)], "bf16", 64, group=3)  # 42 tokens an item
    whole = batch.run()
    # Items of no request, and of tokens that a request does not have, do nothing.
    listed = [[1, 0], [-1, 0], [0, 42], [0, 126], [1, 42], [-(1 << 24), 7]]
    got = batch.run(work_list=listed)
    assert same_bits(got[42:84], whole[42:84]) and same_bits(got[100:], whole[100:])
    assert np.isnan(got[:42].astype(np.float32)).all() and np.isnan(got[84:100].astype(np.float32)).all()
    assert np.isnan(batch.run(work_list=np.zeros((0, 2))).astype(np.float32)).all()


def test_long_prompts(device):
    n = 1 if device.emulated else 10
    for name, head_dim in (("bf16", 128), ("f32", 96)) if device.emulated else ALL:
        requests = [(0, 210 * n), (300 * n, 70 * n), (90 * n, 0), (31, 31)]
        Batch(device, requests, name, head_dim, group=4, page_size=64).check()
        Batch(device, [(100 * n, 110 * n)], name, head_dim, group=4, page_size=64).check(window=51 * n, softcap=30.0)


def arguments():
    i = np.int32
    return {
        "q": np.zeros((3, 4, 64), np.float32), "pages": np.zeros((2, 2, 2, 16, 64), np.float32),
        "lookup_table": np.zeros((1, 2), i), "input_row_offsets": np.array([0, 3], i),
        "cache_lengths": np.zeros(1, i), "work_list": np.zeros((1, 2), i), "scale": 0.1,
        "out": np.zeros((3, 4, 64), np.float32),
    }


@pytest.mark.parametrize(("name", "value", "message"), [
    ("q", np.zeros((3, 4, 64)), "q has dtype float64"),
    ("q", np.zeros((3, 4, 72), np.float32), "q has shape .* head dim of 64, 80, 96, 128, 256"),
    ("q", np.zeros((4, 3, 64), np.float32).transpose(1, 0, 2), "q of shape .* heads of a token must be contiguous"),
    ("q", np.zeros((3, 257), np.float32)[:, :256].reshape(3, 4, 64, copy=False), "multiple of 16 bytes apart"),
    ("q", np.zeros((3, 5, 64), np.float32), "pages has 2 heads and q has 5"),
    ("out", np.zeros((2, 4, 64), np.float32), "out has shape"),
    ("out", np.zeros((3, 4, 64), np.float16), "out has dtype float16"),
    ("out", np.zeros((3, 8, 64), np.float32)[:, ::2], "out of shape .* not contiguous"),
    ("pages", np.zeros((2, 2, 2, 16, 80), np.float32), "pages has shape"),
    ("pages", np.zeros((2, 2, 2, 24, 64), np.float32), "pages of 24 tokens"),
    ("pages", np.zeros((2, 2, 2, 16, 64), np.float16), "pages has dtype"),
    ("pages", np.zeros((4, 2, 2, 16, 64), np.float32)[::2], "pages of shape .* not contiguous"),
    ("sinks", np.zeros(2, np.float32), r"sinks has shape \(2,\); it needs \(4,\)"),
    ("sinks", np.zeros(4, np.float16), "sinks has dtype float16"),
    ("lookup_table", np.zeros((2, 2), np.int32), "lookup_table has shape"),
    ("lookup_table", np.zeros((1, 2), np.int64), "lookup_table has dtype int64"),
    ("lookup_table", np.zeros((1, 4), np.int32)[:, ::2].repeat(1, 0)[:, ::-1], "lookup_table of shape .* not contig"),
    ("input_row_offsets", np.zeros(3, np.int32), r"input_row_offsets has shape \(3,\); it needs \(2,\)"),
    ("cache_lengths", np.zeros((1, 1), np.int32), "cache_lengths has shape"),
    ("work_list", np.zeros(4, np.int32), "work_list has shape"),
    ("scale", -1.0, "scale is -1.0"),
    ("window", 0, "window is 0"),
    ("softcap", 0.0, "softcap is 0.0"),
])
def test_bad_arguments(name, value, message):
    given = arguments() | {name: value}
    with pytest.raises(ConfigError, match=message):
        prefill_attention(**given)
