"""Collectives on device arrays, against plain NumPy, on a stand-in for CuPy and NCCL."""

import ml_dtypes
import numpy as np
import pytest

from cutp import run_threads
from cutp.array.graph import Stream, capture
from cutp.array.scratch import Scratch
from cutp.comm import nccl_link
from cutp.errors import ConfigError
from tests.comm import device_cases
from tests.comm.collective_cases import BFLOAT16, expected_sum, remainder_first, values
from tests.comm.fake_nccl import GpuArray, fake_cupy

SUMMED = [np.dtype(d) for d in ("f4", "f2", "f8", "i1", "u1", "i4", "u4", "i8", "u8")] + [BFLOAT16]
MOVED = [*SUMMED, np.dtype("?"), np.dtype("i2"), np.dtype(ml_dtypes.float8_e4m3fn)]
SHAPES = [(), (1,), (0,), (0, 3), (7,), (3, 5), (2, 3, 4), (129, 17)]


@pytest.fixture
def cupy(monkeypatch):
    monkeypatch.setattr(nccl_link, "_WARM_UP_SIZES", (2, 16))
    with fake_cupy(monkeypatch) as cupy:
        yield cupy
        assert not cupy.problems, cupy.problems


@pytest.fixture
def run(cupy):
    """run(n, body): body(comm, gpu) on n ranks, each with its GPU."""

    def on_rank(comm, body):
        with cupy.gpu(comm.rank) as gpu, comm:
            return body(comm, gpu)

    return lambda n, body, timeout=20: run_threads(n, on_rank, body, timeout=timeout)


def moved(dtype, shape, rank):
    return values("i4", shape, rank).astype("u1").astype(dtype)


def check(cupy, got, want, what):
    assert type(got) is GpuArray, what
    got = cupy.download(got)
    assert got.dtype == want.dtype and got.shape == want.shape, (what, got.dtype, got.shape)
    assert got.tobytes() == want.tobytes(), (what, got, want)


class Memory:
    """`cutp.array.scratch.Memory` of the stand-in."""

    def __init__(self, cupy):
        self.empty = cupy.empty


@pytest.mark.parametrize("n", [1, 2, 3])
def test_all_reduce(cupy, run, n):
    def body(comm, gpu):
        for dtype in SUMMED:
            for shape in SHAPES:
                parts = [values(dtype, shape, r) for r in range(n)]
                x, want, what = cupy.upload(parts[comm.rank]), expected_sum(parts), f"{dtype} {shape}"
                check(cupy, comm.all_reduce(x), want, what)
                check(cupy, x, parts[comm.rank], f"{what}: x was modified")
                out = cupy.empty(shape, dtype)
                assert comm.all_reduce(x, out=out) is out
                check(cupy, out, want, what)
                check(cupy, comm.all_reduce(x, out=x), want, f"{what} in place")
            parts = [values(dtype, (6, 10), r, 1)[::2, 1::3].T for r in range(n)]
            strided = cupy.upload(values(dtype, (6, 10), comm.rank, 1))[::2, 1::3].T
            check(cupy, comm.all_reduce(strided), expected_sum(parts), f"{dtype} strided")

    run(n, body)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_all_gather(cupy, run, n):
    lengths = [lambda r: 2, lambda r: r, lambda r: 5 + (r == 0), lambda r: 7 if r == 1 else 0]

    def body(comm, gpu):
        for dtype in MOVED:
            for axis in (0, 1, -1):
                for length in lengths:
                    sizes = [length(r) for r in range(n)]
                    parts = []
                    for r in range(n):
                        shape = [3, 4, 2]
                        shape[axis] = sizes[r]
                        parts.append(moved(dtype, tuple(shape), r))
                    x, want = cupy.upload(parts[comm.rank]), np.concatenate(parts, axis)
                    what = f"{dtype} axis {axis} {sizes}"
                    check(cupy, comm.all_gather(x, axis), want, what)
                    out = cupy.empty(want.shape, dtype)
                    assert comm.all_gather(x, axis=axis, sizes=sizes, out=out) is out
                    check(cupy, out, want, what)
        x = cupy.upload(values("f4", (8, 6), comm.rank))[::2, ::3].T
        want = np.concatenate([values("f4", (8, 6), r)[::2, ::3].T for r in range(n)])
        check(cupy, comm.all_gather(x), want, "strided")
        # One row: parts along the last axis lie as they must already.
        row = cupy.upload(values("f4", (1, 5), comm.rank))
        check(cupy, comm.all_gather(row, -1), np.concatenate([values("f4", (1, 5), r) for r in range(n)], -1), "row")

    run(n, body)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_reduce_scatter(cupy, run, n):
    def body(comm, gpu):
        for dtype in SUMMED:
            for shape, axis in [((7,), 0), ((6,), 0), ((2, 5), 1), ((5, 2), 0), ((3, 4, 2), -2), ((2, 6), 1),
                                ((0, 2), 0), ((1, 2), 0)]:
                parts = [values(dtype, shape, r) for r in range(n)]
                cut = [slice(None)] * len(shape)
                cut[axis] = remainder_first(shape[axis], n, comm.rank)
                want = np.ascontiguousarray(expected_sum(parts)[tuple(cut)])
                x = cupy.upload(parts[comm.rank])
                check(cupy, comm.reduce_scatter(x, axis), want, f"{dtype} {shape} {axis}")
                check(cupy, x, parts[comm.rank], "x was modified")
                out = cupy.empty(want.shape, dtype)
                assert comm.reduce_scatter(x, axis, out=out) is out
                check(cupy, out, want, f"{dtype} {shape} {axis} out=")

    run(n, body)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_broadcast_send_and_recv(cupy, run, n):
    def body(comm, gpu):
        for dtype in MOVED:
            for shape in SHAPES:
                for root in range(n):
                    x = cupy.upload(moved(dtype, shape, comm.rank))
                    check(cupy, comm.broadcast(x, root), moved(dtype, shape, root), f"{dtype} {shape}")
                    check(cupy, x, moved(dtype, shape, comm.rank), "x was modified")
                    assert comm.broadcast(x, root, out=x) is x
                    check(cupy, x, moved(dtype, shape, root), "in place")
                if n > 1:
                    right, left = (comm.rank + 1) % n, (comm.rank - 1) % n
                    comm.send(cupy.upload(moved(dtype, shape, comm.rank)), right)
                    out = cupy.empty(shape, dtype)
                    assert comm.recv(left, out=out) is out
                    check(cupy, out, moved(dtype, shape, left), f"recv {dtype} {shape}")
        strided = cupy.upload(values("f4", (4, 6), comm.rank)).T
        check(cupy, comm.broadcast(strided, n - 1), np.ascontiguousarray(values("f4", (4, 6), n - 1).T), "strided")

    run(n, body)


def test_numpy_arrays_take_the_host_way(cupy, run):
    def body(comm, gpu):
        x = np.full(3, comm.rank)
        for got in (comm.all_reduce(x), comm.all_gather(x), comm.reduce_scatter(np.ones(2)), comm.broadcast(x, 1)):
            assert type(got) is np.ndarray
        assert comm.all_reduce(np.float32(2)) == 4 and comm.all_reduce([1, 2]).tolist() == [2, 4]
        out = np.zeros(6, int)
        assert comm.all_gather(x, out=out) is out and out.tolist() == [0, 0, 0, 1, 1, 1]
        comm.send(x, 1 - comm.rank)
        out = np.zeros(3, int)
        assert comm.recv(1 - comm.rank, out=out) is out and out.tolist() == [1 - comm.rank] * 3
        with pytest.raises(ConfigError, match=r"out must be an array like the result, int64\[3\]"):
            comm.broadcast(x, 0, out=np.zeros(4, int))
        assert not gpu.comms, "NCCL was connected for host arrays"

    run(2, body)


def test_one_rank_needs_no_nccl(cupy, run):
    def body(comm, gpu):
        gpu.missing = None
        comm.connect_gpus()
        x = cupy.upload(np.arange(3.0))
        check(cupy, comm.all_reduce_async(x).wait(), np.arange(3.0), "async")
        comm.wait()
        assert not gpu.comms and gpu.log[-1] == "synchronize"

    run(1, body)


def test_sums_on_the_second_stream_overlap_and_keep_their_order(cupy, run):
    def body(comm, gpu):
        gpu.slow = 0.01
        n, shapes = comm.size, [(5,), (3, 20), (0,), (7,)]
        inputs = [[values("f4", s, r, i) for r in range(n)] for i, s in enumerate(shapes)]
        pending, xs = [], []
        for parts in inputs:
            x = cupy.empty(parts[0].shape, np.float32)
            x[...] = cupy.upload(parts[comm.rank])  # on the current stream, later: the sum must wait for it
            xs.append(x)
            pending.append(comm.all_reduce_async(x))
        main = gpu.calls[0]
        # An ordinary call before they are waited for comes after them, on all ranks alike.
        check(cupy, comm.all_reduce(cupy.upload(np.ones(2))), np.full(2, float(n)), "between")
        out = cupy.empty(9, np.float32)
        last = comm.all_reduce_async(cupy.upload(np.ones(9, np.float32)), out=out)
        for handle, parts in zip(pending, inputs, strict=True):
            check(cupy, handle.wait(), expected_sum(parts), "async")
        assert last.wait() is out
        check(cupy, out, np.full(9, n, np.float32), "async out=")
        assert comm._collectives._pending == []
        used = gpu.calls[len(nccl_link._WARM_UP_SIZES) + 3 :]
        assert len(set(used[:3])) == 1 and used[3] not in used[:3] and used[4] == used[0] and used[0] != main

    run(3, body)


def test_closing_waits_for_sums_on_the_second_stream(cupy, run):
    def body(comm, gpu):
        comm.connect_gpus()
        gpu.slow = 0.1
        out = cupy.empty(3, np.float64)
        comm.all_reduce_async(cupy.upload(np.ones(3)), out=out)
        comm.close()
        assert out.view(np.ndarray).tolist() == [2.0] * 3 and gpu.comms[0].destroyed

    run(2, body)


def test_results_lie_in_the_scratch_in_use_and_temporaries_are_given_back(cupy, run):
    def body(comm, gpu):
        scratch = Scratch(Memory(cupy))
        taken = []
        empty = scratch.empty
        scratch.empty = lambda shape, dtype: taken.append(shape) or empty(shape, dtype)
        parts = [values("f4", (3, 4 + (r == 0)), r) for r in range(2)]
        with scratch.use():
            x = cupy.upload(parts[comm.rank])
            first = comm.all_gather(x, axis=1)
            used = scratch._used
            second = comm.all_gather(x, axis=1)
            assert taken == [(3, 9), 27, (3, 9), 27]
            assert used == 256 and scratch._used == 512
            for got in (first, second):
                check(cupy, got, np.concatenate(parts, 1), "scratch")

    run(2, body)


def captured(comm, body):
    """A graph of what body() starts, captured after a first run; and what body() returned."""
    stream = Stream()
    with stream:
        body()
        comm.wait(stream)
    with capture(stream) as graph:
        result = body()
    return stream, graph, result


def test_collectives_in_a_graph(cupy, run):
    def body(comm, gpu):
        n = comm.size
        x, total = cupy.upload(np.zeros((3, 4), np.float32)), cupy.empty((3, 4), np.float32)
        scratch = Scratch(Memory(cupy))

        def step():
            with scratch.use():
                comm.all_reduce(x, out=total)
                joined = comm.all_gather(total, axis=1, sizes=(4,) * n)
                uneven = comm.all_gather(x[: 1 + (comm.rank == 0)], 0, sizes=(2,) + (1,) * (n - 1))
                cut = comm.reduce_scatter(joined, 1)
                late = comm.all_reduce_async(cut)
                whole = comm.broadcast(x, 1)
                return total, joined, uneven, late.wait(), whole

        stream, graph, results = captured(comm, step)
        calls = len(gpu.calls)
        for turn in range(3):
            parts = [values("f4", (3, 4), r, turn) for r in range(n)]
            with stream:
                x[...] = cupy.upload(parts[comm.rank])
                graph.launch()
                comm.wait(stream)
                added = expected_sum(parts)
                joined = np.concatenate([added] * n, 1)
                width = slice(comm.rank * 4, comm.rank * 4 + 4)
                uneven = np.concatenate([part[: 1 + (r == 0)] for r, part in enumerate(parts)])
                scattered = expected_sum([joined] * n)[:, width]
                summed = expected_sum([expected_sum([joined] * n)[:, r * 4 : r * 4 + 4] for r in range(n)])
                assert scattered.shape == summed.shape
                for got, want in zip(results, (added, joined, uneven, summed, parts[1]), strict=True):
                    check(cupy, got, np.ascontiguousarray(want), f"turn {turn}")
        assert len(gpu.calls) == calls, "a replay called NCCL"
        graph.close()

    run(3, body)


def test_nothing_is_allocated_in_a_capture(cupy, run):
    def body(comm, gpu):
        x = cupy.upload(np.ones(4, np.float32))
        stream = Stream()
        with stream:
            comm.all_reduce(x)
        with pytest.raises(Exception, match="while capturing"), capture(stream):
            comm.all_reduce(x)
        with stream:
            check(cupy, comm.all_reduce(x), np.full(4, 2, np.float32), "after")

    run(2, body)


def test_a_first_call_cannot_be_captured(cupy, run):
    def body(comm, gpu):
        x = cupy.upload(np.ones(4, np.float32))
        with pytest.raises(ConfigError, match="cannot be captured"), capture(Stream()):
            comm.all_reduce(x, out=x)
        assert not gpu.comms

    run(2, body)


def test_a_graph_holds_what_its_calls_use(cupy, run):
    def body(comm, gpu):
        x, out = cupy.upload(np.ones(4, np.float32)), cupy.empty(4, np.float32)
        _, graph, _ = captured(comm, lambda: comm.all_reduce(x, out=out))
        assert any(kept is x for kept in graph._kept) and any(kept is out for kept in graph._kept)

    run(2, body)


def test_wrong_arguments(cupy, run):
    def body(comm, gpu):
        x = cupy.upload(np.ones((2, 3), np.float32))
        for call, message in [
            (lambda: comm.all_reduce(cupy.upload(np.ones(2, np.int16))), "int16 cannot be summed by NCCL"),
            (lambda: comm.reduce_scatter(cupy.upload(np.ones(2, bool))), "bool cannot be summed"),
            (lambda: comm.all_reduce(x, out=cupy.empty((3, 2), np.float32)), r"reduce: out must .* float32\[2, 3\]"),
            (lambda: comm.all_reduce(x, out=cupy.empty((2, 3), np.float16)), "out must be"),
            (lambda: comm.all_reduce(x, out=np.empty((2, 3), np.float32)), "C-contiguous device array"),
            (lambda: comm.all_reduce(x, out=cupy.empty((3, 2), np.float32).T), "C-contiguous"),
            (lambda: comm.all_gather(x, 2), "no axis 2"),
            (lambda: comm.all_gather(x, 0, sizes=(1, 1)), r"sizes are \(1, 1\) on 2 ranks, but x has 2 on axis 0"),
            (lambda: comm.all_gather(x, 0, sizes=(2,)), "on 2 ranks"),
            (lambda: comm.broadcast(x, 5), "broadcast: root 5"),
            (lambda: comm.send(x, comm.rank), "this rank itself"),
            (lambda: comm.recv(7, out=x), "recv: source 7"),
        ]:
            if comm.rank == 0:  # found without the other rank
                with pytest.raises(ConfigError, match=message):
                    call()
        check(cupy, comm.all_reduce(x), np.full((2, 3), 2, np.float32), "after")

    run(2, body)


def test_split_communicators_connect_for_themselves(cupy, run):
    def body(comm, gpu):
        total = comm.all_reduce(cupy.upload(np.ones(1)))
        half = comm.split(comm.rank % 2, key=-comm.rank)
        members = sorted((r for r in range(3) if r % 2 == comm.rank % 2), reverse=True)
        check(cupy, half.all_gather(cupy.upload(np.full(1, comm.rank)), 0), np.array(members), "half")
        half.close()
        check(cupy, total, np.full(1, 3.0), "total")
        check(cupy, comm.all_reduce(cupy.upload(np.ones(1))), np.full(1, 3.0), "after closing the half")
        assert [c.destroyed for c in gpu.comms] == ([False, True] if half.size > 1 else [False])

    run(3, body)


@pytest.mark.parametrize("n", [2, 3])
def test_the_cases_for_real_gpus(cupy, run, n, monkeypatch):
    monkeypatch.setattr(device_cases, "SHAPES", [(), (0,), (3, 5)])
    digests = run(n, lambda comm, gpu: device_cases.run_all(comm, cupy), timeout=60)
    assert len(digests[0]) > 100 and all(other == digests[0] for other in digests)


def test_a_capture_that_fails_with_a_sum_under_way_leaves_no_trace(cupy, run):
    def body(comm, gpu):
        x = cupy.upload(np.ones(4, np.float32))
        comm.all_reduce_async(x, out=x).wait()
        with pytest.raises(ZeroDivisionError), capture(Stream()):
            comm.all_reduce_async(x, out=x)
            raise ZeroDivisionError
        check(cupy, comm.all_reduce(x), np.full(4, 4, np.float32), "after")

    run(2, body)
