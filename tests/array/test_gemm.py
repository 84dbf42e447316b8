"""linear through cuBLASLt: the description of the product, with a stand-in that computes on the CPU."""

import ctypes.util
import gc
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from cutp.array import cuda, gemm
from cutp.array.arena import Arena
from cutp.array.gemm import LinearEngine, linear_shape
from cutp.errors import ConfigError, DeviceError
from tests.array.fake_cublaslt import FakeCublasLt

ROOT = Path(__file__).resolve().parents[2]
BF16, F16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32)


@pytest.fixture
def workspace():
    return Arena(lambda n: np.zeros(n, np.uint8)).array("workspace", 4096, np.uint8)


def random(shape, dtype, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def expected(x, w, bias, dtype):
    y = x.astype(np.float64) @ w.astype(np.float64).T
    return (y if bias is None else y + bias.astype(np.float64)).astype(np.float32).astype(dtype)


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 5, 3), (3, 1, 7), (5, 4, 1), (16, 8, 32), (7, 13, 9)])
def test_the_product_is_x_times_w_transposed(workspace, dtype, with_bias, m, n, k):
    x, w = random((m, k), dtype), random((n, k), dtype, 1)
    bias = random((n,), dtype, 2) if with_bias else None
    out = np.full((m, n), np.nan, dtype)
    got = LinearEngine(FakeCublasLt()).linear(x, w, out, bias, workspace, False, 5)
    assert got is out
    np.testing.assert_array_equal(out, expected(x, w, bias, dtype))


def test_rows_may_be_apart_and_the_gaps_are_left_alone(workspace):
    big = random((6, 20), BF16)
    x, w = big[:4, 2:9], random((10, 11), BF16, 1)[::2, 1:8]
    whole = np.full((4, 8), 77, F32)
    out = whole[:, 1:6]
    LinearEngine(FakeCublasLt()).linear(x, w, out, None, workspace, False, 5)
    np.testing.assert_array_equal(out, expected(x, w, None, F32))
    assert (whole[:, [0, 6, 7]] == 77).all()


def test_a_choice_is_made_once_for_equal_shapes(workspace):
    lt = FakeCublasLt()
    engine, arena = LinearEngine(lt), Arena(lambda n: np.zeros(n, np.uint8))

    def run(m, dtype=BF16, bias=None):
        x, w, out = (arena.array(name, shape, dtype) for name, shape in (("x", (8, 4)), ("w", (8, 4)), ("out", (8, 8))))
        x[...], w[...] = random((8, 4), dtype, m), random((8, 4), dtype)
        engine.linear(x[:m], w, out[:m], bias, workspace, False, 5)
        np.testing.assert_array_equal(out[:m], expected(x[:m], w, bias, dtype))
        return len(lt.choices)

    assert [run(m) for m in (1, 2, 1, 2)] == [1, 2, 2, 2]
    assert [run(2, F16), run(2, F16)] == [3, 3]
    biases = [random((8,), BF16, seed) for seed in (1, 2)]  # at two places at the same time
    assert [run(1, bias=bias) for bias in biases] == [4, 4]


def test_equal_shapes_of_other_layouts_are_other_products(workspace):
    """Rows that are further apart, other places and other dtypes of the result are seen, whatever came before."""
    lt = FakeCublasLt()
    engine = LinearEngine(lt)
    wide = random((8, 16), BF16)
    arena = Arena(lambda n: np.zeros(n, np.uint8))
    w, narrow, result = arena.array("w", (8, 4), BF16), arena.array("x", (8, 4), BF16), arena.array("out", (8, 8), BF16)
    w[...], narrow[...] = random((8, 4), BF16, 1), random((8, 4), BF16, 2)
    results = [result, np.zeros((8, 8), F32), np.zeros((8, 24), BF16)[:, 8:16]]
    for _ in range(2):
        for x in (narrow, wide[:, :4], wide[:, 1:5], wide[:, 8:12], np.ascontiguousarray(wide[:, :4])):
            for out in results:
                out[...] = 77
                engine.linear(x, w, out, None, workspace, False, 5)
                np.testing.assert_array_equal(out, expected(x, w, None, out.dtype))
        with pytest.raises(ConfigError, match="x .* has no contiguous rows"):
            engine.linear(wide[:, ::4], w, result, None, workspace, False, 5)
        with pytest.raises(ConfigError, match="multiple of 256 bytes"):
            engine.linear(narrow, w, result, None, workspace[16:], False, 5)
    steps = [(c["MIN_ALIGNMENT_B_BYTES"], c["MIN_ALIGNMENT_D_BYTES"]) for c in lt.choices]
    assert 2 in {b for b, _ in steps} and 256 in {b for b, _ in steps} and len(lt.choices) < 2 * 15


def test_what_the_choice_is_told(workspace):
    lt = FakeCublasLt()
    engine = LinearEngine(lt)
    aligned = Arena(lambda n: np.zeros(n, np.uint8))
    x, out = aligned.array("x", (4, 8), F32), aligned.array("out", (4, 16), F32)
    w = aligned.array("w", 16 * 8 + 4, F32)[4:].reshape(16, 8)  # 16 bytes after a multiple of 256
    for tf32 in (False, True):
        engine.linear(x, w, out, None, workspace, tf32, 5)
    exact, fast = lt.choices
    assert (exact["compute"], fast["compute"], exact["scale"]) == (68, 77, 0)
    assert exact["MAX_WORKSPACE_BYTES"] == 4096 and exact["REDUCTION_SCHEME_MASK"] == 2
    assert [exact[f"MIN_ALIGNMENT_{i}_BYTES"] for i in "ABCD"] == [16, 256, 256, 256]


def test_products_of_any_number_of_rows_have_one_algorithm(workspace):
    """Where rows are to have the same bits, all that the choice is told is the same, and no sum is split."""
    lt = FakeCublasLt()
    engine = LinearEngine(lt)
    x, w, y = random((300, 40), BF16), random((24, 32), BF16, 1), np.empty((300, 30), BF16)
    for rows in (1, 7, 128, 300):
        for part in (x[:rows, :32], x[300 - rows :, 8:]):
            out = np.full((rows, 24), np.nan, BF16) if rows % 2 else y[:rows, :24]
            engine.linear(part, w, out, None, workspace, False, 5, True)
            np.testing.assert_array_equal(out, expected(part, w, None, BF16))
    aligned = [choice for choice in lt.choices if choice["MIN_ALIGNMENT_B_BYTES"] == 16]
    assert aligned and all(choice == aligned[0] for choice in aligned if choice["MIN_ALIGNMENT_D_BYTES"] == 16)
    assert {choice["REDUCTION_SCHEME_MASK"] for choice in lt.choices} == {0}
    assert {(choice["B"], choice["D"]) for choice in lt.choices} == {((BF16, 32, 128, 32), (BF16, 24, 128, 24))}
    engine.linear(x[:7, :32], w, y[:7, :24], None, workspace, False, 5)
    assert lt.choices[-1]["REDUCTION_SCHEME_MASK"] == 2 and lt.choices[-1]["B"][2] == 7


def test_16_bit_factors_never_use_tf32(workspace):
    x = random((1, 2), BF16)
    assert not linear_shape(x, x, np.empty((1, 1), F32), None, workspace, True).tf32


def test_descriptors_are_given_back(workspace):
    lt = FakeCublasLt()
    engine = LinearEngine(lt)
    engine.linear(random((1, 2), F32), random((3, 2), F32), np.empty((1, 3), F32), None, workspace, False, 5)
    assert len(lt.alive) == 5
    del engine
    gc.collect()
    assert list(lt.alive.values()) == ["handle"]


def test_empty_results_start_nothing(workspace):
    lt = FakeCublasLt()
    for m, n in ((0, 3), (3, 0)):
        x, w, out = np.empty((m, 2), F32), np.empty((n, 2), F32), np.empty((m, n), F32)
        assert LinearEngine(lt).linear(x, w, out, None, workspace, False, 5) is out
    assert lt.choices == []


@pytest.mark.parametrize(("change", "message"), [
    ({"x": np.zeros(4, F32)}, r"x has shape \(4,\), it must be a matrix"),
    ({"w": np.zeros((5, 3), F32)}, r"x \(2, 4\), w \(5, 3\) and out \(2, 5\) are not"),
    ({"out": np.zeros((5, 2), F32)}, "are not"),
    ({"x": np.zeros((2, 0), F32), "w": np.zeros((5, 0), F32)}, "K is 0"),
    ({"w": np.zeros((5, 4), BF16)}, "x and w must both be"),
    ({"out": np.zeros((2, 5), BF16)}, "and out the same or float32"),
    ({"x": np.zeros((2, 4)), "w": np.zeros((5, 4))}, "x and w must both be"),
    ({"x": np.zeros((4, 2), F32).T}, "x .* has no contiguous rows"),
    ({"w": np.zeros((5, 8), F32)[:, ::2]}, "w .* has no contiguous rows"),
    ({"out": np.zeros((2, 5), F32)[::-1]}, "out .* has no contiguous rows"),
    ({"x": np.broadcast_to(np.zeros(4, F32), (2, 4))}, "x .* has no contiguous rows"),
    ({"bias": np.zeros(4, F32)}, r"bias float32 \(4,\) must be contiguous, float32 \(5,\)"),
    ({"bias": np.zeros(5, F16)}, "bias float16"),
    ({"bias": np.zeros(10, F32)[::2]}, "must be contiguous"),
    ({"workspace": np.zeros(16, np.int32)}, "workspace must be uint8"),
])
def test_arrays_that_do_not_fit(workspace, change, message):
    fits = {"x": np.zeros((2, 4), F32), "w": np.zeros((5, 4), F32), "out": np.zeros((2, 5), F32), "bias": None,
            "workspace": workspace}
    linear_shape(**fits)
    with pytest.raises(ConfigError, match=f"linear: .*{message}"):
        linear_shape(**{**fits, **change})


def test_a_workspace_off_the_grid(workspace):
    with pytest.raises(ConfigError, match="multiple of 256 bytes"):
        linear_shape(np.zeros((2, 4), F32), np.zeros((5, 4), F32), np.zeros((2, 5), F32), None, workspace[1:])


def test_failures_of_the_library_are_sentences(workspace, monkeypatch):
    x = np.zeros((2, 4), F32)
    args = (x, x, np.zeros((2, 2), F32), None, workspace, False, 5)
    with pytest.raises(DeviceError, match=r"cuBLASLt has no algorithm for \[2, 4\] x \[2, 4\]\^T in float32 with 4096"):
        LinearEngine(FakeCublasLt(algorithms=0)).linear(*args)

    def broken(*_):
        raise FakeCublasLt.cuBLASLtError("CUBLAS_STATUS_ALLOC_FAILED")

    monkeypatch.setattr(FakeCublasLt, "matmul", broken)
    with pytest.raises(DeviceError, match="cuBLASLt failed at .*CUBLAS_STATUS_ALLOC_FAILED"):
        LinearEngine(FakeCublasLt()).linear(*args)
    monkeypatch.setattr(FakeCublasLt, "create", broken)
    with pytest.raises(DeviceError, match="cuBLASLt cannot be used: CUBLAS"):
        LinearEngine(FakeCublasLt())
    monkeypatch.setitem(sys.modules, "nvmath.bindings", None)
    with pytest.raises(DeviceError, match=r'need nvmath-python, which is not installed \(pip install "cutp\[cuda13\]"'):
        gemm._bindings()


@pytest.mark.skipif(cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(workspace):
    x = np.zeros((2, 4), F32)
    with pytest.raises(DeviceError):
        gemm.linear(x, x, np.zeros((2, 2), F32), workspace=workspace)


# The bindings refuse to load without a driver library; the descriptors themselves need none. With an empty library
# by the driver's name they can be made, up to the choice of an algorithm, for which cuBLASLt wants a GPU.
DESCRIBE = """
import numpy as np
from nvmath.bindings import cublasLt
from cutp.array.cublaslt import LinearPlan, LinearShape

class Spy:
    def __getattr__(self, name):
        value = getattr(cublasLt, name)
        if name.startswith("mat") and callable(value):
            def call(*args):
                print(name, flush=True)
                return value(*args)
            return call
        return value

shape = LinearShape(3, 5, 7, np.dtype(np.float16), np.dtype(np.float32), 7, 8, 5, (2, 4, 256), True, False, 1024)
try:
    LinearPlan(Spy(), 0, shape)
except cublasLt.cuBLASLtError as error:
    print("refused:", error)
"""


@pytest.mark.skipif(
    find_spec("nvmath") is None or shutil.which("cc") is None or ctypes.util.find_library("cuda") is not None,
    reason="needs nvmath-python and a C compiler, and no driver",
)
def test_the_real_library_takes_the_descriptors(tmp_path):
    (tmp_path / "empty.c").write_text("int cuDriverGetVersion(int* v) { *v = 13000; return 0; }\n")
    library = tmp_path / "libcuda.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "empty.c"], check=True)
    environment = {"LD_LIBRARY_PATH": str(tmp_path), "PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", DESCRIBE], env=environment, capture_output=True, text=True)
    if "cublasLt" in done.stderr and "NotFound" in done.stderr:
        pytest.skip("needs the cuBLAS library: pip install nvidia-cublas")
    calls = done.stdout.split()
    assert done.returncode == 0, done.stderr
    assert calls.count("matrix_layout_create") == 3 and calls.count("matmul_desc_set_attribute") == 4
    assert calls.count("matmul_preference_set_attribute") == 6
    assert "refused:" in calls and calls.index("matmul_algo_get_heuristic") == calls.index("refused:") - 2
