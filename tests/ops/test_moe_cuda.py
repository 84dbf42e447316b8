"""moe.cu against ops/moe.py, in the emulation and on a GPU."""

import numpy as np
import pytest

from cutp.array.kernel import use_backend
from cutp.errors import ConfigError
from cutp.ops import moe
from cutp.ops.moe_cuda import combine_experts, expert_rows
from tests.ops.kernel_results import (
    DTYPES,
    ORDER_SEEDS,
    assert_same_bits,
    bfloat16,
    emulated_only,
    float16,
    gpu_only,
    random_values,
)


def chosen(seed, tokens, count, top_k):
    """Different experts for each token, at random."""
    rng = np.random.default_rng(seed)
    return np.argsort(rng.random((tokens, count)), axis=1)[:, :top_k].astype(np.int32)


# ---- rows


def run_rows(device, experts, first, count, pdl=False):
    tokens, positions = device.poisoned((experts.size,), np.int32), device.poisoned(experts.shape, np.int32)
    offsets = device.poisoned((count + 1,), np.int32)
    expert_rows(device.array(experts), first, count, tokens=tokens, offsets=offsets, positions=positions, pdl=pdl)
    return moe.ExpertRows(*(device.numpy(a) for a in (tokens, offsets, positions)))


def assert_rows(got, experts, first, count):
    expected = moe.expert_rows(experts, first, count)
    np.testing.assert_array_equal(got.offsets, expected.offsets)
    np.testing.assert_array_equal(got.positions, expected.positions)
    rows = got.offsets[-1]
    np.testing.assert_array_equal(got.tokens[:rows], expected.tokens)
    assert (got.tokens[rows:] == np.iinfo(np.int32).max).all()  # left alone


# Tokens, experts, chosen; few slots, a broken group of four, more than a warp, a block and a round of the block take.
@pytest.mark.parametrize("tokens, count, top_k", [
    (0, 8, 2), (1, 1, 1), (1, 160, 6), (3, 5, 1), (5, 3, 3), (43, 8, 3), (64, 40, 8), (50, 160, 6), (345, 4, 2),
    (500, 16, 5), (1030, 3, 2), (2400, 2, 2)])
def test_rows_of_all_and_of_some_experts(device, tokens, count, top_k):
    experts = chosen(tokens, tokens, count, top_k)
    for first, own in ((0, count), (count // 3, count // 2), (count - 1, 1), (count // 2, 0)):
        assert_rows(run_rows(device, experts, first, own), experts, first, own)


def test_one_expert_has_all_rows_or_none(device):
    for expert in (0, 3, 6):
        experts = np.full((300, 1), expert, np.int32)
        assert_rows(run_rows(device, experts, 0, 7), experts, 0, 7)
        assert_rows(run_rows(device, experts, 3, 2), experts, 3, 2)


def test_slots_without_an_expert(device):
    experts = chosen(1, 70, 12, 3)
    experts[[0, 5, 6, 69]] = -1
    experts[9, 1] = np.iinfo(np.int32).min
    experts[10, 2] = np.iinfo(np.int32).max
    for first, count in ((0, 12), (5, 4), (1, 11)):
        assert_rows(run_rows(device, experts, first, count), experts, first, count)
    nothing = np.full((9, 2), -1, np.int32)
    assert_rows(run_rows(device, nothing, 0, 4), nothing, 0, 4)


def test_random_rows(device):
    rng = np.random.default_rng(2)
    for seed in range(12):
        count, tokens = int(rng.integers(1, 40)), int(rng.integers(0, 90))
        top_k = int(rng.integers(1, min(count, 8) + 1))
        experts = chosen(seed, tokens, count, top_k)
        first = int(rng.integers(0, count))
        own = int(rng.integers(0, count - first + 1))
        assert_rows(run_rows(device, experts, first, own), experts, first, own)


def test_order_of_threads_and_programmatic_launch(device):
    experts = chosen(3, 150, 4, 2)
    assert_rows(run_rows(device, experts, 1, 2, pdl=True), experts, 1, 2)
    if device.emulated:
        from tests.emulation.emulator import EmulatorBackend

        for seed in ORDER_SEEDS:
            with use_backend(EmulatorBackend(order_seed=seed)):
                assert_rows(run_rows(device, experts, 1, 2), experts, 1, 2)


@gpu_only
def test_many_rows(device):
    for tokens, count, top_k in ((8192, 128, 8), (4099, 256, 8), (30000, 8, 2)):
        experts = chosen(4, tokens, count, top_k)
        assert_rows(run_rows(device, experts, 0, count), experts, 0, count)
        assert_rows(run_rows(device, experts, count // 4, count // 4), experts, count // 4, count // 4)


@emulated_only
def test_bad_arguments_of_rows(device):
    def refused(message, experts=None, first=0, count=4, **arrays):
        experts = np.zeros((3, 2), np.int32) if experts is None else experts
        given = {"tokens": np.zeros(6, np.int32), "offsets": np.zeros(5, np.int32),
                 "positions": np.zeros((3, 2), np.int32)}
        with pytest.raises(ConfigError, match=message):
            expert_rows(experts, first, count, **given | arrays)

    refused("experts has shape", experts=np.zeros(6, np.int32))
    refused("experts has dtype int64", experts=np.zeros((3, 2), np.int64))
    refused("experts .*not contiguous", experts=np.zeros((3, 4), np.int32)[:, ::2])
    refused("no experts -1 .. 2", first=-1)
    refused("no experts 0 .. -2", count=-1)
    refused("tokens has shape", tokens=np.zeros(5, np.int32))
    refused("tokens has dtype", tokens=np.zeros(6, np.uint32))
    refused("offsets has shape", offsets=np.zeros(4, np.int32))
    refused("offsets has dtype int64", offsets=np.zeros(5, np.int64))
    refused("positions has shape", positions=np.zeros((2, 3), np.int32))
    refused("positions .*not contiguous", positions=np.zeros((3, 4), np.int32)[:, ::2])


# ---- the sum


def run_sum(device, y, positions, weights, pdl=False):
    out = device.poisoned((len(positions), y.shape[1]), y.dtype)
    combine_experts(device.array(y), device.array(positions), device.array(weights), out=out, pdl=pdl)
    return device.numpy(out)


def sum_inputs(seed, dtype, tokens, count, top_k, dim):
    """Rows with what nobody may use behind them: a third of the experts is elsewhere."""
    positions = moe.expert_rows(chosen(seed, tokens, count, top_k), 0, count - count // 3).positions
    y = random_values(seed, (positions.size, dim), dtype, spread=1)
    y[positions.max(initial=-1) + 1 :] = np.nan
    weights = np.random.default_rng(seed).standard_normal(positions.shape).astype(np.float32)
    weights[positions < 0] = np.nan
    return y, positions, weights


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name)
@pytest.mark.parametrize("tokens, count, top_k, dim", [
    (0, 4, 2, 64), (1, 1, 1, 8), (7, 6, 2, 40), (5, 9, 4, 264), (4, 16, 5, 2056), (6, 40, 9, 16), (3, 64, 32, 48)])
def test_sums(device, dtype, tokens, count, top_k, dim):
    y, positions, weights = sum_inputs(dim, dtype, tokens, count, top_k, dim)
    assert_same_bits(run_sum(device, y, positions, weights), moe.combine_experts(y, positions, weights))


def test_a_token_without_rows_is_zero(device):
    y, weights = np.full((6, 32), np.nan, bfloat16), np.full((3, 2), np.nan, np.float32)
    got = run_sum(device, y, np.full((3, 2), -1, np.int32), weights)
    assert_same_bits(got, np.zeros((3, 32), bfloat16))


def test_the_order_of_slots_decides(device):
    # 2^24 + 1 - 2^24: 0 from left to right, as 2^24 + 1 is no float32; 1 in any order that adds the large ones first.
    y = np.repeat(np.array([[2.0**24], [1.0], [-(2.0**24)]], np.float32), 4, axis=1)
    ones = np.ones((3, 3), np.float32)
    positions = np.array([[0, 1, 2], [0, 2, 1], [1, 0, 2]], np.int32)
    np.testing.assert_array_equal(run_sum(device, y, positions, ones)[:, 0], [0, 1, 0])


def test_products_are_rounded_before_they_are_added(device):
    # (1 + 2^-12)^2 = 1 + 2^-11 + 2^-24: the last bit is lost in the product, and seen if it is not.
    a = np.float32(1 + 2.0**-12)
    y = np.array([[-1.0], [a]], np.float32).repeat(4, axis=1)
    got = run_sum(device, y, np.array([[0, 1]], np.int32), np.array([[1.0, a]], np.float32))
    assert (got == np.float32(2.0**-11)).all()


@pytest.mark.parametrize("dtype", [bfloat16, float16], ids=lambda d: d.name)
def test_one_rounding(device, dtype):
    y, positions, weights = sum_inputs(5, dtype, 40, 12, 4, 64)
    whole = moe.combine_experts(y.astype(np.float32), positions, weights)
    assert_same_bits(run_sum(device, y, positions, weights), whole.astype(dtype))


def test_programmatic_launch_of_the_sum(device):
    y, positions, weights = sum_inputs(6, bfloat16, 5, 8, 3, 128)
    assert_same_bits(run_sum(device, y, positions, weights, pdl=True), run_sum(device, y, positions, weights))


@emulated_only
def test_bad_arguments_of_the_sum(device):
    def refused(message, **arrays):
        given = {"y": np.zeros((6, 16), bfloat16), "positions": np.zeros((3, 2), np.int32),
                 "weights": np.zeros((3, 2), np.float32), "out": np.zeros((3, 16), bfloat16)} | arrays
        out = given.pop("out")
        with pytest.raises(ConfigError, match=message):
            combine_experts(*given.values(), out=out)

    refused("y has dtype int32", y=np.zeros((6, 16), np.int32))
    refused("y has shape", y=np.zeros(16, bfloat16))
    refused("y .*not contiguous", y=np.zeros((6, 32), bfloat16)[:, ::2])
    refused("positions has shape", positions=np.zeros(6, np.int32))
    refused("positions has dtype int64", positions=np.zeros((3, 2), np.int64))
    refused("weights has shape", weights=np.zeros((3, 3), np.float32))
    refused("weights has dtype bfloat16", weights=np.zeros((3, 2), bfloat16))
    refused("out has shape", out=np.zeros((2, 16), bfloat16))
    refused("out has dtype float32", out=np.zeros((3, 16), np.float32))
    refused("12 columns of bfloat16; .*16 bytes", y=np.zeros((6, 12), bfloat16), out=np.zeros((3, 12), bfloat16))
