"""skinny_gemm.cu against ops/linear.py, in the emulation and on a GPU."""

from functools import partial
from itertools import product

import numpy as np
import pytest

from cutp.array.kernel_source import read_source
from cutp.ops import skinny_gemm_cuda
from cutp.ops.linear import linear
from cutp.ops.skinny_gemm_cuda import MAX_M, plan, skinny_gemm
from tests.ops import linear_checks
from tests.ops.kernel_results import DTYPES, bfloat16, emulated_only, float16, float32, in_every_order
from tests.ops.linear_checks import LARGE, case_id, inputs, integers, normal, ones

# N, K and M of each tile shape that `plan` knows, with tails in N and K. A long N has a short K to be quick.
TILES = [(37, 1000, 3), (3210, 40, 8), (4230, 24, 1), (50, 600, 11), (4105, 24, 9), (50, 600, 29), (4105, 24, 20),
         (50, 600, 50), (4105, 24, 33), (12700, 24, 40)]
# Of each number of warps: K up to one slice, and down to a few elements in the last one.
WARPS = [(9, 8, 1), (19, 512, 2), (19, 520, 5), (3, 776, 12), (17, 2048, 3), (5, 2056, 18)]
FLOAT_SHAPES = [(1, 4, 1), (9, 500, 3), (7, 516, 13), (6, 2052, 33)]
CASES = [(bfloat16, s) for s in TILES + WARPS] + [(float16, s) for s in WARPS] + [(float32, s) for s in FLOAT_SHAPES]


def run(device, x, weight, bias=None, out_dtype=None, pdl=False):
    out = device.poisoned((x.shape[0], weight.shape[0]), out_dtype or x.dtype)
    skinny_gemm(device.array(x), device.array(weight), None if bias is None else device.array(bias), out=out, pdl=pdl)
    return device.numpy(out)


def shapes(device, small, large):
    return small if device.emulated else [*small, *large]


@pytest.mark.parametrize("dtype, shape", CASES, ids=case_id)
def test_exact_sums(device, dtype, shape):
    x, weight, bias = inputs(integers, dtype, *shape)
    # Rounded or not, the reference is exact as well.
    np.testing.assert_array_equal(run(device, x, weight, bias), linear(x, weight, bias))
    unrounded = x.astype(np.float32) @ weight.astype(np.float32).T
    np.testing.assert_array_equal(run(device, x, weight, out_dtype=float32), unrounded)


@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
def test_equals_float64_up_to_one_rounding(device, dtype):
    small = [(21, 1000, 6), (19, 600, 13)]
    for shape in shapes(device, small, LARGE[: 3 if dtype == float32 else None]):
        linear_checks.check_equals_float64_up_to_one_rounding(partial(run, device), dtype, shape, 1e-6)


# M_TILES, ROWS, STEPS
VARIANTS = [(1, 8, 8), (1, 16, 4), (1, 16, 8), (2, 16, 4), (2, 32, 4), (4, 16, 4), (4, 32, 2), (8, 16, 2), (8, 32, 4),
            (8, 48, 2)]


def test_every_tile_shape_gives_the_same_bits(device, monkeypatch):
    # 8 warps with 10 steps each: all loads in flight are replaced at least once. Then 4 steps, of which some end early.
    for k, warps in ((2048 + 440, 8), (424, 4)):
        x, weight, bias = inputs(normal, bfloat16, 50, k, MAX_M)
        monkeypatch.setattr(skinny_gemm_cuda, "_warps", lambda *_, warps=warps: warps)
        results = []
        for variant in VARIANTS:
            monkeypatch.setattr(skinny_gemm_cuda, "_tile", lambda *_, variant=variant: variant)
            results.append(run(device, x[: 8 * variant[0]], weight, bias, float32))
        exact = x.astype(np.float64) @ weight.astype(np.float64).T + bias.astype(np.float64)
        np.testing.assert_allclose(results[-1], exact, rtol=1e-5, atol=1e-3)
        for result, variant in zip(results, VARIANTS, strict=True):
            np.testing.assert_array_equal(result, results[-1][: len(result)], err_msg=str(variant))


@pytest.mark.parametrize("dtype", [bfloat16, float16], ids=case_id)
def test_one_rounding_after_the_bias(device, dtype):
    linear_checks.check_one_rounding_after_the_bias(partial(run, device), dtype, (24, 264, 9))


INVARIANT = [(bfloat16, (21, 296)), (bfloat16, (37, 1160)), (float16, (18, 2200)), (float32, (6, 700))]
INVARIANT_LARGE = [(bfloat16, (4100, 1160)), (bfloat16, (3208, 4096)), (float16, (12800, 2048)), (float32, (4100, 900))]


def test_a_row_depends_on_nothing_but_itself(device):
    for dtype, (n, k) in shapes(device, INVARIANT, INVARIANT_LARGE):
        linear_checks.check_a_row_depends_on_nothing_but_itself(partial(run, device), dtype, n, k, MAX_M)


@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
def test_what_is_not_finite_stays_in_its_row_and_column(device, dtype):
    linear_checks.check_what_is_not_finite_stays_in_its_row_and_column(partial(run, device), dtype, 520)


@pytest.mark.parametrize("dtype, m", [(bfloat16, 1), (bfloat16, 6), (bfloat16, 13), (float32, 9)], ids=str)
def test_rows_apart(device, dtype, m):
    n, k = 21, 600 - 16 // dtype.itemsize
    x, weight, _ = inputs(integers, dtype, n, k, m)
    padded = np.full((m, k + 40), np.nan, dtype)
    padded[:, :k] = x
    out = device.poisoned((m, n + 3), dtype)
    skinny_gemm(device.array(padded)[:, :k], device.array(weight), out=out[:, 1:-2])
    got = device.numpy(out)
    np.testing.assert_array_equal(got[:, 1:-2], linear(x, weight))
    assert np.isnan(got[:, [0, -2, -1]].astype(np.float32)).all()


def test_nothing_to_do(device):
    for m, n in ((0, 5), (3, 0)):
        x, weight = np.ones((m, 16), bfloat16), np.ones((n, 16), bfloat16)
        assert run(device, x, weight).shape == (m, n)


@pytest.mark.parametrize("dtype", [bfloat16, float32], ids=case_id)
def test_programmatic_launch(device, dtype):
    # The emulation refuses activations that are touched before the wait.
    x, weight, bias = inputs(normal, dtype, 21, 1160, 11)
    np.testing.assert_array_equal(run(device, x, weight, bias, pdl=True), run(device, x, weight, bias))


@emulated_only
@pytest.mark.parametrize("dtype", [bfloat16, float32], ids=case_id)
def test_order_of_threads_does_not_matter(device, dtype):
    x, weight, bias = inputs(normal, dtype, 21, 1160, 11)
    in_every_order(lambda: [run(device, x, weight, bias, float32)])


@emulated_only
def test_bad_arguments(device):
    linear_checks.check_bad_arguments(skinny_gemm, MAX_M)
    refused = partial(linear_checks.check_refused, skinny_gemm)
    refused("rows of 12 bfloat16 .*multiple of 8", ones(2, 12), ones(8, 12))
    refused("rows of 0 bfloat16", ones(2, 0), ones(8, 0))
    refused("rows of 6 float32 .*multiple of 4", ones(2, 6, dtype=float32), ones(8, 6, dtype=float32),
            out=ones(2, 8, dtype=float32))


# ---- the plan


SIZES = [1, 8, 40, 768, 1024, 1056, 1280, 3072, 3200, 4096, 4224, 6144, 12672, 14336, 28672, 128256]
LENGTHS = [8, 512, 520, 896, 1792, 2048, 4096, 14336]


def test_every_plan_is_declared_and_every_variant_planned():
    plans = {(d, n, k, m): plan(n, k, m, d) for d, n, k, m in product(DTYPES, SIZES, LENGTHS, range(1, MAX_M + 1))}
    used = {tuple(sorted(p.defines)) for p in plans.values()}
    for variants in read_source("skinny_gemm.cu").variants.values():
        assert set(variants) == used
    for (_, n, _, m), p in plans.items():
        of = dict(d.split("=") for d in p.defines)
        rows, columns, threads = int(of["ROWS"]), 8 * int(of["M_TILES"]), p.block
        assert p.grid == -(-n // rows) * -(-m // columns) and threads % 32 == 0
        assert p.shared_bytes == threads // 32 * rows * columns * 4 <= 160 * 1024
        assert threads <= 256 or rows <= 16  # what a wide tile's registers allow


def test_the_split_of_k_does_not_depend_on_m():
    for dtype, n, k in product(DTYPES, SIZES, LENGTHS):
        assert len({plan(n, k, m, dtype).block for m in range(1, MAX_M + 1)}) == 1


def test_small_matrices_occupy_every_multiprocessor():
    for n in range(8 * 132, 5000, 8):
        assert plan(n, 4096, 1, bfloat16).grid >= 132
    assert plan(512, 4096, 1, bfloat16).block == 512
