"""The emulation of hopper.cuh: that barriers, the copy engine and wgmma do what NumPy says, on the CPU and on a GPU.

The tests run on a GPU as well (`-m gpu`): the same kernels, arrays and descriptors must give the same there.
"""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from cutp.array import cuda
from cutp.array.graph import Stream, capture
from cutp.array.kernel import launch, use_backend
from cutp.array.tensor_map import TensorMap
from tests.emulation.emulator import EmulatorBackend, needs_compiler

pytestmark = needs_compiler
HERE = Path(__file__).resolve().parent
DTYPES = {"BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
ALL_N = (8, 16, 32, 64, 80, 96, 128, 176, 256)


class Emulated:
    seeds = range(6)

    def __init__(self, seed):
        self._seed = seed

    def array(self, host):
        return host.copy()

    def numpy(self, array):
        return array

    def run(self, file, name, grid, block, args, **options):
        with use_backend(EmulatorBackend(order_seed=self._seed)):
            launch(str(HERE / file), name, grid, block, args, **options)


class OnGpu:
    def __init__(self):
        self._cupy = cuda.cupy()

    def array(self, host):
        return self._cupy.asarray(host)

    def numpy(self, array):
        return self._cupy.asnumpy(array)

    def run(self, file, name, grid, block, args, **options):
        launch(str(HERE / file), name, grid, block, args, **options)


@pytest.fixture(params=[*(f"seed {s}" for s in Emulated.seeds), pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request):
    """Where kernels run: in the emulation with several orders of threads, or on a GPU that has all this."""
    return gpu() if request.param == "gpu" else Emulated(int(request.param.split()[1]))


def gpu():
    if reason := cuda.unavailable_reason():
        pytest.skip(reason)
    if cuda.device_info().capability != (9, 0):
        pytest.skip("hopper.cuh is for compute capability 9.0")
    return OnGpu()


# ---- boxes


def box_of(array, box, coordinates):
    """The box of `array` from these coordinates (last axis first), as rows of 64 elements, zeros outside."""
    out = np.zeros(box, array.dtype)
    begins = coordinates[::-1]
    inside = [(max(b, 0), min(b + n, size)) for b, n, size in zip(begins, box, array.shape, strict=True)]
    if all(first < last for first, last in inside):
        to = tuple(slice(first - b, last - b) for (first, last), b in zip(inside, begins, strict=True))
        out[to] = array[tuple(slice(*ends) for ends in inside)]
    return out.reshape(-1, 64)


def swizzled(rows):
    """Rows of 64 elements as they lie in shared memory: pieces of 16 bytes permuted within each row."""
    pieces = rows.reshape(-1, 8, 8)
    place = np.arange(8) ^ (np.arange(len(rows)) % 8)[:, None]
    return np.take_along_axis(pieces, place[:, :, None], 1)


BOXES = [
    ((40, 136), (0, 1), (16, 64), [(0, 0), (64, 8), (128, 32), (32, -3), (-8, 39), (200, 0), (0, 40), (8, 1)]),
    ((3, 64), (0, 1), (24, 64), [(0, 0), (8, -1)]),
    ((5, 70, 128), (0, 1, 2), (1, 256, 64), [(64, 0, 4), (0, 10, 5), (8, 9, 0)]),
    ((6, 4, 128), (1, 0, 2), (4, 2, 64), [(64, 1, 0), (0, 5, 2), (104, -1, -2)]),
    ((3, 16, 2, 64), (0, 2, 1, 3), (1, 1, 16, 64), [(0, 0, 1, 2), (0, 3, 0, 3), (32, 8, 0, -1)]),
    ((2, 3, 4, 5, 72), (3, 1, 0, 2, 4), (2, 1, 2, 3, 64), [(0, 0, 0, 0, 0), (8, 1, 1, 2, 4), (40, 3, -1, 0, 3)]),
]


@pytest.mark.parametrize(("shape", "order", "box", "place"), [(*b[:3], place) for b in BOXES for place in b[3]])
def test_boxes_arrive_swizzled_with_zeros_outside(device, shape, order, box, place):
    rows = int(np.prod(box)) // 64
    for dtype in DTYPES.values():
        host = np.random.default_rng(0).integers(0, 2**16, shape, np.uint16).view(dtype)
        out = device.array(np.full((rows, 8, 8), 1, np.uint16))
        args = [TensorMap(device.array(host).transpose(order), box), out, np.int32(len(shape)), np.int32(rows),
                *(np.int32(c) for c in (*place, 0, 0, 0)[:5])]
        device.run("probes_hopper.cu", "box", 1, 64, args, shared_bytes=1024 + rows * 128, defines=["DTYPE=BF16"],
                   pdl=True)
        expected = swizzled(box_of(host.transpose(order), box, place)).view(np.uint16)
        np.testing.assert_array_equal(device.numpy(out), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("pdl", [False, True])
def test_a_graph_holds_the_arrays_of_its_maps(pdl):
    device = gpu()
    host = np.random.default_rng(0).integers(0, 2**16, (16, 64), np.uint16)
    out = device.array(np.zeros((16, 8, 8), np.uint16))
    stream = Stream()

    def run():
        array = device.array(host.view(np.float16))
        args = [TensorMap(array, (16, 64)), out, *map(np.int32, (2, 16, 0, 0, 0, 0, 0))]
        return lambda: device.run("probes_hopper.cu", "box", 1, 64, args, shared_bytes=1024 + 16 * 128,
                                  defines=["DTYPE=F16"], pdl=pdl)

    run()()
    start = run()
    with capture(stream) as graph:
        start()
    del start
    others = [device.array(np.ones((16, 64), np.float16)) for _ in range(8)]  # would be put where the array was
    out[...] = 0
    cuda.cupy().cuda.runtime.deviceSynchronize()
    graph.launch()
    stream.synchronize()
    np.testing.assert_array_equal(device.numpy(out), swizzled(host).view(np.uint16))
    del others


# ---- products


def matrices(dtype, n, k):
    """A [64, K], B [N, K] of small integers, whose products are exact."""
    rng = np.random.default_rng(n)
    return rng.integers(-8, 9, (64, k)).astype(dtype), rng.integers(-8, 9, (n, k)).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", ALL_N)
@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("from_registers", [0, 1])
def test_products(device, dtype, n, transposed, from_registers):
    a, b = matrices(DTYPES[dtype], n, 128)
    given = np.ascontiguousarray(b.T) if transposed else b
    array_a, array_b = device.array(a), device.array(given)
    for initial in (0.0, 3.0):
        out = device.array(np.full((64, n), np.nan, np.float32))
        args = [TensorMap(array_a, (64, 64)), TensorMap(array_b, (64 if transposed else n, 64)), out, np.int32(2),
                np.float32(initial), np.int32(from_registers), np.int32(transposed)]
        device.run("probes_wgmma.cu", f"products_{n}", 1, 128, args,
                   shared_bytes=1024 + 2 * 8192 + -(-n // 64) * 64 * 256, defines=[f"DTYPE={dtype}"])
        expected = a.astype(np.float32) @ b.astype(np.float32).T + np.float32(initial)
        np.testing.assert_array_equal(device.numpy(out), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "k", "grid"), [(128, 64, 1), (300, 200, 2), (128, 128, 1), (130, 328, 1)])
def test_a_ring_of_two_stages(device, dtype, rows, k, grid):
    rng = np.random.default_rng(rows)
    x, w = (rng.integers(-4, 5, shape).astype(DTYPES[dtype]) for shape in ((rows, k), (64, k)))
    out = device.array(np.full((rows, 64), np.nan, DTYPES[dtype]))
    args = [TensorMap(device.array(x), (128, 64)), TensorMap(device.array(w), (64, 64), weight=True), out,
            np.int32(rows), np.int32(-(-rows // 128)), np.int32(-(-k // 64))]
    device.run("probes_hopper.cu", "ring", grid, 384, args, shared_bytes=2 * 3 * 8192 + 64,
               defines=[f"DTYPE={dtype}"], pdl=True)
    expected = (x.astype(np.float32) @ w.astype(np.float32).T).astype(DTYPES[dtype])
    np.testing.assert_array_equal(device.numpy(out), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_operands_that_threads_wrote(device, dtype):
    a, b = matrices(DTYPES[dtype], 8, 16)
    out = device.array(np.full((64, 8), np.nan, np.float32))
    device.run("probes_hopper.cu", "written_operands", 1, 128, [device.array(a), device.array(b), out],
               shared_bytes=72 * 128, defines=[f"DTYPE={dtype}"])
    np.testing.assert_array_equal(device.numpy(out), a.astype(np.float32) @ b.astype(np.float32).T)
