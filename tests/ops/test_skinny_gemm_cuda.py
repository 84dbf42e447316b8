"""skinny_gemm.cu against ops/linear.py, in the emulation and on a GPU."""

from itertools import product

import ml_dtypes
import numpy as np
import pytest

from cutp.array.kernel import use_backend
from cutp.array.kernel_source import read_source
from cutp.errors import ConfigError
from cutp.ops import skinny_gemm_cuda
from cutp.ops.linear import linear
from cutp.ops.skinny_gemm_cuda import MAX_M, plan, skinny_gemm

bfloat16, float16, float32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32)
DTYPES = [bfloat16, float16, float32]

# N, K and M of each tile shape that `plan` knows, with tails in N and K. A long N has a short K to be quick.
TILES = [(37, 1000, 3), (3210, 40, 8), (4230, 24, 1), (50, 600, 11), (4105, 24, 9), (50, 600, 29), (4105, 24, 20),
         (50, 600, 50), (4105, 24, 33), (12700, 24, 40)]
# Of each number of warps: K up to one slice, and down to a few elements in the last one.
WARPS = [(9, 8, 1), (19, 512, 2), (19, 520, 5), (3, 776, 12), (17, 2048, 3), (5, 2056, 18)]
FLOAT_SHAPES = [(1, 4, 1), (9, 500, 3), (7, 516, 13), (6, 2052, 33)]
CASES = [(bfloat16, s) for s in TILES + WARPS] + [(float16, s) for s in WARPS] + [(float32, s) for s in FLOAT_SHAPES]
# What models have, too large for the emulation.
LARGE = [(6144, 4096, 8), (4096, 4096, 17), (4096, 14336, 1), (14336, 2048, 64), (1280, 8192, 5), (768, 4096, 33),
         (4096, 512, 8), (32064, 896, 16), (4096, 1792, 31)]


def case_id(value):
    return value.name if isinstance(value, np.dtype) else "x".join(map(str, value))


def integers(seed, *shape):
    """Small integers: sums of their products are exact in float32, whatever the order."""
    return np.random.default_rng(seed).integers(-8, 9, shape).astype(np.float32)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def inputs(make, dtype, shape):
    n, k, m = shape
    return tuple(a.astype(dtype) for a in (make(1, m, k), make(2, n, k), make(3, n)))


def run(device, x, weight, bias=None, out_dtype=None, pdl=False):
    out = device.poisoned((x.shape[0], weight.shape[0]), out_dtype or x.dtype)
    skinny_gemm(device.array(x), device.array(weight), None if bias is None else device.array(bias), out=out, pdl=pdl)
    return device.numpy(out)


def shapes(device, small, large):
    return small if device.emulated else [*small, *large]


@pytest.mark.parametrize("dtype, shape", CASES, ids=case_id)
def test_exact_sums(device, dtype, shape):
    x, weight, bias = inputs(integers, dtype, shape)
    # Rounded or not, the reference is exact as well.
    np.testing.assert_array_equal(run(device, x, weight, bias), linear(x, weight, bias))
    unrounded = x.astype(np.float32) @ weight.astype(np.float32).T
    np.testing.assert_array_equal(run(device, x, weight, out_dtype=float32), unrounded)


@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
def test_equals_float64_up_to_one_rounding(device, dtype):
    small = [(21, 1000, 6), (19, 600, 13)]
    for shape in shapes(device, small, LARGE[: 3 if dtype == float32 else None]):
        x, weight, bias = inputs(normal, dtype, shape)
        exact = x.astype(np.float64) @ weight.astype(np.float64).T
        # The errors of sums are below the least of these factors times the sum of magnitudes.
        slack = 1e-6 * (np.abs(x).astype(np.float64) @ np.abs(weight).astype(np.float64).T)
        assert (np.abs(run(device, x, weight, out_dtype=float32) - exact) <= slack).all(), shape
        biased = exact + bias.astype(np.float64)
        rounding = float(ml_dtypes.finfo(dtype).eps) / 2 * np.abs(biased)
        got = run(device, x, weight, bias).astype(np.float64)
        assert (np.abs(got - biased) <= 1.001 * rounding + 1.001 * slack).all(), shape


# M_TILES, ROWS, STEPS
VARIANTS = [(1, 8, 8), (1, 16, 4), (1, 16, 8), (2, 16, 4), (2, 32, 4), (4, 16, 4), (4, 32, 2), (8, 16, 2), (8, 32, 4),
            (8, 48, 2)]


def test_every_tile_shape_gives_the_same_bits(device, monkeypatch):
    # 8 warps with 10 steps each: all loads in flight are replaced at least once. Then 4 steps, of which some end early.
    for k, warps in ((2048 + 440, 8), (424, 4)):
        x, weight, bias = inputs(normal, bfloat16, (50, k, MAX_M))
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
    x, weight, bias = inputs(normal, dtype, (24, 264, 9))
    sums = run(device, x, weight, out_dtype=float32)
    biased = run(device, x, weight, bias, float32)
    np.testing.assert_array_equal(biased, sums + bias.astype(np.float32))
    np.testing.assert_array_equal(run(device, x, weight, bias), biased.astype(dtype))
    assert (biased.astype(dtype) != sums.astype(dtype) + bias).any()  # two roundings would be seen


INVARIANT = [(bfloat16, (21, 296)), (bfloat16, (37, 1160)), (float16, (18, 2200)), (float32, (6, 700))]
INVARIANT_LARGE = [(bfloat16, (4100, 1160)), (bfloat16, (3208, 4096)), (float16, (12800, 2048)), (float32, (4100, 900))]


def test_a_row_depends_on_nothing_but_itself(device):
    for dtype, (n, k) in shapes(device, INVARIANT, INVARIANT_LARGE):
        x, weight, bias = inputs(normal, dtype, (n, k, MAX_M))
        whole = run(device, x, weight, bias, float32)
        for m in (1, 5, 8, 9, 16, 17, 32, 33):
            np.testing.assert_array_equal(run(device, x[:m], weight, bias, float32), whole[:m], err_msg=f"{n} {k} {m}")
        order = np.random.default_rng(0).permutation(MAX_M)
        np.testing.assert_array_equal(run(device, x[order], weight, bias, float32), whole[order])
        # Another order of the sum would be seen: not all sums are exact.
        assert (whole != x.astype(np.float64) @ weight.astype(np.float64).T + bias.astype(np.float64)).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
def test_what_is_not_finite_stays_in_its_row_and_column(device, dtype):
    for m in (7, 12):
        x, weight, _ = inputs(integers, dtype, (21, 520, m))
        clean = linear(x, weight)
        x[m - 1, 519 - 3], x[2, 0], weight[20, 517], weight[4, 1] = np.nan, np.inf, np.nan, -np.inf
        x[2, 1] = 1
        got = run(device, x, weight)
        affected = np.zeros(got.shape, bool)
        affected[[m - 1, 2]] = True
        affected[:, [20, 4]] = True
        assert not np.isfinite(got[affected].astype(np.float32)).any()
        np.testing.assert_array_equal(got[~affected], clean[~affected])


@pytest.mark.parametrize("dtype, m", [(bfloat16, 1), (bfloat16, 6), (bfloat16, 13), (float32, 9)], ids=str)
def test_rows_apart(device, dtype, m):
    n, k = 21, 600 - 16 // dtype.itemsize
    x, weight, _ = inputs(integers, dtype, (n, k, m))
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
    x, weight, bias = inputs(normal, dtype, (21, 1160, 11))
    np.testing.assert_array_equal(run(device, x, weight, bias, pdl=True), run(device, x, weight, bias))


@pytest.mark.parametrize("dtype", [bfloat16, float32], ids=case_id)
def test_order_of_threads_does_not_matter(device, dtype):
    if not device.emulated:
        pytest.skip("a GPU takes no orders")
    from tests.emulation.emulator import EmulatorBackend

    x, weight, bias = inputs(normal, dtype, (21, 1160, 11))
    results = []
    for seed in range(6):
        with use_backend(EmulatorBackend(order_seed=seed)):
            results.append(run(device, x, weight, bias, float32))
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


def test_bad_arguments(device):
    def array(*shape, dtype=bfloat16):
        return np.ones(shape, dtype)

    def refused(message, x, weight, bias=None, out=None, **kwargs):
        out = array(x.shape[0], weight.shape[0]) if out is None else out
        with pytest.raises(ConfigError, match=message):
            skinny_gemm(x, weight, bias, out=out, **kwargs)

    refused("x has dtype int32", array(2, 16, dtype=np.int32), array(8, 16))
    refused("x has shape", array(16), array(8, 16), out=array(1, 8))
    refused("weight has shape", array(2, 16), array(16))
    refused("weight has shape", array(2, 16), array(8, 24))
    refused("weight has dtype", array(2, 16), array(8, 16, dtype=float16))
    refused("weight .*not contiguous", array(2, 16), array(8, 32)[:, :16])
    refused("bias has shape", array(2, 16), array(8, 16), array(9))
    refused("bias has dtype", array(2, 16), array(8, 16), array(8, dtype=float32))
    refused("bias .*not contiguous", array(2, 16), array(8, 16), array(16)[::2])
    refused("out has shape", array(2, 16), array(8, 16), out=array(8, 2))
    refused("out has dtype", array(2, 16), array(8, 16), out=array(2, 8, dtype=float16))
    refused("out .*rows that are not contiguous", array(2, 16), array(8, 16), out=array(2, 16)[:, ::2])
    refused("out .*rows -16 bytes apart", array(2, 16), array(8, 16), out=array(2, 8)[::-1])
    refused("x has 65 rows, more than 64", array(65, 16), array(8, 16))
    refused("x .*rows that are not contiguous", array(2, 32)[:, ::2], array(8, 16))
    refused("x .*rows 40 bytes apart", array(2, 20)[:, :16], array(8, 16))
    refused("x .*rows 0 bytes apart", np.broadcast_to(array(16), (2, 16)), array(8, 16))
    refused("rows of 12 bfloat16 .*multiple of 8", array(2, 12), array(8, 12))
    refused("rows of 0 bfloat16", array(2, 0), array(8, 0))
    refused("rows of 6 float32 .*multiple of 4", array(2, 6, dtype=float32), array(8, 6, dtype=float32),
            out=array(2, 8, dtype=float32))


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
