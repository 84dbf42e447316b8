"""A test of the tests: kernels with one mistake in them, each of which must be noticed in the emulation.

A mutation replaces one piece of the text of a kernel file or of device.cuh. The changed kernel must raise or give
results that its tests would refuse, under at least one of the order seeds that tests use.
"""

import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from cutp.array.kernel import launch, use_backend
from cutp.ops import rms_norm as reference
from cutp.ops.residual import residual_add
from cutp.ops.rms_norm_cuda import add_rms_norm
from tests.emulation.emulator import EmulationError, EmulatorBackend, needs_compiler

pytestmark = needs_compiler
bfloat16 = np.dtype(ml_dtypes.bfloat16)
REPOSITORY = Path(__file__).resolve().parents[2]
NORM, HEADER, PROBES = "cutp/ops/rms_norm.cu", "cutp/ops/device.cuh", "tests/emulation/probes.cu"
SEEDS = (0, 1, 2)

MUTATIONS = {
    "a vector too far": (
        NORM,
        "int vector_index(int i) { return i * blockDim.x + threadIdx.x; }",
        "int vector_index(int i) { return i * blockDim.x + threadIdx.x + 1; }",
    ),
    "a bound off by one": (
        NORM,
        "const bool inside = vector_index(i) < dim / width;",
        "const bool inside = vector_index(i) <= dim / width;",
    ),
    "a row too many": (NORM, "if (row_index() >= rows) return;", "if (row_index() > rows) return;"),
    "the residual stream before rounding": (
        NORM,
        "        unpack<scalar_t>(sum, row.values[i]);\n",
        "",
    ),
    "one rounding where there are two": (NORM, ": rounded<scalar_t>(normalised)", ": normalised"),
    "activations before the wait": (NORM, "    pdl_wait();\n", ""),
    "no barrier before the partial sums are read": (
        HEADER,
        "scratch[warp_id()] = v;\n    __syncthreads();\n    v = warp_sum(",
        "scratch[warp_id()] = v;\n    v = warp_sum(",
    ),
    "a barrier that some threads do not reach": (
        HEADER,
        "scratch[warp_id()] = v;\n    __syncthreads();\n    v = warp_sum(",
        "scratch[warp_id()] = v;\n    if (warp_id() < warps - 1) __syncthreads();\n    v = warp_sum(",
    ),
    "a reduction over half a warp": (
        HEADER,
        "for (int distance = warp_size / 2; distance > 0; distance /= 2) v += shuffle_xor(v, distance);",
        "for (int distance = warp_size / 4; distance > 0; distance /= 2) v += shuffle_xor(v, distance);",
    ),
    "a reduction that misses the last warp": (
        HEADER,
        "warp_sum(lane_id() < warps ?",
        "warp_sum(lane_id() < warps - 1 ?",
    ),
    "a shuffle that some lanes skip": (
        HEADER,
        "distance /= 2) v += shuffle_xor(v, distance);",
        "distance /= 2) if (lane_id() != 3) v += shuffle_xor(v, distance);",
    ),
}


PROBE_MUTATIONS = {
    "no barrier before the scratch is used again": (
        HEADER,
        ": 0.0f);\n    __syncthreads();\n",
        ": 0.0f);\n",
    ),
    "a maximum that starts at zero": (HEADER, "scratch[lane_id()] : negative_infinity()", "scratch[lane_id()] : 0.0f"),
    "a wait for one group of copies too few": (PROBES, "cp_async_wait<1>", "cp_async_wait<2>"),
    "no barrier between the wait and the read": (
        PROBES,
        "cp_async_wait<1>();\n        __syncthreads();\n",
        "cp_async_wait<1>();\n",
    ),
    "no barrier before a buffer is filled again": (
        PROBES,
        "n - 1 - t)));\n        __syncthreads();\n",
        "n - 1 - t)));\n",
    ),
    "matrix rows in the wrong order": (PROBES, "lane / 8 % 2 * 8", "lane / 16 * 8"),
    "a matrix row beyond shared memory": (PROBES, "scalar_t* sb = sa + 16 * stride", "scalar_t* sb = sa + 17 * stride"),
    "swapped fragments": (PROBES, "fa[1], fa[2]", "fa[2], fa[1]"),
}


def norm_is_right(root, seed):
    """Whether add_rms_norm agrees with the reference, for rows of one warp and of several."""
    for rows, dim in ((6, 128), (3, 1528)):
        rng = np.random.default_rng(dim)
        x, residual, weight = (rng.standard_normal(s).astype(bfloat16) for s in ((rows, dim), (rows, dim), dim))
        sums = residual_add(residual, x)
        expected = reference.rms_norm(sums, weight, 1e-5).astype(np.float32)
        got_sums, got = np.full_like(x, np.nan), np.full_like(x, np.nan)
        with use_backend(EmulatorBackend(seed, root / "cutp" / "ops")):
            add_rms_norm(x, residual, weight, 1e-5, residual_out=got_sums, out=got, pdl=True)
        got = got.astype(np.float32)
        few_differ = np.count_nonzero(got != expected) <= got.size / 1000
        if not (np.array_equal(got_sums, sums) and few_differ and np.allclose(got, expected, rtol=2**-7, atol=0)):
            return False
    return True


def probes_are_right(root, seed):
    """Whether reductions, asynchronous copies and matrix products agree with NumPy."""
    rng = np.random.default_rng(0)
    values = -1 - rng.random((2, 256), np.float32)
    sums, maxima = np.zeros_like(values), np.zeros_like(values)
    rows, copied = rng.integers(0, 2**32, (5, 64, 4), np.uint32), np.zeros((5, 64, 4), np.uint32)
    a, b = rng.integers(-8, 9, (2, 16, 16)).astype(bfloat16)
    products = np.zeros((2, 16, 16), np.float32)
    with use_backend(EmulatorBackend(seed, root / "tests" / "emulation")):
        for name, block, args, shared_bytes in (
            ("reductions", 256, [values, sums, maxima], 0),
            ("copy_rows", 64, [rows, copied, np.int32(5), np.int32(5)], 2 * 64 * 16),
            ("matrix_products", 32, [a, b, products], 2 * 16 * 24 * 2),
        ):
            grid = 2 if name == "reductions" else 1
            launch("probes.cu", name, grid, block, args, shared_bytes=shared_bytes, defines=["DTYPE=BF16"])
    a, b = a.astype(np.float32), b.astype(np.float32)
    return (np.allclose(sums, values.sum(1, keepdims=True)) and (maxima == values.max(1, keepdims=True)).all()
            and np.array_equal(copied, rows[:, ::-1]) and np.array_equal(products, [a @ b.T, a @ b]))


def copy_of_kernels(root):
    for name in (NORM, HEADER, PROBES):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, root / name)
    return root


@pytest.mark.parametrize("is_right", [norm_is_right, probes_are_right])
def test_unchanged_kernels_pass(is_right, tmp_path):
    root = copy_of_kernels(tmp_path)
    assert all(is_right(root, seed) for seed in SEEDS)


@pytest.mark.parametrize(("mutation", "is_right"), [
    *((m, norm_is_right) for m in MUTATIONS), *((m, probes_are_right) for m in PROBE_MUTATIONS)])
def test_a_mutation_is_noticed(mutation, is_right, tmp_path):
    name, old, new = (MUTATIONS | PROBE_MUTATIONS)[mutation]
    path = copy_of_kernels(tmp_path) / name
    text = path.read_text()
    assert old in text, "the mutation no longer applies"
    path.write_text(text.replace(old, new))
    try:
        assert not all(is_right(tmp_path, seed) for seed in SEEDS)
    except EmulationError as error:
        assert "does not compile" not in str(error)
