"""Rows to sample, what should come out, and running the kernels of sampling, for their tests."""

from types import SimpleNamespace

import numpy as np

from cutp.comm.communicator import Communicator
from cutp.ops import sampling_cuda
from cutp.ops.philox import sampling_bits
from cutp.ops.sampling import SamplingRows, scores
from cutp.ops.sampling_cuda import SamplingArrays, SamplingBuffers, buffer_shapes, passes_needed
from cutp.ops.sampling_keys import NO_PAIR, pack_pairs, row_argmax, unpack_pairs
from cutp.ops.sampling_thresholds import thresholds
from tests.ops.kernel_results import read_only
from tests.ops.logits_batch import f32, gather_over

# Rows to sample and what should come out


def settings(n, **changed):
    fields = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=17, sample_index=0, position=0)
    dtypes = dict(top_k=np.int32, seed=np.uint64, sample_index=np.int64, position=np.int64)
    fields.update(changed)
    return SamplingRows(**{k: np.broadcast_to(np.asarray(v, dtypes.get(k, f32)), n).copy() for k, v in fields.items()})


def random_settings(rng, n):
    return settings(
        n,
        temperature=rng.choice([0, 0.3, 0.7, 1, 1.5], n),
        top_k=rng.choice([0, -1, 1, 2, 7, 40, 2**31 - 1], n),
        top_p=rng.choice([1, 0, 1e-6, 0.2, 0.5, 0.9, 0.95, 0.999], n),
        min_p=rng.choice([0, 0, 0.01, 0.1, 0.5, 1], n),
        seed=rng.integers(0, 2**64, n, dtype=np.uint64),
        sample_index=rng.integers(0, 2**32, n),
        position=rng.integers(0, 2**32, n),
    )


def natural_log(v):
    """philox.cuh's, operation by operation."""
    offset = v.view(np.int32) - np.int32(0x3F3504F3)
    k = (offset >> 23).astype(f32)
    f = ((offset & np.int32(0x007FFFFF)) + np.int32(0x3F3504F3)).view(f32) - f32(1)
    s = f / (f + f32(2))
    w = s * s
    series = np.full_like(w, f32(2) / f32(9))
    for denominator in (7, 5, 3):
        series = series * w + f32(2) / f32(denominator)
    return k * f32(0.693145751953125) + (k * f32(1.42860677e-6) + (s * f32(2) + s * w * series))


def kernel_gumbel(bits):
    """`gumbel_from_bits` with the logarithm above, which is the same on every machine."""
    u = np.minimum((bits.astype(f32) + f32(0.5)) * f32(2.0**-32), f32(1 - 2.0**-24))
    v = f32(1) - u
    return -natural_log(-(natural_log(v) + (f32(1) - v - u) / v))


def noise_of(rows, ids):
    """[B, ids]"""
    b, ids = len(rows), np.asarray(ids)
    each = [np.repeat(a, len(ids)) for a in (rows.seed, rows.sample_index, rows.position)]
    bits = sampling_bits(*each, np.tile(ids >> 2, b))
    return kernel_gumbel(bits[np.arange(b * len(ids)), np.tile(ids & 3, b)]).reshape(b, len(ids))


def expected_sample(x, rows):
    """Tokens and least scores of whole rows: NumPy's own functions, but for the noise."""
    alone = Communicator.single()
    row_max, tokens = row_argmax(x, 0, alone)
    least = np.full(len(rows), np.nan, f32)
    drawn = np.flatnonzero(rows.temperature > 0)
    some = rows.take(drawn)
    z = scores(x, drawn, row_max[drawn], some.temperature)
    least[drawn] = thresholds(z, some.top_k, some.top_p, some.min_p, alone)
    ids = np.arange(x.shape[1])
    pairs = np.where(z >= least[drawn, None], pack_pairs(z + noise_of(some, ids), ids), NO_PAIR)
    tokens[drawn] = unpack_pairs(pairs.max(axis=1))[1]
    return SimpleNamespace(tokens=tokens, least=least, row_max=row_max)


# Running the kernels


def new_buffers(device, batch, columns, blocks=None):
    made = {}
    for name, shape in buffer_shapes(batch, columns).items():
        if name == "histograms":
            made[name] = tuple(device.poisoned(*s) for s in shape)
        else:
            made[name] = device.poisoned(*shape)
    made["tickets"] = device.array(np.zeros(batch, np.uint32))
    if blocks:
        made["parts"] = device.poisoned((batch, blocks), np.uint64)
    return SamplingBuffers(**made)


def run_sample(device, x, rows, vocab_start=0, *, comm=None, blocks=None, buffers=None, arrays=None, passes=None,
               **options):
    """The results of `sampling_cuda.sample` on this rank."""
    (logits,) = read_only(device, x)
    buffers = buffers or new_buffers(device, *x.shape, blocks)
    arrays = arrays or SamplingArrays.of(rows, lambda a: read_only(device, a)[0])
    tokens = device.poisoned(len(x), np.int64)
    sampling_cuda.sample(logits, vocab_start, arrays, buffers, gather_over(comm, device), tokens=tokens,
                         passes=passes_needed(rows) if passes is None else passes, **options)
    assert not device.numpy(buffers.tickets).any()
    return SimpleNamespace(tokens=device.numpy(tokens), least=device.numpy(buffers.least),
                           row_max=device.numpy(buffers.row_max), status=device.numpy(buffers.status))


def assert_sampled(got, expected):
    np.testing.assert_array_equal(got.status, np.zeros_like(got.status))
    np.testing.assert_array_equal(got.row_max, expected.row_max)
    np.testing.assert_array_equal(got.least, expected.least)
    np.testing.assert_array_equal(got.tokens, expected.tokens)


def first_histogram(device, x, rows):
    arrays = SamplingArrays.of(rows, device.array)
    b = new_buffers(device, *x.shape)
    histogram = b.histograms[0]
    logits, tokens = device.array(x), device.poisoned(len(x), np.int64)
    sampling_cuda.row_argmax(logits, 0, arrays.temperature, parts=b.parts, tickets=b.tickets, pairs=b.pairs)
    sampling_cuda.combine_argmax(b.pairs[None], arrays, row_max=b.row_max, tokens=tokens, status=b.status,
                                 search=b.search, least=b.least, histogram=histogram)
    sampling_cuda.count_digits(logits, arrays.temperature, b.row_max, b.search, 0, histogram=histogram)
    return device.numpy(histogram).astype(np.int64)


def sampling_arguments():
    rows = SamplingArrays.of(settings(2), np.array)
    shapes = buffer_shapes(2, 6)
    made = {k: tuple(np.zeros(*s) for s in v) if k == "histograms" else np.zeros(*v) for k, v in shapes.items()}
    return dict(logits=np.zeros((2, 6), f32), vocab_start=0, rows=rows, buffers=SamplingBuffers(**made),
                gather=lambda x: x[None], tokens=np.zeros(2, np.int64))
