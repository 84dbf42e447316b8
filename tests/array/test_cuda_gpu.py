"""The room on a real GPU: launches, graphs, matrix products."""

import ml_dtypes
import numpy as np
import pytest

from cutp.array import cuda, nvrtc, programmatic_launch
from cutp.array.arena import Arena
from cutp.array.cuda_backend import CudaBackend
from cutp.array.gemm import WORKSPACE_BYTES, linear
from cutp.array.graph import Stream, capture, is_capturing
from cutp.array.kernel import launch, use_backend
from cutp.array.kernel_cache import KernelCache
from cutp.errors import ClosedError, ConfigError, DeviceError
from tests.array.samples import GPU_KERNELS

REASON = cuda.unavailable_reason() or nvrtc.missing()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=f"{REASON}")]
BF16 = np.dtype(ml_dtypes.bfloat16)

@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The kernel file, with a backend of its own in use."""
    directory = tmp_path_factory.mktemp("kernels")
    (directory / "sample.cu").write_text(GPU_KERNELS)
    with use_backend(CudaBackend(KernelCache(directory / "cache"))):
        yield str(directory / "sample.cu")


@pytest.fixture
def cp():
    return cuda.cupy()


def test_device_info():
    info = cuda.device_info()
    assert info.name and info.capability >= (7, 0) and info.memory > 2**30 and info.multiprocessors > 0
    assert info.shared_memory_per_block >= 48 * 1024 and info.pci_bus_id.count(":") == 2
    assert info.driver_version[0] >= info.runtime_version[0] >= 12
    assert info.uuid == "" or (info.uuid.startswith("GPU-") and len(info.uuid) == 40)
    with pytest.raises(DeviceError, match="GPU 99 does not exist"):
        cuda.device_info(99)


@pytest.mark.parametrize("factor", [2, 3])
def test_load_and_launch(cp, source, factor):
    x = cp.arange(1000, dtype=np.float32)
    y = cp.full(1001, -1, dtype=np.float32)
    launch(source, "scale", 4, 256, (x, y, np.int32(1000)), defines=[f"FACTOR={factor}"])
    assert cp.asnumpy(y).tolist() == [*(factor * i for i in range(1000)), -1]


@pytest.mark.parametrize("pdl", [False, True])
def test_every_kind_of_argument(cp, source, pdl):
    pair = np.array([(-5, 2.5)], dtype=[("a", np.int32), ("b", np.float32)])
    out = cp.zeros(8, dtype=np.float32)
    args = (out, None, np.int16(-7), pair, np.float32(0.25), np.uint8(200), ml_dtypes.bfloat16(1.0), np.int64(-9))
    launch(source, "arguments", 1, 1, args, defines=["FACTOR=2"], pdl=pdl)
    assert cp.asnumpy(out).tolist() == [1, -7, -5, 2.5, 0.25, 200, 0x3F80, -9]


@pytest.mark.parametrize("pdl", [False, True])
def test_more_than_48_kb_of_shared_memory(cp, source, pdl):
    limit = cuda.device_info().shared_memory_per_block
    y = cp.zeros(64, dtype=np.float32)

    def run(size):
        args = (y, np.int32(size // 4))
        launch(source, "large_shared", 1, 64, args, shared_bytes=size, defines=["FACTOR=2"], pdl=pdl)

    for size in (49 * 1024, limit, 1024):
        y[...] = -1
        run(size)
        assert cp.asnumpy(y).tolist() == list(range(63, -1, -1))
    with pytest.raises(DeviceError, match=f"wants {limit + 1024} bytes of shared memory per block, .* has {limit}"):
        run(limit + 1024)


def chain(source, a, b, pdl, repeat=20):
    """a and b add themselves to each other in turn: right only if every kernel waits for the one before."""
    n = np.int32(a.size)
    for i in range(repeat):
        first, second = (a, b) if i % 2 == 0 else (b, a)
        launch(source, "add_after", -(-a.size // 128), 128, (first, second, n), defines=["FACTOR=2"], pdl=pdl)


def fibonacci(a, b, repeat=20):
    for i in range(repeat):
        if i % 2 == 0:
            b = b + a
        else:
            a = a + b
    return a, b


def test_programmatic_dependent_launches_keep_the_order(cp, source):
    a, b = cp.arange(100_000, dtype=np.float32) % 7, cp.ones(100_000, dtype=np.float32)
    expected = fibonacci(cp.asnumpy(a), cp.asnumpy(b))
    cp.cuda.Device().synchronize()  # a Stream does not wait for the default one
    with Stream() as stream:
        chain(source, a, b, pdl=True)
    stream.synchronize()
    np.testing.assert_array_equal(cp.asnumpy(a), expected[0])
    np.testing.assert_array_equal(cp.asnumpy(b), expected[1])


@pytest.mark.parametrize("pdl", [False, True])
def test_a_replayed_graph_equals_the_eager_run(cp, source, pdl):
    arena, stream = Arena(), Stream()
    a, b = arena.array("a", 5000, np.float32), arena.array("b", 5000, np.float32)
    start_a, start_b = cp.arange(5000, dtype=np.float32) % 5, cp.ones(5000, dtype=np.float32)

    def reset():
        a[...], b[...] = start_a, start_b
        cp.cuda.get_current_stream().synchronize()

    reset()
    with stream:
        chain(source, a, b, pdl)
    stream.synchronize()
    eager = cp.asnumpy(a), cp.asnumpy(b)
    reset()
    with capture(stream) as graph:
        assert is_capturing()
        chain(source, a, b, pdl)
    assert not is_capturing()
    np.testing.assert_array_equal(cp.asnumpy(a), cp.asnumpy(start_a))  # nothing has run yet
    for _ in range(3):
        reset()
        graph.upload()
        graph.launch()
        stream.synchronize()
        np.testing.assert_array_equal(cp.asnumpy(a), eager[0])
        np.testing.assert_array_equal(cp.asnumpy(b), eager[1])
    if pdl and programmatic_launch.is_supported(cuda.device_info().capability):
        assert "digraph" in graph.dot()
    graph.close()
    with pytest.raises(ClosedError):
        graph.launch()


def test_a_graph_holds_the_memory_it_writes_to(cp, source):
    stream = Stream()
    x, y = cp.ones(1000, dtype=np.float32), cp.zeros(1000, dtype=np.float32)
    args = (x, y, np.int32(1000))
    launch(source, "scale", 4, 256, args, defines=["FACTOR=2"])
    cp.cuda.Device().synchronize()
    with capture(stream) as graph:
        launch(source, "scale", 4, 256, args, defines=["FACTOR=2"])
    where = y.data.ptr
    del x, y, args
    others = [cp.full(1000, 5, dtype=np.float32) for _ in range(50)]
    assert where not in {o.data.ptr for o in others}
    cp.cuda.Device().synchronize()
    graph.launch()
    stream.synchronize()
    assert all((o == 5).all() for o in others)


def test_a_capture_that_fails_leaves_the_stream_usable(cp, source):
    stream = Stream()
    x, y = cp.ones(10, dtype=np.float32), cp.zeros(10, dtype=np.float32)
    cp.cuda.Device().synchronize()
    with pytest.raises(DeviceError, match="bytes of device memory were asked for while capturing"), capture(stream):
        cp.zeros(1000)
    with pytest.raises(ConfigError, match="being captured by this thread already"), capture(stream), capture(Stream()):
        pass
    with pytest.raises(ZeroDivisionError), capture(stream):
        launch(source, "scale", 1, 32, (x, y, np.int32(10)), defines=["FACTOR=2"])
        raise ZeroDivisionError
    assert not is_capturing()
    with stream:
        launch(source, "scale", 1, 32, (x, y, np.int32(10)), defines=["FACTOR=3"])
    stream.synchronize()
    assert cp.asnumpy(y).tolist() == [3.0] * 10


def test_errors_of_launches(cp, source):
    x = cp.zeros(1, dtype=np.float32)
    with pytest.raises(ConfigError, match="sample.cu has no kernel nothing"):
        launch(source, "nothing", 1, 1, (), defines=["FACTOR=2"])
    with pytest.raises(ConfigError, match="declares no variant with FACTOR=7"):
        launch(source, "scale", 1, 1, (), defines=["FACTOR=7"])
    for pdl in (False, True):
        with pytest.raises(DeviceError, match=r"kernel scale of .* cannot be launched with .* block \(2048"):
            launch(source, "scale", 1, 2048, (x, x, np.int32(1)), defines=["FACTOR=2"], pdl=pdl)


SHAPES = [(1, 256, 128), (3, 129, 65), (17, 31, 33), (64, 512, 256), (5, 1, 7), (1, 1, 1), (130, 1000, 513)]


def operands(dtype, m, n, k, bias):
    random = np.random.default_rng(m * n + k)
    x, w = (random.standard_normal(s).astype(np.float32).astype(dtype) for s in ((m, k), (n, k)))
    b = random.standard_normal(n).astype(np.float32).astype(dtype) if bias else None
    exact = x.astype(np.float64) @ w.astype(np.float64).T
    return x, w, b, exact if b is None else exact + b.astype(np.float64)


def assert_close(got, exact, k, dtype, rounded_before=None):
    """Within float32 summation error and one rounding to dtype; and one of `rounded_before`, where that is given."""
    half_ulp = {"float32": 2**-24, "float16": 2**-11, "bfloat16": 2**-8}[np.dtype(dtype).name]
    error = np.abs(got.astype(np.float64) - exact)
    twice = np.abs(exact) + (0 if rounded_before is None else np.abs(rounded_before))
    bound = 1.01 * half_ulp * twice + 2**-22 * k * (1 + np.abs(exact).max()) / max(1, k) ** 0.5
    assert not np.isnan(got.astype(np.float32)).any() and (error <= bound).all(), (error / bound).max()


@pytest.mark.parametrize("dtype", [BF16, np.float16, np.float32])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_against_numpy(cp, dtype, bias, shape):
    m, n, k = shape
    x, w, b, exact = operands(dtype, m, n, k, bias)
    workspace = Arena().array("workspace", WORKSPACE_BYTES, np.uint8)
    out = cp.asarray(np.full((m, n), np.nan, dtype))
    got = linear(cp.asarray(x), cp.asarray(w), out, None if b is None else cp.asarray(b), workspace=workspace)
    assert got is out
    aligned = all(columns * np.dtype(dtype).itemsize % 16 == 0 for columns in (n, k))
    assert_close(cp.asnumpy(out), exact, k, dtype, None if b is None or aligned else exact - b.astype(np.float64))


def test_float32_is_not_rounded_to_tf32_unless_allowed(cp):
    x, w, _, exact = operands(np.float32, 64, 64, 64, False)
    workspace = Arena().array("workspace", WORKSPACE_BYTES, np.uint8)
    out = cp.zeros((64, 64), dtype=np.float32)
    errors = []
    for tf32 in (False, True):
        linear(cp.asarray(x), cp.asarray(w), out, workspace=workspace, allow_tf32=tf32)
        errors.append(np.abs(cp.asnumpy(out) - exact).max())
    assert errors[0] < 1e-4 < errors[1] < 1e-1


def test_16_bit_factors_with_a_float32_result_and_rows_apart(cp):
    x, w, _, exact = operands(BF16, 9, 40, 24, False)
    wide_x = cp.asarray(np.concatenate([x, x], axis=1))
    whole = cp.full((9, 50), 7, dtype=np.float32)
    workspace = Arena().array("workspace", WORKSPACE_BYTES, np.uint8)
    linear(wide_x[:, 24:], cp.asarray(w), whole[:, :40], workspace=workspace)
    assert_close(cp.asnumpy(whole)[:, :40], exact, 24, np.float32)
    assert (cp.asnumpy(whole)[:, 40:] == 7).all()


@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float32)])
def test_rows_of_row_invariant_products(cp, dtype):
    """The bits of a row, whatever the number of rows and wherever they lie."""
    rng = np.random.default_rng(3)
    workspace = cp.empty(WORKSPACE_BYTES, np.uint8)
    for n, k in ((6144, 4096), (1000, 14336), (520, 776)):
        x, w = (cp.asarray(rng.standard_normal(shape).astype(dtype)) for shape in ((700, k), (n, k)))
        whole = cp.empty((700, n), dtype)
        linear(x, w, whole, workspace=workspace, row_invariant=True)
        for first, rows in ((0, 1), (5, 8), (0, 33), (1, 64), (300, 129), (11, 512)):
            part = cp.empty((rows, n), dtype)
            linear(x[first : first + rows], w, part, workspace=workspace, row_invariant=True)
            assert part.tobytes() == whole[first : first + rows].tobytes(), (n, k, first, rows)


@pytest.mark.parametrize("dtype", [BF16, np.float16, np.float32])
def test_linear_in_a_graph_equals_the_eager_run(cp, dtype):
    x, w, b, _ = operands(dtype, 8, 1024, 4096, True)
    arena, stream = Arena(), Stream()
    gx, gw, gb = cp.asarray(x), cp.asarray(w), cp.asarray(b)
    out = arena.array("out", (8, 1024), dtype)
    workspace = arena.array("workspace", WORKSPACE_BYTES, np.uint8)
    cp.cuda.Device().synchronize()
    with stream:
        linear(gx, gw, out, gb, workspace=workspace)
    stream.synchronize()
    eager = cp.asnumpy(out).view(np.uint8)
    with capture(stream) as graph:
        linear(gx, gw, out, gb, workspace=workspace)
    for _ in range(5):
        out[...] = cp.asarray(np.zeros((8, 1024), dtype))
        cp.cuda.Device().synchronize()
        graph.launch()
        stream.synchronize()
        np.testing.assert_array_equal(cp.asnumpy(out).view(np.uint8), eager)


def test_equal_inputs_give_equal_bits(cp):
    x, w, _, _ = operands(BF16, 4, 512, 8192, False)
    gx, gw = cp.asarray(x), cp.asarray(w)
    workspace = Arena().array("workspace", WORKSPACE_BYTES, np.uint8)
    seen = set()
    for _ in range(10):
        out = cp.zeros((4, 512), dtype=np.float32)
        linear(gx, gw, out, workspace=workspace)
        seen.add(cp.asnumpy(out).tobytes())
    assert len(seen) == 1
