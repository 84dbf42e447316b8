"""Every collective on many shapes and dtypes, checked against plain NumPy, on whatever communicator is given.

`run_all(comm)` returns a digest of each result, so that backends can be compared bit by bit.
"""

from __future__ import annotations

import hashlib

import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype(d) for d in ("f4", "f2", "f8", "i4", "i8", "u8", "u1")] + [BFLOAT16]
# The last ones are beyond the size up to which whole arrays are exchanged.
SHAPES = [(), (1,), (0,), (0, 3), (7,), (3, 5), (2, 3, 4), (129, 257), (70_001,)]


def values(dtype, shape, rank, salt=0):
    """Numbers of widely different size, so that the order of summation shows in the bits."""
    rng = np.random.default_rng([rank, salt, *shape])
    if np.dtype(dtype).kind in "iu":
        info = np.iinfo(dtype)
        return rng.integers(info.min, info.max, size=shape, dtype=dtype, endpoint=True)
    x = rng.standard_normal(shape) * 10.0 ** rng.integers(-3, 4, size=shape)
    return np.asarray(x, np.float32).astype(dtype)


def expected_sum(parts):
    """Rank order; 16-bit floats in float32 with one rounding; integers modulo 2**bits."""
    dtype = parts[0].dtype
    narrow = dtype.itemsize == 2 and dtype.kind not in "iu"
    total = parts[0].astype(np.float32) if narrow else parts[0].copy()
    for part in parts[1:]:
        total = (total + part.astype(total.dtype)).astype(total.dtype)
    return np.asarray(total).astype(dtype)


def check(got, want, what):
    assert isinstance(got, np.ndarray), what
    assert got.dtype == want.dtype and got.shape == want.shape, (what, got.dtype, got.shape, want.dtype, want.shape)
    assert got.tobytes() == want.tobytes(), (what, got, want)
    return hashlib.sha256(got.tobytes()).hexdigest()[:16]


def remainder_first(n, size, rank):
    sizes = [n // size + (r < n % size) for r in range(size)]
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def all_reduce_cases(comm):
    for dtype in DTYPES:
        for shape in SHAPES:
            parts = [values(dtype, shape, r) for r in range(comm.size)]
            x, want = parts[comm.rank], expected_sum(parts)
            before = x.tobytes()
            yield check(comm.all_reduce(x), want, f"all_reduce {dtype} {shape}")
            assert x.tobytes() == before
            out = np.empty_like(x)
            assert comm.all_reduce(x, out=out) is out
            check(out, want, f"all_reduce out= {dtype} {shape}")
            check(comm.all_reduce(x, out=x), want, f"all_reduce in place {dtype} {shape}")
        for shape in [(6, 10), (300, 200)]:
            parts = [values(dtype, shape, r, 1)[::2, 1::3].T for r in range(comm.size)]
            out = np.empty((shape[0], shape[1]), dtype)[: parts[0].shape[0], : parts[0].shape[1]]
            got = comm.all_reduce(parts[comm.rank], out=out)
            check(np.ascontiguousarray(got), expected_sum(parts), f"all_reduce strided out= {dtype} {shape}")
            yield check(comm.all_reduce(parts[comm.rank]), expected_sum(parts), f"all_reduce strided {dtype} {shape}")


def all_reduce_async_cases(comm):
    for dtype in (np.dtype("f4"), BFLOAT16):
        shapes = [(5,), (50_000,), (0,), (3, 20_000), (2,)]
        inputs = [[values(dtype, s, r, i) for r in range(comm.size)] for i, s in enumerate(shapes)]
        handles = [comm.all_reduce_async(parts[comm.rank]) for parts in inputs]
        comm.barrier()
        for handle, parts in zip(handles, inputs, strict=True):
            yield check(handle.wait(), expected_sum(parts), f"all_reduce_async {dtype} {parts[0].shape}")


def all_gather_cases(comm):
    for dtype in [*DTYPES, np.dtype("?"), np.dtype("c8"), np.dtype(ml_dtypes.float8_e4m3fn)]:
        for axis in (0, 1, -1):
            for length in (lambda r: 2, lambda r: r, lambda r: (r + 1) * 4000 if r % 2 else 0):
                parts = []
                for r in range(comm.size):
                    shape = [3, 4]
                    shape[axis] = length(r)
                    parts.append(values("i8", tuple(shape), r).astype("u1").astype(dtype))
                got = comm.all_gather(parts[comm.rank], axis=axis)
                yield check(got, np.concatenate(parts, axis), f"all_gather {dtype} axis {axis}")
    parts = [values("f4", (8, 6), r)[::2, ::3].T for r in range(comm.size)]
    yield check(comm.all_gather(parts[comm.rank]), np.concatenate(parts), "all_gather strided")


def reduce_scatter_cases(comm):
    for dtype in DTYPES:
        for shape, axis in [((7,), 0), ((2, 5), 1), ((5, 2), 0), ((3, 4, 2), -2), ((0, 2), 0), ((200, 301), -1)]:
            parts = [values(dtype, shape, r) for r in range(comm.size)]
            cut = [slice(None)] * len(shape)
            cut[axis] = remainder_first(shape[axis], comm.size, comm.rank)
            want = np.ascontiguousarray(expected_sum(parts)[tuple(cut)])
            yield check(comm.reduce_scatter(parts[comm.rank], axis), want, f"reduce_scatter {dtype} {shape} {axis}")


def broadcast_and_send_cases(comm):
    for root in range(comm.size):
        for dtype in (np.dtype("f4"), BFLOAT16, np.dtype("?"), np.dtype("i8")):
            for shape in [(), (0,), (3, 4), (90_000,)]:
                want = values("i4", shape, root).astype(dtype)
                got = comm.broadcast(want if comm.rank == root else None, root=root)
                yield check(got, want, f"broadcast {dtype} {shape}")
                if got.size:
                    got[...] = 1
    if comm.size > 1:
        right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
        for shape in [(), (0, 2), (5, 3), (100_000,)]:
            # Around the ring; all but rank 0 receive first, because a large message may wait for its receiver.
            mine = values(BFLOAT16, shape, comm.rank)
            if comm.rank == 0:
                comm.send(mine, right)
            yield check(comm.recv(left), values(BFLOAT16, shape, left), f"recv {shape}")
            if comm.rank != 0:
                comm.send(mine, right)


def host_cases(comm):
    host = comm.host
    texts = [b"", b"\0\xff", b"x" * 100_000]
    for root in range(comm.size):
        for text in texts:
            assert host.broadcast_bytes(text if comm.rank == root else None, root) == text
        gathered = host.gather_bytes(b"%d" % comm.rank * comm.rank, root)
        assert gathered == ([b"%d" % r * r for r in range(comm.size)] if comm.rank == root else None)
        value = {"a": [1, None, "ä€\ud800"], "b": 1e300, "inf": float("inf")}
        assert host.broadcast_json(value if comm.rank == root else "ignored", root) == value
        assert host.gather_json([comm.rank], root) == ([[r] for r in range(comm.size)] if comm.rank == root else None)
    assert host.all_gather_bytes(bytes([comm.rank]) * comm.rank) == [bytes([r]) * r for r in range(comm.size)]
    got = host.all_gather_json({"nan": float("nan"), "rank": comm.rank})
    assert [g["rank"] for g in got] == list(range(comm.size)) and all(g["nan"] != g["nan"] for g in got)
    if comm.size > 1:
        if comm.rank == 0:
            for dest in range(1, comm.size):
                host.send_bytes(b"a" * dest, dest)
                host.send_json(["b", dest], dest)
            assert [host.recv_json(r) for r in range(1, comm.size)] == list(range(1, comm.size))
        else:
            assert host.recv_bytes(0) == b"a" * comm.rank
            assert host.recv_json(0) == ["b", comm.rank]
            host.send_json(comm.rank, 0)
    host.barrier()
    yield "host"


def split_cases(comm):
    """Halves in reverse order; the halves make different numbers of calls; rank 0 of a third group is alone."""
    half = comm.split(comm.rank % 2, key=-comm.rank)
    members = sorted((r for r in range(comm.size) if r % 2 == comm.rank % 2), reverse=True)
    assert half.size == len(members) and members[half.rank] == comm.rank
    for i in range(2 + comm.rank % 2):
        parts = [values("f4", (40_000,), r, i) for r in members]
        yield check(half.all_reduce(parts[half.rank]), expected_sum(parts), f"split all_reduce {i}")
    alone = comm.split(0 if comm.rank == 0 else None)
    assert (alone is None) == (comm.rank != 0)
    if alone is not None:
        assert alone.size == 1 and alone.rank == 0
        check(alone.all_reduce(np.ones(3)), np.ones(3), "alone")
        alone.close()
    half.close()
    assert comm.all_reduce(np.array(1)) == comm.size


CASES = [
    all_reduce_cases, all_reduce_async_cases, all_gather_cases, reduce_scatter_cases, broadcast_and_send_cases,
    host_cases, split_cases,
]


def run_all(comm):
    return [f"{cases.__name__} {digest}" for cases in CASES for digest in cases(comm)]
