"""The collectives on device arrays, against NumPy, on whatever GPUs (or stand-ins) are given.

`run_all(comm, gpu)` returns a digest of each result; `gpu` has `upload`, `download` and `empty`.
"""

import hashlib

import numpy as np

from cutp.array.graph import Stream, capture
from tests.comm.collective_cases import BFLOAT16, expected_sum, remainder_first, values

SUMMED = [np.dtype(d) for d in ("f4", "f2", "f8", "i1", "u1", "i4", "u4", "i8", "u8")] + [BFLOAT16]
SHAPES = [(), (1,), (0,), (7,), (3, 5), (129, 257), (1 << 20,)]


def check(gpu, comm, got, parts_sum, what, addends=None):
    """`got` against NumPy: in bits, but for sums of floats over more than two ranks, which are rounded otherwise."""
    got, want = gpu.download(got), np.asarray(parts_sum)
    assert got.dtype == want.dtype and got.shape == want.shape, (what, got.dtype, got.shape, want.dtype, want.shape)
    if addends is None or comm.size <= 2 or want.dtype.kind in "iu":
        bad = np.flatnonzero(got.reshape(-1).view(np.uint8) != want.reshape(-1).view(np.uint8))
        assert not len(bad), (what, len(bad), [x.reshape(-1)[bad[0] // got.itemsize] for x in (got, want)])
    else:
        step = 2.0 ** -{"float64": 52, "float32": 23, "float16": 10, "bfloat16": 7}[want.dtype.name]
        scale = np.sum([np.abs(x.astype(np.float64)) for x in addends], axis=0)
        error = np.abs(got.astype(np.float64) - want.astype(np.float64))
        assert (error <= comm.size * step * scale).all(), (what, error.max())
    digest = hashlib.sha256(got.tobytes()).hexdigest()[:16]
    return f"{what} {digest}"


def sums(comm, gpu):
    for dtype in SUMMED:
        for shape in SHAPES:
            parts = [values(dtype, shape, r) for r in range(comm.size)]
            x, want, what = gpu.upload(parts[comm.rank]), expected_sum(parts), f"all_reduce {dtype} {shape}"
            yield check(gpu, comm, comm.all_reduce(x), want, what, parts)
            check(gpu, comm, x, parts[comm.rank], f"{what} changed x")
            pending = comm.all_reduce_async(x)
            check(gpu, comm, pending.wait(), want, f"{what} async", parts)
            comm.all_reduce(x, out=x)
            check(gpu, comm, x, want, f"{what} in place", parts)
        for shape, axis in [((7,), 0), ((6,), 0), ((2, 5), 1), ((6, 2), 0), ((200, 301), -1), ((0, 2), 0)]:
            parts = [values(dtype, shape, r, 1) for r in range(comm.size)]
            cut = [slice(None)] * len(shape)
            cut[axis] = remainder_first(shape[axis], comm.size, comm.rank)
            want = np.ascontiguousarray(expected_sum(parts)[tuple(cut)])
            got = comm.reduce_scatter(gpu.upload(parts[comm.rank]), axis)
            check(gpu, comm, got, want, f"reduce_scatter {dtype} {shape} {axis}", [part[tuple(cut)] for part in parts])


def copies(comm, gpu):
    n = comm.size
    for dtype in [*SUMMED, np.dtype("?")]:
        for axis in (0, 1, -1):
            for length in (lambda r: 2, lambda r: 5 + (r == 0), lambda r: 7 if r == 1 else 0):
                sizes = [length(r) for r in range(n)]
                shapes = [tuple(size if i == axis % 3 else k for i, k in enumerate((3, 4, 2))) for size in sizes]
                parts = [values("u1", shape, r).astype(dtype) for r, shape in enumerate(shapes)]
                x, what = gpu.upload(parts[comm.rank]), f"all_gather {dtype} {axis} {sizes}"
                for known in (None, sizes):
                    yield check(gpu, comm, comm.all_gather(x, axis, sizes=known), np.concatenate(parts, axis), what)
        for root in range(n):
            x = gpu.upload(values("u1", (3, 5), comm.rank).astype(dtype))
            yield check(gpu, comm, comm.broadcast(x, root), values("u1", (3, 5), root).astype(dtype), "broadcast")
    if n > 1:
        right, left = (comm.rank + 1) % n, (comm.rank - 1) % n
        for shape in [(1,), (5, 3), (1 << 20,)]:
            mine = gpu.upload(values(BFLOAT16, shape, comm.rank))
            out = gpu.empty(shape, BFLOAT16)
            if comm.rank == 0:
                comm.send(mine, right)
            check(gpu, comm, comm.recv(left, out=out), values(BFLOAT16, shape, left), f"recv {shape}")
            if comm.rank != 0:
                comm.send(mine, right)
    yield "done"


def graphs(comm, gpu):
    """Sums, gathers of equal and unequal parts and overlapped sums, captured once and replayed on new data."""
    n, rows = comm.size, 5
    stream = Stream()
    with stream:
        x = gpu.upload(np.zeros((rows, 64), BFLOAT16))
    total, late, joined = gpu.empty(x.shape, BFLOAT16), gpu.empty(x.shape, BFLOAT16), gpu.empty((n, rows, 64), BFLOAT16)
    sizes = [2] + [1] * (n - 1)
    uneven = gpu.empty((n + 1, 64), BFLOAT16)

    def step():
        comm.all_reduce(x, out=total)
        pending = comm.all_reduce_async(total, out=late)
        comm.all_gather(x[None], 0, sizes=(1,) * n, out=joined)
        comm.all_gather(x[: sizes[comm.rank]], 0, sizes=sizes, out=uneven)
        pending.wait()

    with stream:
        step()
        comm.wait(stream)
    with capture(stream) as graph:
        step()
    for turn in range(20):
        parts = [values(BFLOAT16, (rows, 64), r, turn) for r in range(n)]
        with stream:
            x[...] = gpu.upload(parts[comm.rank])
            graph.launch()
            comm.wait(stream)
            yield check(gpu, comm, total, expected_sum(parts), f"graph sum {turn}", parts)
            own = gpu.download(total)
            check(gpu, comm, late, expected_sum([own] * n), f"graph late sum {turn}", [own] * n)
            yield check(gpu, comm, joined, np.stack(parts), f"graph gather {turn}")
            cut = [part[:size] for part, size in zip(parts, sizes, strict=True)]
            yield check(gpu, comm, uneven, np.concatenate(cut), f"graph unequal gather {turn}")
    graph.close()


def run_all(comm, gpu):
    return [digest for cases in (sums, copies, graphs) for digest in cases(comm, gpu)]
