"""A batch for prefill_attention.cu or prefill_attention_hopper.cu, and what both are held to."""

from contextlib import contextmanager, nullcontext

import ml_dtypes
import numpy as np
import pytest

from cutp.array.kernel import use_backend
from cutp.ops import prefill_attention_cuda
from cutp.ops import prefill_attention_hopper_cuda as hopper
from cutp.ops.attention import paged_attention
from cutp.ops.prefill_attention_cuda import prefill_attention, prefill_work_list
from cutp.ops.prefill_attention_hopper_cuda import hopper_work_list
from tests.emulation.emulator import EmulatorBackend
from tests.ops.test_attention import make_case

DTYPES = {"bf16": np.dtype(ml_dtypes.bfloat16), "f16": np.dtype(np.float16), "f32": np.dtype(np.float32)}
# Of a row: |error| / |row|. Weights and results are rounded to the dtype, at other places than in the reference.
LARGEST_ERROR = {"bf16": 8e-3, "f16": 1e-3, "f32": 1e-5}


def same_bits(a, b):
    return a.shape == b.shape and a.tobytes() == b.tobytes()


class Batch:
    """A batch on the device. Pages hold NaN where no request has a token; unused numbers of pages are impossible."""

    kinds = [(name, head_dim) for name in DTYPES for head_dim in (64, 80, 96, 128, 256)]
    # Each head dim once, and each kind of code.
    emulated = [("bf16", 64), ("f16", 80), ("f32", 96), ("bf16", 128), ("f16", 256), ("f32", 256)]
    long_emulated = [("bf16", 128), ("f32", 96)]
    longest_emulated = 90  # tokens of a random request

    def __init__(self, device, requests, name="bf16", head_dim=64, *, group=2, n_kv_heads=1, page_size=16, seed=0,
                 size=1.0):
        self.device, self.name, self.group = device, name, group
        self.case = make_case(seed, requests, group=group, n_kv_heads=n_kv_heads, head_dim=head_dim,
                              page_size=page_size, dtype=DTYPES[name], size=size)
        self.case.table = np.ascontiguousarray(self.case.table[:, :-1])  # no entry more than the longest request needs
        self.scale = head_dim**-0.5
        self.pages = device.array(self.case.pages)

    def requests(self):
        """(which, tokens in the cache, new tokens) of all."""
        new = np.diff(self.case.offsets)
        return [(b, self.case.cached[b], new[b]) for b in range(len(new))]

    def run(self, requests=None, work_list=None, q=None, table=None, **options):
        """requests: for which to attend, and from where on, if not for all with all their new tokens."""
        case, array = self.case, lambda x: self.device.array(np.asarray(x, np.int32))
        requests = self.requests() if requests is None else requests
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

    def check_every_order_of_threads(self, window):
        expected = self.run(window=window)
        for seed in (1, 2, 3):
            with use_backend(EmulatorBackend(order_seed=seed)) if self.device.emulated else nullcontext():
                assert same_bits(self.run(window=window), expected)

    def check_chunks_give_the_bits_of_one_shot(self, chunks, options):
        """Of one request without tokens in the cache; the chunks are all of it."""
        whole, begin = self.run(**options), 0
        for chunk in chunks:
            part = self.run(requests=[(0, begin, chunk)], **options)
            assert same_bits(part, whole[begin: begin + chunk])
            begin += chunk
        assert begin == len(whole)

    def check_a_request_has_the_same_bits_in_every_batch(self, window):
        requests = self.requests()
        together = np.split(self.run(window=window), self.case.offsets[1:-1])
        for request, expected in zip(requests, together, strict=True):
            assert same_bits(self.run(requests=[request], window=window), expected)
        assert same_bits(self.run(requests=requests[::-1], window=window), np.concatenate(together[::-1]))

    def check_only_listed_work_is_done(self, listed):
        """listed: the items for tokens 42 .. 83 of the first of two requests and all of the second, and idle ones."""
        whole, got = self.run(), self.run(work_list=listed)
        second = self.case.offsets[1]
        assert same_bits(got[42:84], whole[42:84]) and same_bits(got[second:], whole[second:])
        assert np.isnan(got[:42].astype(np.float32)).all() and np.isnan(got[84:second].astype(np.float32)).all()
        assert np.isnan(self.run(work_list=np.zeros((0, len(listed[0])))).astype(np.float32)).all()


class HopperBatch(Batch):
    """The same for prefill_attention_hopper.cu."""

    kinds = [kind for kind in Batch.kinds if kind[0] != "f32"]
    emulated = [("bf16", 64), ("f16", 80), ("bf16", 128), ("f16", 256)]  # each size of a tile once
    long_emulated = [("bf16", 128)]
    longest_emulated = 150

    def run(self, requests=None, work_list=None, **options):
        requests = self.requests() if requests is None else requests
        if work_list is None:
            _, cached, new = np.array(requests, int).reshape(-1, 3).T
            work_list = hopper_work_list(new, cached, np.cumsum(new) - new, self.group, self.case.q.shape[2])
        return super().run(requests, work_list, **options)


@contextmanager
def few_hopper_blocks(device, monkeypatch):
    """Blocks of threads that do several items each, as on a GPU with more work."""
    if device.emulated:
        monkeypatch.setattr(hopper, "_MULTIPROCESSORS", 3)
    else:
        cupy = pytest.importorskip("cupy")
        if cupy.cuda.Device().compute_capability != "90":
            pytest.skip("the GPU is no Hopper")
    prefill_attention_cuda._plan.cache_clear()
    yield
    prefill_attention_cuda._plan.cache_clear()


def arguments():
    i = np.int32
    return {
        "q": np.zeros((3, 4, 64), np.float32), "pages": np.zeros((2, 2, 2, 16, 64), np.float32),
        "lookup_table": np.zeros((1, 2), i), "input_row_offsets": np.array([0, 3], i),
        "cache_lengths": np.zeros(1, i), "work_list": np.zeros((1, 2), i), "scale": 0.1,
        "out": np.zeros((3, 4, 64), np.float32),
    }
