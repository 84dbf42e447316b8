"""The emulation of CUDA kernels: that device.cuh computes what NumPy does, and that each kind of mistake is reported.

`probes.cu` has one kernel for each part of device.cuh. These tests run on a GPU as well (`-m gpu`) and so compare the
two implementations of the header. `faults.cu` has one kernel for each mistake.
"""

import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from cutp.array import cuda
from cutp.array.kernel import launch, use_backend
from tests.emulation.emulator import EmulatedKernel, EmulationError, EmulatorBackend, needs_compiler

pytestmark = needs_compiler
HERE = Path(__file__).resolve().parent
bfloat16, float16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
DTYPES = {"BF16": bfloat16, "F16": float16}
SEEDS = range(6)


class Emulated:
    @staticmethod
    def run(name, grid, block, args, **options):
        with use_backend(EmulatorBackend(order_seed=2)):
            launch(str(HERE / "probes.cu"), name, grid, block, args, **options)


class OnGpu:
    @staticmethod
    def run(name, grid, block, args, **options):
        """NumPy arrays in `args` go to the GPU and come back, as bytes: CuPy knows no bfloat16."""
        cupy = cuda.cupy()
        passed = [cupy.asarray(a.view(np.uint8)) if isinstance(a, np.ndarray) else a for a in args]
        launch(str(HERE / "probes.cu"), name, grid, block, passed, **options)
        for host, device in zip(args, passed, strict=True):
            if isinstance(host, np.ndarray):
                host.view(np.uint8)[...] = cupy.asnumpy(device)


@pytest.fixture(params=[Emulated, pytest.param(OnGpu, marks=pytest.mark.gpu)])
def device(request):
    if request.param is OnGpu and (reason := cuda.unavailable_reason()):
        pytest.skip(reason)
    return request.param


def run_bf16(device, name, grid, block, args, **options):
    device.run(name, grid, block, args, defines=["DTYPE=BF16"], **options)


# ---- device.cuh against NumPy


@pytest.mark.parametrize(("mask", "delta", "source"), [(1, 1, 0), (16, 5, 31), (21, 31, 7)])
def test_shuffles(device, mask, delta, source):
    values = np.random.default_rng(mask).integers(0, 2**32, 64, np.uint32)
    out = np.zeros((4, 64), np.uint32)
    run_bf16(device, "shuffles", 1, 64, [values, out, np.int32(mask), np.int32(delta), np.int32(source)])
    for warp in (slice(0, 32), slice(32, 64)):
        v, lanes = values[warp], np.arange(32)
        np.testing.assert_array_equal(out[0, warp], v[lanes ^ mask])
        np.testing.assert_array_equal(out[1, warp], v[np.where(lanes + delta < 32, lanes + delta, lanes)])
        np.testing.assert_array_equal(out[2, warp], v[source])
        np.testing.assert_array_equal(out[3, warp], np.sum((v & 1).astype(np.uint64) << lanes.astype(np.uint64)))


def test_shuffles_move_8_bytes(device):
    values, out = np.random.default_rng(0).random(32), np.zeros(32)
    run_bf16(device, "shuffle_doubles", 1, 32, [values, out, np.int32(10)])
    np.testing.assert_array_equal(out, values[np.arange(32) ^ 10])


def tree_sum(values):
    """The order of warp_sum: partners 16, 8, 4, 2, 1 lanes away."""
    v = values.astype(np.float32)
    for distance in (16, 8, 4, 2, 1):
        v = v + v[np.arange(32) ^ distance]
    return v[0]


@pytest.mark.parametrize("threads", [32, 96, 1024])
def test_block_reductions_have_one_order(device, threads):
    values = np.random.default_rng(threads).standard_normal((2, threads)).astype(np.float32) - 10
    sums, maxima = np.full_like(values, np.nan), np.full_like(values, np.nan)
    run_bf16(device, "reductions", 2, threads, [values, sums, maxima])
    for row, s, m in zip(values, sums, maxima, strict=True):
        warps = np.zeros(32, np.float32)
        warps[: threads // 32] = [tree_sum(w) for w in row.reshape(-1, 32)]
        np.testing.assert_array_equal(s, tree_sum(warps))
        np.testing.assert_array_equal(m, row.max())


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_16_bit_value_becomes_the_right_float(device, dtype):
    values, out = np.arange(65536, dtype=np.uint16).view(DTYPES[dtype]), np.zeros(65536, np.float32)
    device.run("to_floats", 256, 256, [values, out], defines=[f"DTYPE={dtype}"])
    np.testing.assert_array_equal(out, values.astype(np.float32))
    np.testing.assert_array_equal(np.signbit(out[~np.isnan(out)]), np.signbit(values[~np.isnan(out)]))


def floats_to_round(dtype):
    """All values of the dtype, the middles between neighbours, and floats next to them; special values; others."""
    rng = np.random.default_rng(1)
    exact = np.sort(np.arange(65536, dtype=np.uint16).view(dtype).astype(np.float32))
    exact = exact[np.isfinite(exact)]
    middles = ((exact[:-1].astype(np.float64) + exact[1:]) / 2).astype(np.float32)
    special = np.array([np.inf, -np.inf, np.nan, -np.nan, 65519.996, 65520, -65520, 3.4e38, 1e-45, 2**-25, -0.0])
    with np.errstate(over="ignore"):
        around = [np.nextafter(middles, np.float32(s)) for s in (-np.inf, np.inf)]
    anything = rng.integers(0, 2**32, 20000, np.uint32).view(np.float32)
    values = np.concatenate([exact, middles, *around, special.astype(np.float32), anything])
    return np.concatenate([values, np.zeros(-len(values) % 256, np.float32)])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES)
def test_floats_are_rounded_to_nearest_even(device, dtype):
    values = floats_to_round(DTYPES[dtype])
    outputs = [np.full(len(values), 1, DTYPES[dtype]) for _ in range(4)]
    device.run("from_floats", len(values) // 256, 256, [values, *outputs], defines=[f"DTYPE={dtype}"])
    expected = values.astype(DTYPES[dtype]).view(np.uint16)
    expected[np.isnan(values)] = 0x7FFF
    for out in outputs:
        np.testing.assert_array_equal(out.view(np.uint16), expected)


def test_vector_loads(device):
    rng = np.random.default_rng(2)
    weights, activations = (rng.integers(0, 2**32, (32, 4), np.uint32) for _ in range(2))
    b2, b8 = rng.integers(0, 2**16, 32, np.uint16), rng.integers(0, 2**64, 32, np.uint64)
    b4, out = rng.random(32, np.float32), np.zeros((2, 32, 4), np.uint32)
    run_bf16(device, "vector_loads", 1, 32, [weights, activations, b2, b4, b8, out], pdl=True)
    np.testing.assert_array_equal(out[0], (weights + activations)[::-1])
    np.testing.assert_array_equal(out[1], np.stack([b2, b4.view(np.uint32), b8 & 0xFFFFFFFF, b8 >> 32], 1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_matrix_products(device, dtype):
    a, b = np.random.default_rng(3).integers(-8, 9, (2, 16, 16)).astype(DTYPES[dtype])
    out = np.full((2, 16, 16), np.nan, np.float32)
    device.run("matrix_products", 1, 32, [a, b, out], shared_bytes=2 * 16 * 24 * 2, defines=[f"DTYPE={dtype}"])
    a, b = a.astype(np.float32), b.astype(np.float32)
    np.testing.assert_array_equal(out, [a @ b.T, a @ b])


@pytest.mark.parametrize("valid", [0, 3, 5])
def test_asynchronous_copies(device, valid):
    rows = np.random.default_rng(4).integers(0, 2**32, (5, 64, 4), np.uint32)
    out = np.full_like(rows, 7)
    run_bf16(device, "copy_rows", 1, 64, [rows, out, np.int32(5), np.int32(valid)], shared_bytes=2 * 64 * 16)
    expected = rows[:, ::-1].copy()
    expected[valid:] = 0
    np.testing.assert_array_equal(out, expected)


def test_atomics_and_the_ticket_of_the_last_block(device):
    values = np.random.default_rng(5).integers(0, 2**32, (6, 64), np.uint32)
    bins, counter = np.zeros(32, np.uint64), np.zeros(1, np.uint32)
    total, largest = np.zeros(1, np.uint64), np.zeros(1, np.uint64)
    run_bf16(device, "histogram", 6, 64, [values, bins, counter, total, largest])
    np.testing.assert_array_equal(bins, np.bincount(values.ravel() % 32, minlength=32).astype(np.uint64) << 32)
    assert (total[0], counter[0], largest[0]) == (6 * 64 << 32, 6, int(values.max()) << 20)


def test_approximations(device):
    x = np.linspace(-20, 20, 128, dtype=np.float32)
    exp2s, rsqrts, tanhs = (np.full_like(x, np.nan) for _ in range(3))
    run_bf16(device, "approximations", 1, 128, [x, exp2s, rsqrts, tanhs])
    wide = x.astype(np.float64)
    np.testing.assert_allclose(exp2s, np.exp2(wide), rtol=5e-7)
    np.testing.assert_allclose(rsqrts, 1 / np.sqrt(wide**2 + 0.5), rtol=5e-7)
    np.testing.assert_allclose(tanhs, np.tanh(wide), rtol=7e-4)


def test_places_in_grid_and_block(device):
    out, times = np.zeros((3, 2, 2, 32), np.uint32), np.zeros((3 * 2 * 2 * 32, 2), np.uint64)
    run_bf16(device, "places", (2, 3), (32, 2), [out, times])
    by, bx, ty, tx = np.indices((3, 2, 2, 32))
    np.testing.assert_array_equal(out, tx + 100 * ty + 10000 * bx + 1000000 * by)
    assert (times[:, 0] <= times[:, 1]).all()


# ---- mistakes


def run_fault(name, args, block=64, grid=1, **options):
    EmulatedKernel(HERE / "faults.cu", name).launch(grid, block, args, **options)


def assert_fails(message, name, args, **options):
    with pytest.raises(EmulationError, match=re.escape(message)):
        run_fault(name, args, **options)


@pytest.mark.parametrize(("index", "message"), [
    (10, "argument 0 at byte 40, but it has 40 bytes"),
    (1010, "argument 0 at byte 4040, but it has 40 bytes"),
    (-2000, "8000 bytes before the start of argument 0"),
    (10**15, "an address near none of the arguments"),
])
def test_reading_outside_an_array(index, message):
    x, out = np.zeros(10, np.float32), np.zeros(1, np.float32)
    x = np.lib.stride_tricks.as_strided(np.zeros(64, np.float32)[2:], (10,), (4,))  # ends at a 16-byte border
    assert_fails(f"read_at: block (0, 0, 0), thread (5, 0, 0): reads {message}", "read_at", [x, out, np.int64(index)])


def test_an_unaligned_end_is_not_readable_data():
    x, out = np.ones(64, np.float32)[:9], np.zeros(1, np.float32)
    run_fault("read_at", [x, out, np.int64(9)])
    assert np.isnan(out[0])


def test_writing_outside_an_array():
    x = np.zeros(64, np.float32)[:9]
    assert_fails("wrote next to argument 0, which has 36 bytes", "write_at", [x, np.int64(9)])
    assert_fails("wrote next to argument 0", "write_at", [x, np.int64(-1)])
    assert_fails("writes argument 0 at byte 400", "write_at", [x, np.int64(100)])
    run_fault("write_at", [x, np.int64(8)])
    assert x[8] == 1


def test_writing_to_a_read_only_array():
    x = np.zeros(8, np.float32)
    x.flags.writeable = False
    assert_fails("argument 0 at byte 12, which is read-only", "write_at", [x, np.int64(3)])


def test_arrays_without_elements():
    empty, out = np.zeros(0, np.float32), np.zeros(4, np.float32)
    run_fault("write_at", [out, np.int64(0)])
    assert_fails("argument 0 at byte 0, but it has 0 bytes", "write_at", [empty, np.int64(0)])
    assert_fails("argument 0 at byte 8, but it has 0 bytes", "read_at", [out[:0], out, np.int64(2)])


def test_views_of_one_array_stay_together():
    base = np.zeros(12, np.float32)
    run_fault("read_at", [base[:8], base[4:], np.int64(1)])  # out = base[4:] is written, in the same memory
    base[2] = 5
    run_fault("read_at", [base[1:9], base[3:], np.int64(1)])
    np.testing.assert_array_equal(base[:6], [0, 0, 5, 5, 0, 0])


def test_misaligned_vectors():
    x, out = np.zeros(64, np.uint16), np.zeros((1, 4), np.uint32)
    run_fault("load_vector_at", [x, out, np.int32(8)])
    assert_fails("which is not 16-byte aligned", "load_vector_at", [x, out, np.int32(4)])


def test_shared_memory_has_bounds():
    assert_fails("dynamic shared memory at byte 256, but it has 256 bytes", "write_shared_at", [np.int32(64)],
                 shared_bytes=256)
    run_fault("write_shared_at", [np.int32(63)], shared_bytes=256)
    out = np.zeros((1, 4), np.uint32)
    assert_fails("load_shared at byte 256 of dynamic shared memory, but it has 256 bytes", "load_shared_at",
                 [np.int32(256), out], shared_bytes=256)
    assert_fails("load_shared at byte -16 of dynamic", "load_shared_at", [np.int32(-16), out], shared_bytes=256)
    assert_fails("not 16-byte aligned", "load_shared_at", [np.int32(8), out], shared_bytes=256)


@pytest.mark.parametrize("seed", SEEDS)
def test_shared_memory_starts_without_a_value(seed):
    out = np.zeros(4, np.float32)
    run_fault("read_uninitialised", [out], block=32, grid=3, shared_bytes=16, order_seed=seed)
    assert np.isnan(out).all() if seed % 2 == 0 else (out > 1e37).all()


def test_collectives_that_not_all_threads_reach():
    out = np.zeros(64, np.uint32)
    assert_fails("waits at __syncthreads with 62 others for 1 threads that never come: thread (40, 0, 0) has left the "
                 "kernel", "leave_before_barrier", [])
    assert_fails("waits at shuffle_xor with 30 others for 1 threads that never come: thread (40, 0, 0) has left",
                 "leave_before_shuffle", [out])
    assert_fails("thread (0, 0, 0): waits at shuffle_xor with 15 others for 16 threads that never come: "
                 "thread (16, 0, 0) waits at __syncthreads", "half_a_warp_shuffles", [out], block=32)
    assert_fails("thread (7, 0, 0): reached shuffle_xor while thread (0, 0, 0) of the same warp waits at ballot",
                 "different_collectives", [out])


@pytest.mark.parametrize("seed", SEEDS)
def test_a_missing_barrier_shows(seed):
    out = np.zeros(128, np.float32)
    run_fault("no_barrier", [out], order_seed=seed)
    assert (out[:64] != (np.arange(64) + 1) % 64).any()
    run_fault("no_second_barrier", [out], order_seed=seed)
    right = (np.arange(64) + 1) % 64
    if seed != 0:  # threads that run in order and in turn hide it
        assert (out != np.concatenate([right, right + 1000])).any()


@pytest.mark.parametrize("seed", range(2))
def test_a_copy_is_not_there_before_the_wait(seed):
    x, out = np.arange(4, dtype=np.float32), np.zeros(2, np.float32)
    run_fault("read_before_wait", [x + 5, out], block=32, order_seed=seed)
    assert out[1] == 5 and out[0] != 5
    run_fault("wait_for_too_little", [x + 5, out], block=32, order_seed=seed)
    assert out[0] != 5


def test_endless_loops_end():
    flag = np.zeros(1, np.uint32)
    assert_fails("loop_forever: block (0, 0, 0), thread (0, 0, 0): no end after", "loop_forever", [flag], seconds=0.05)
    assert_fails("no end after", "wait_for_neighbour", [flag, np.int32(0)], seconds=0.05)
    for seed in SEEDS:
        flag[0] = 0
        run_fault("wait_for_neighbour", [flag, np.int32(1)], order_seed=seed)


def test_faults_of_one_thread():
    one = np.array([1], np.int32)
    assert_fails("integer division by zero", "divide", [one, np.int32(0)])
    assert_fails("stack overflow", "use_much_stack", [one])
    assert_fails("thread (33, 0, 0): __trap", "trap_at", [np.uint32(33)])
    run_fault("divide", [one, np.int32(1)])  # and the machine still works


def test_activations_before_the_wait_for_the_kernel_before():
    x, out = np.ones((1, 4), np.uint32), np.zeros((1, 4), np.uint32)
    run_fault("activation_before_wait", [x, out])
    assert_fails("load_activation before pdl_wait", "activation_before_wait", [x, out], pdl=True)
    assert_fails("no thread called pdl_wait", "never_waits", [x, out], pdl=True)


# ---- arguments


def test_arguments_by_value():
    three = np.zeros((), np.dtype([("values", np.float32, 3), ("index", np.int32)]))
    three["values"], three["index"] = [1, 2, 3], 2
    out, maybe = np.zeros(1, np.float32), np.array([0.25], np.float32)
    for struct in (three, three.reshape(1).view("V16")):
        run_fault("by_value", [struct, np.float32(10), np.int64(-4), None, out])
        assert out[0] == 26
    run_fault("by_value", [three, np.float32(10), np.int64(-4), maybe, out])
    assert out[0] == 26.25


@pytest.mark.parametrize(("args", "message"), [
    ([np.zeros(4, np.float32)], "write_at has 2 parameters; 1 arguments were given"),
    ([np.zeros(4, np.float32), np.int32(0)], "argument 1 is an integer of 8 bytes, but int32 was given"),
    ([np.zeros(4, np.float32), np.float64(0)], "argument 1 is an integer of 8 bytes, but float64 was given"),
    ([np.zeros(4, np.float32), 3], "argument 1 is an integer of 8 bytes and needs a NumPy scalar"),
    ([np.zeros(4, np.float16), np.int64(0)], "elements of 4 bytes, but the array has dtype float16"),
    ([np.int64(5), np.int64(0)], "argument 0 is a pointer, but int64 was given"),
])
def test_arguments_that_do_not_fit(args, message):
    assert_fails(message, "write_at", args)


def test_launches_that_do_not_fit():
    args = [np.zeros(4, np.float32), np.int64(0)]
    assert_fails("a block of 48 threads; it must be a multiple of 32", "write_at", args, block=48)
    assert_fails("a block of 2048 threads", "write_at", args, block=2048)
    assert_fails("a block of 128 threads; it must be a multiple of 32, at most 64", "at_most_64_threads", [], block=128)
    assert_fails("dynamic shared memory; at most", "write_at", args, shared_bytes=1 << 20)
    assert_fails("grid is (1, 0)", "write_at", args, grid=(1, 0))
    with pytest.raises(EmulationError, match="faults.cu has no kernel nothing; it has read_at, write_at"):
        EmulatedKernel(HERE / "faults.cu", "nothing")
    with pytest.raises(EmulationError, match="declares no variant DTYPE=F64"), use_backend(EmulatorBackend()):
        launch(str(HERE / "probes.cu"), "places", 1, 32, [], defines=["DTYPE=F64"])


def test_a_kernel_that_does_not_compile(tmp_path):
    source = tmp_path / "wrong.cu"
    source.write_text('extern "C" __global__ void wrong(int* x) { y = 1; }')
    with pytest.raises(EmulationError, match="(?s)wrong does not compile.*wrong.cu"):
        EmulatedKernel(source, "wrong")


# ---- order


def test_order_seeds_permute_blocks_and_threads():
    seen = set()
    for seed in SEEDS:
        counter, blocks, threads = np.zeros(1, np.uint32), np.zeros(4, np.uint32), np.zeros((4, 64), np.uint32)
        run_fault("order", [counter, blocks, threads], grid=4, order_seed=seed)
        assert sorted(blocks) == list(range(4))
        assert all(sorted(t) == list(range(64)) for t in threads)
        if seed == 0:
            np.testing.assert_array_equal(blocks, range(4))
        seen.add((*blocks, *threads.ravel()))
    assert len(seen) == len(SEEDS)
