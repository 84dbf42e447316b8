"""stream_gemm.cu against ops/linear.py and ops/activation.py, in the emulation and on a GPU."""

from functools import partial
from itertools import product

import numpy as np
import pytest

from cutp.array.kernel_source import read_source
from cutp.errors import ConfigError, UnsupportedModelError
from cutp.ops.activation_cuda import gated_activation
from cutp.ops.linear import linear
from cutp.ops.stream_gemm_cuda import (
    GATED_MAX_M,
    LEAST_BYTES,
    MAX_M,
    RING_BYTES,
    WIDE_MAX_M,
    max_rows,
    plan,
    plan_of_rows,
    splits_of,
    stream_gemm,
    stream_gemm_gated,
)
from tests.ops import linear_checks
from tests.ops.kernel_results import assert_same_bits, bfloat16, emulated_only, float16, float32, in_every_order
from tests.ops.linear_checks import case_id, inputs, integers, normal, ones

DTYPES = [bfloat16, float16]

# N, K, M and rows of a piece: all numbers of columns, groups and splits, tails of N (in a piece, in 8 rows) and K (in
# a stage), several pieces of a block, rings that go round.
CASES = [(16, 64, 1, 16), (37, 1024, 5, 16), (40, 320, 8, 40), (1, 64, 1, 8), (70, 192, 9, 64), (130, 128, 16, 72),
         (129, 64, 17, 128), (25, 512, 33, 24), (90, 256, 64, 96), (201, 64, 3, 200), (250, 64, 20, 136),
         (257, 128, 64, 192), (24, 320, 65, 24), (90, 192, 96, 96), (260, 64, 80, 200), (40, 576, 20, 16),
         (72, 320, 41, 72)]
# More rows of x than there may be but with one sum a result.
WIDE_CASES = [(140, 128, 97, 136), (260, 192, 128, 200)]
# F, K, M, rows of a piece, splits.
GATED_CASES = [(16, 64, 1, 16, 4), (21, 1024, 7, 24, 4), (70, 128, 12, 64, 2), (70, 192, 16, 72, 1),
               (130, 192, 3, 128, 1)]
# What models have, too large for the emulation: N, K, M.
LARGE = [*linear_checks.LARGE, (28672, 4096, 1), (28672, 4096, 64), (3072, 4096, 2), (33000, 2048, 32),
         (4095, 3584, 64), (28672, 4096, 96), (28672, 4096, 128), (24576, 1024, 97), (4096, 14336, 81),
         (6144, 1024, 65)]


def run(device, x, weight, bias=None, out_dtype=None, **options):
    out = device.poisoned((x.shape[0], weight.shape[0]), out_dtype or x.dtype)
    stream_gemm(device.array(x), device.array(weight), None if bias is None else device.array(bias), out=out, **options)
    return device.numpy(out)


def run_gated(device, x, weight, bias=None, name="silu", **options):
    out = device.poisoned((x.shape[0], weight.shape[0] // 2), x.dtype)
    stream_gemm_gated(device.array(x), device.array(weight), name, None if bias is None else device.array(bias),
                      out=out, **options)
    return device.numpy(out)


def plan_for(n, k, m, rows, **options):
    """`plan_of_rows` with as many splits as the rows need groups."""
    return plan_of_rows(n, k, m, rows, **({"splits": 4 if rows <= 64 else 2 if rows <= 128 else 1} | options))


def few_blocks(chosen, blocks):
    """The same with fewer blocks, which have several pieces each."""
    return chosen.__class__(**{**vars(chosen), "grid": min(blocks, chosen.grid)})


@pytest.mark.parametrize("case", [*CASES, *WIDE_CASES], ids=case_id)
def test_exact_sums(device, case):
    n, k, m, rows = case
    x, weight, bias = inputs(integers, bfloat16, n, k, m)
    unrounded = x.astype(np.float32) @ weight.astype(np.float32).T
    # Rounded or not, the reference is exact as well.
    chosen = plan_for(n, k, m, rows)
    np.testing.assert_array_equal(run(device, x, weight, bias, chosen=chosen if m > MAX_M else None),
                                  linear(x, weight, bias))
    np.testing.assert_array_equal(run(device, x, weight, out_dtype=float32, chosen=chosen), unrounded)
    # Two stages of one panel, and two blocks: the ring goes round within and between pieces.
    chosen = few_blocks(plan_for(n, k, m, rows, stage_bytes=0, ring_bytes=1), 2)
    assert chosen.stages == 2 and chosen.panels == 1
    np.testing.assert_array_equal(run(device, x, weight, out_dtype=float32, chosen=chosen), unrounded)


def activated(device, gate_up, name, limit):
    """What the kernel of its own makes of gate_up, whose halves are made longer to a multiple of 16 bytes."""
    columns = gate_up.shape[1] // 2
    padding = ((0, 0), (0, -columns % 8))
    halves = np.concatenate([np.pad(half, padding) for half in np.hsplit(gate_up, 2)], axis=1)
    out = device.poisoned((halves.shape[0], halves.shape[1] // 2), gate_up.dtype)
    gated_activation(device.array(halves), name, limit=limit, out=out)
    return device.numpy(out)[:, :columns]


@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
@pytest.mark.parametrize("case", GATED_CASES, ids=case_id)
def test_gated_is_the_product_and_then_the_activation(device, case, dtype):
    n, k, m, rows, splits = case
    x, weight, bias = inputs(normal, dtype, 2 * n, k, m)
    x = (x.astype(np.float32) * 2 / np.sqrt(k)).astype(dtype)
    whole = plan_of_rows(2 * n, k, m, 40, splits=splits)
    gate_up = run(device, x, weight, bias, chosen=whole)
    plans = [plan_of_rows(n, k, m, rows, gated=True, splits=splits),
             few_blocks(plan_of_rows(n, k, m, rows, gated=True, splits=splits, stage_bytes=0, ring_bytes=1), 2)]
    for name, limit, chosen in (("silu", None, plans[0]), ("gelu_tanh", None, plans[1]), ("silu", 0.75, plans[1])):
        got = run_gated(device, x, weight, bias, name, limit=limit, chosen=chosen)
        assert_same_bits(got, activated(device, gate_up, name, limit))
    # Without bias, and a limit that is felt.
    gate_up = run(device, x, weight, chosen=whole)
    got = run_gated(device, x, weight, chosen=plans[0])
    assert_same_bits(got, activated(device, gate_up, "silu", None))
    assert (got != activated(device, gate_up, "silu", 0.75)).any()


def test_gated_of_any_shape_is_the_product_and_then_the_activation(device):
    for n, k, m in [(24, 128, 3)] if device.emulated else [(14336, 4096, 1), (7168, 2048, 16), (1184, 512, 8)]:
        x, weight, _ = inputs(normal, bfloat16, 2 * n, k, m)
        gate_up = run(device, x, weight)
        assert_same_bits(run_gated(device, x, weight), activated(device, gate_up, "silu", None))


@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
def test_equals_float64_up_to_one_rounding(device, dtype):
    large = LARGE[: None if dtype == bfloat16 else 3]
    for shape in [(21, 1024, 6), (19, 576, 13)] if device.emulated else large:
        linear_checks.check_equals_float64_up_to_one_rounding(partial(run, device), dtype, shape, 2e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
def test_one_rounding_after_the_bias(device, dtype):
    linear_checks.check_one_rounding_after_the_bias(partial(run, device), dtype, (24, 256, 9))


def test_a_row_depends_on_nothing_but_itself(device):
    small, large = [(bfloat16, 21, 320), (float16, 70, 512)], [(bfloat16, 4100, 1152), (bfloat16, 3208, 4096),
                                                               (float16, 28672, 4096)]
    for dtype, n, k in small if device.emulated else [*small, *large]:
        linear_checks.check_a_row_depends_on_nothing_but_itself(partial(run, device), dtype, n, k, max_rows(n))


def test_every_plan_gives_the_same_bits(device):
    n, k = 200, 320
    x, weight, _ = inputs(normal, bfloat16, n, k, 33)
    results = []
    for splits, others in ((4, ((48, 3, {"stage_bytes": 0}), (8, 20, {}), (64, 9, {"ring_bytes": 1}))),
                           (2, ((80, 12, {"stage_bytes": 1 << 17}), (128, 33, {"ring_bytes": 1}))),
                           (1, ((136, 12, {}), (200, 20, {"ring_bytes": 1}), (40, 1, {})))):
        expected = run(device, x, weight, out_dtype=float32, chosen=plan_of_rows(n, k, 33, 24, splits=splits))
        for rows, m, options in others:
            chosen = few_blocks(plan_of_rows(n, k, m, rows, splits=splits, **options), 3)
            got = run(device, x[:m], weight, out_dtype=float32, chosen=chosen)
            np.testing.assert_array_equal(got, expected[:m], err_msg=str(chosen))
        results.append(expected)
    # Another number of sums is seen.
    assert (results[0] != results[1]).any() and (results[1] != results[2]).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
def test_what_is_not_finite_stays_in_its_row_and_column(device, dtype):
    linear_checks.check_what_is_not_finite_stays_in_its_row_and_column(partial(run, device), dtype, 576)


def test_limits_on_all_sides(device):
    # Row r of the gates is r - 5 times the sum of x, and of the ups as well, in another order.
    factors = np.arange(-5, 6, dtype=np.float32)
    weight = np.zeros((22, 64), np.float32)
    weight[:11, 0], weight[11:, 0] = factors, factors[::-1]
    x = np.zeros((2, 64), bfloat16)
    x[:, 0] = 1, 0.5
    gate_up = (x.astype(np.float32) @ weight.T).astype(bfloat16)
    got = run_gated(device, x, weight.astype(bfloat16), limit=2.0).astype(np.float32)
    assert_same_bits(got.astype(bfloat16), activated(device, gate_up, "silu", 2.0))
    # A gate is bounded above alone, an up on both sides: silu(2) * -2, silu(-5) * 2.
    np.testing.assert_allclose(got[0, [10, 0]], [2 / (1 + np.exp(-2)) * -2, -5 / (1 + np.exp(5)) * 2], rtol=0.02)


def test_a_gate_of_nan_is_not_clamped(device):
    x, weight = np.ones((1, 64), bfloat16), np.ones((32, 64), bfloat16)
    weight[3], weight[20] = np.nan, np.nan
    got = run_gated(device, x, weight, limit=2.0).astype(np.float32)
    assert np.isnan(got[0, [3, 4]]).all() and np.isnan(got).sum() == 2


@pytest.mark.parametrize("m", [1, 6, 13])
def test_rows_apart(device, m):
    n, k = 21, 576
    x, weight, _ = inputs(integers, bfloat16, n, k, m)
    padded = np.full((m, k + 40), np.nan, bfloat16)
    padded[:, :k] = x
    for write, columns in ((stream_gemm, n), (stream_gemm_gated, n // 2)):
        w, out = weight[: n // columns * columns], device.poisoned((m, columns + 3), bfloat16)
        write(device.array(padded)[:, :k], device.array(w), *(["silu"] if write is stream_gemm_gated else []),
              out=out[:, 1:-2])
        got = device.numpy(out)
        expected = run(device, x, w) if write is stream_gemm else run_gated(device, x, w)
        np.testing.assert_array_equal(got[:, 1:-2], expected)
        assert np.isnan(got[:, [0, -2, -1]].astype(np.float32)).all()


def test_nothing_to_do(device):
    for m, n in ((0, 6), (3, 0)):
        x, weight = np.ones((m, 64), bfloat16), np.ones((n, 64), bfloat16)
        assert run(device, x, weight).shape == (m, n)
        assert run_gated(device, x, weight).shape == (m, n // 2)


def test_programmatic_launch(device):
    # The emulation refuses activations that are touched before the wait.
    x, weight, bias = inputs(normal, bfloat16, 42, 1152, 11)
    chosen = plan_of_rows(42, 1152, 11, 24, ring_bytes=24 << 10)
    np.testing.assert_array_equal(run(device, x, weight, bias, pdl=True, chosen=chosen), run(device, x, weight, bias))
    chosen = few_blocks(plan_of_rows(21, 1152, 11, 8, gated=True, ring_bytes=24 << 10), 1)
    np.testing.assert_array_equal(run_gated(device, x, weight, bias, pdl=True, chosen=chosen),
                                  run_gated(device, x, weight, bias))


@emulated_only
def test_order_of_threads_does_not_matter(device):
    x, weight, bias = inputs(normal, bfloat16, 21, 512, 11)
    chosen = few_blocks(plan_of_rows(21, 512, 11, 8, stage_bytes=0, ring_bytes=10 << 10), 2)
    in_every_order(lambda: [run(device, x, weight, bias, float32, chosen=chosen)])


@emulated_only
def test_bad_arguments(device):
    linear_checks.check_bad_arguments(stream_gemm, MAX_M)
    refused = partial(linear_checks.check_refused, stream_gemm)
    refused("x has dtype float32", ones(2, 16, dtype=float32), ones(8, 16))
    refused("multiple of 64 elements", ones(2, 96), ones(8, 96))
    refused("multiple of 64 elements", ones(2, 0), ones(8, 0))

    def gated_refused(message, name="silu", weight=None, out=None, error=ConfigError):
        with pytest.raises(error, match=message):
            stream_gemm_gated(ones(2, 16), ones(8, 16) if weight is None else weight, name,
                              out=ones(2, 4) if out is None else out)

    with pytest.raises(ConfigError, match="x has 17 rows, more than 16"):
        stream_gemm_gated(ones(17, 64), ones(8, 64), "silu", out=ones(17, 4))
    gated_refused("stream_gemm_gated: activation relu is not one of silu, gelu_tanh", "relu")
    gated_refused("mish", "mish", error=UnsupportedModelError)
    gated_refused("stream_gemm_gated: weight has shape", weight=ones(9, 16))
    gated_refused("out has dtype float32", out=ones(2, 4, dtype=float32))


# ---- the plan

SIZES = [1, 8, 40, 768, 1024, 1056, 1280, 2048, 3072, 3200, 4096, 4224, 6144, 12672, 14336, 28672, 57344, 128256]
LENGTHS = [64, 512, 576, 896, 1792, 2048, 4096, 14336, 28672]


MS = (1, 8, 9, 16, 17, 24, 32, 33, 40, 48, 64, 65, 80, 96, 97, 112, 128)


def plans():
    for gated, n, k, m in product((False, True), SIZES, LENGTHS, MS):
        if m <= (GATED_MAX_M if gated else max_rows(n)):
            yield gated, n, k, m, plan(n, k, m, gated=gated)


def test_every_plan_is_declared_and_every_variant_planned():
    used = {(p.columns, p.groups, p.splits, gated) for gated, *_, p in plans()}
    declared = set()
    for defines in read_source("stream_gemm.cu").variants["sm_90a"]:
        of = dict(d.split("=") for d in defines if "=" in d)
        declared.add((int(of["COLUMNS"]), int(of["GROUPS"]), int(of["SPLITS"]), "GATED" in defines))
    assert used == declared


def test_plans_fit():
    for gated, n, k, m, p in plans():
        parts = 2 if gated else 1
        assert p.columns >= p.x_rows >= m > p.x_rows - 8 and p.rows % 8 == p.x_rows % 8 == 0 and p.rows * parts <= 256
        assert p.groups // parts * 64 >= p.rows
        pieces = -(-n // p.rows)
        steps = -(-pieces // p.grid) * -(-k // (64 * p.panels))
        assert p.grid <= min(132, pieces) and p.stages >= max(2, min(3, steps)) and p.panels in (1, 2, 4, 8)
        # No block without a piece, and no block with two more than another.
        assert p.grid * -(-pieces // p.grid) - pieces < p.grid
        # A multiprocessor has 228 KB, of which the system takes one for each block: one fits, beside small kernels.
        assert p.shared_bytes <= RING_BYTES and 2 * (p.shared_bytes + 1024) > 228 * 1024
        # What the operands of the last stage reach into exists, before the barriers.
        stage = p.panels * (parts * p.rows + p.x_rows) * 128
        last_panel = (p.stages - 1) * stage + (p.panels - 1) * parts * p.rows * 128
        reach = last_panel + ((parts - 1) * p.rows + p.groups // parts * 64) * 128
        reach = max(reach, p.stages * stage + (p.columns - p.x_rows) * 128)
        exchange = 0 if p.groups > parts else min(p.columns // 2, 8) * 4 * 128
        needed = max(reach, p.stages * stage) + exchange + 16 * p.stages
        assert p.shared_bytes == max(needed, LEAST_BYTES)


def test_the_sums_do_not_depend_on_m_nor_on_the_activation():
    for n in (*SIZES, *range(8, 60000, 1000)):
        splits = splits_of(2 * n)
        for m in MS:
            assert plan(2 * n, 4096, m).splits == splits
            assert m > GATED_MAX_M or plan(n, 4096, m, gated=True).splits == splits


def test_which_weights_may_have_more_rows_of_x():
    assert {n: max_rows(n) for n in (4096, 6144, 16384, 18944, 28672, 128256)} == \
        {4096: MAX_M, 6144: MAX_M, 16384: MAX_M, 18944: WIDE_MAX_M, 28672: WIDE_MAX_M, 128256: WIDE_MAX_M}


def test_small_batches_use_most_multiprocessors():
    for n in range(1024, 60000, 1024):
        for gated in (False, True):
            p = plan(n, 4096, 1, gated=gated)
            pieces = -(-n // p.rows)
            assert n / (p.rows * -(-pieces // p.grid) * 132) > 0.85, (n, p)
