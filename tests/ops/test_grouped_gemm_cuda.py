"""grouped_gemm.cu against ops/moe.py, in the emulation and on a GPU."""

from itertools import product

import ml_dtypes
import numpy as np
import pytest

from cutp.array.kernel import use_backend
from cutp.array.kernel_source import read_source
from cutp.errors import ConfigError
from cutp.ops import grouped_gemm_cuda, moe
from cutp.ops.grouped_gemm_cuda import Tile, choose_tile, grouped_linear, most_row_tiles
from tests.ops.kernel_results import DTYPES, ORDER_SEEDS, assert_same_bits, bfloat16, emulated_only, float16, float32

TILES = [Tile(16, 32, 8), Tile(16, 64, 6), Tile(64, 128, 3), Tile(128, 128, 3)]
FLOAT_TILES = [Tile(32, 64, 4)]
VARIANTS = [(dtype, tile) for dtype in (bfloat16, float16) for tile in TILES] + [(float32, t) for t in FLOAT_TILES]


def case_id(value):
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def force(monkeypatch, tile):
    monkeypatch.setattr(grouped_gemm_cuda, "choose_tile", lambda *_: tile)


def integers(rng, *shape):
    """Small integers: sums of their products are exact in float32, whatever the order."""
    return rng.integers(-8, 9, shape).astype(np.float32)


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


class Case:
    """Rows of experts: `groups` says how many each has, `spare` how many more there is room for.

    Weights of experts without rows, and rows of x that nobody takes, are NaN.
    """

    def __init__(self, make, dtype, groups, n, k, *, gathered=True, biased=True, spare=0, seed=0):
        rng = np.random.default_rng(seed)
        rows, experts = sum(groups), len(groups)
        self.offsets = np.concatenate([[0], np.cumsum(groups)]).astype(np.int32)
        self.weight = make(rng, experts, n, k).astype(dtype)
        self.weight[np.array(groups) == 0] = np.nan
        self.bias = make(rng, experts, n).astype(dtype) if biased else None
        self.tokens = None
        self.rows, self.room = rows, rows + spare
        if gathered:
            self.x = make(rng, 2 * rows + 3, k).astype(dtype)
            taken = rng.integers(0, len(self.x), rows)
            self.x[np.setdiff1d(np.arange(len(self.x)), taken)] = np.nan
            self.tokens = np.full(self.room, np.iinfo(np.int32).max, np.int32)
            self.tokens[:rows] = taken
        else:
            self.x = np.full((self.room, k), np.nan, dtype)
            self.x[:rows] = make(rng, rows, k).astype(dtype)

    def expected(self):
        tokens = np.arange(self.rows) if self.tokens is None else self.tokens[: self.rows]
        return moe.grouped_linear(self.x, self.weight, self.offsets, self.bias, tokens=tokens)

    def exact(self, magnitudes=False):
        """In float64; of the magnitudes if asked."""
        x, weight = self.taken().astype(np.float64), self.weight.astype(np.float64)
        x, weight = (np.abs(x), np.abs(weight)) if magnitudes else (x, weight)
        y = np.concatenate([x[a:b] @ w.T for a, b, w in zip(self.offsets, self.offsets[1:], weight, strict=False)])
        return y if self.bias is None or magnitudes else y + self.bias.astype(np.float64)[self.experts()]

    def taken(self):
        return self.x[: self.rows] if self.tokens is None else self.x[self.tokens[: self.rows]]

    def experts(self):
        return np.repeat(np.arange(len(self.weight)), np.diff(self.offsets))

    def run(self, device, out_dtype=None, **options):
        """The rows that there are; those that there are not must have been left alone."""
        def array(x):
            return None if x is None else device.array(x)

        out = device.poisoned((self.room, self.weight.shape[1]), out_dtype or self.x.dtype)
        grouped_linear(array(self.x), array(self.weight), array(self.offsets), array(self.bias),
                       tokens=array(self.tokens), out=out, **options)
        out = device.numpy(out)
        assert np.isnan(out[self.rows :].astype(np.float32)).all()
        return out[: self.rows]


# Rows of each expert, N, K: tails of every tile in every direction, empty experts first, last and in a row.
SHAPES = [([5], 40, 8), ([0, 3, 0, 0, 1, 17, 0], 37, 72), ([16, 0, 33], 130, 520), ([0, 70, 129, 2], 129, 40),
          ([1] * 40, 33, 24), ([0] * 70 + [4] + [0] * 89, 65, 136), ([135], 300, 16)]


@pytest.mark.parametrize("dtype, tile", VARIANTS, ids=case_id)
def test_exact_sums(device, monkeypatch, dtype, tile):
    force(monkeypatch, tile)
    for i, (groups, n, k) in enumerate(SHAPES[:4] if dtype == float16 else SHAPES):
        case = Case(integers, dtype, groups, n, k, gathered=i % 2 == 0, biased=i % 3 != 0, spare=i % 4, seed=i)
        assert_same_bits(case.run(device), case.expected())
        if i < 4:
            np.testing.assert_array_equal(case.run(device, float32), case.exact(), err_msg=f"{groups} {n} {k}")


def test_random_shapes(device):
    rng = np.random.default_rng(1)
    for seed in range(12):
        dtype = DTYPES[seed % 3]
        experts = int(rng.integers(1, (160, 9, 40)[seed % 3]))
        groups = rng.multinomial(int(rng.integers(0, 60)), rng.dirichlet(np.full(experts, 0.3)))
        n, k = int(rng.integers(1, 150)), (16 // dtype.itemsize) * int(rng.integers(1, 40))
        case = Case(integers, dtype, list(groups), n, k, gathered=rng.random() < 0.5, biased=rng.random() < 0.5,
                    spare=int(rng.integers(0, 30)), seed=seed)
        assert_same_bits(case.run(device), case.expected())


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name)
def test_equals_float64_up_to_one_rounding(device, dtype):
    shapes = [([3, 0, 20], 70, 1000), ([1, 1, 2, 0], 33, 2056)]
    if not device.emulated:
        shapes += [([2, 0, 1, 1, 9, 0, 0, 3], 14336, 4096), ([300, 0, 77, 500], 1536, 2048), ([1] * 128, 768, 2048)]
    for groups, n, k in shapes:
        case = Case(normal, dtype, groups, n, k)
        exact = case.exact()
        slack = 4e-6 * case.exact(magnitudes=True)  # tensor cores cut bits off in every addition
        # The bias is added in float32.
        slack += np.abs(exact) * 2.0**-23
        assert (np.abs(case.run(device, float32) - exact) <= slack).all(), (groups, n, k)
        rounding = float(ml_dtypes.finfo(dtype).eps) / 2 * np.abs(exact)
        assert (np.abs(case.run(device).astype(np.float64) - exact) <= 1.001 * (rounding + slack)).all(), (groups, n, k)


@pytest.mark.parametrize("dtype", [bfloat16, float16], ids=lambda d: d.name)
def test_every_tile_gives_the_same_bits(device, monkeypatch, dtype):
    for groups, n, k in (([20, 0, 1, 70], 136, 520), ([2, 130], 41, 264)):
        case = Case(normal, dtype, groups, n, k)
        results = []
        for tile in TILES:
            force(monkeypatch, tile)
            results.append(case.run(device, float32))
        for result in results[1:]:
            np.testing.assert_array_equal(result, results[0])
        # Another order of the sum would be seen: not all sums are exact.
        assert (results[0] != case.exact()).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name)
def test_a_row_depends_on_nothing_but_itself(device, monkeypatch, dtype):
    case = Case(normal, dtype, [18, 0, 3, 80], 72, 520)
    for tile in FLOAT_TILES if dtype == float32 else [None, TILES[2]]:
        if tile is not None:
            force(monkeypatch, tile)
        whole, experts = case.run(device, float32), case.experts()
        order = np.random.default_rng(2).permutation(case.rows)
        for rows in ([0], [17, 18, 99], order[:40], order):
            rows = np.sort(rows) if len(rows) < 40 else rows[np.argsort(experts[rows], kind="stable")]
            part = Case(normal, dtype, [18, 0, 3, 80], 72, 520)
            part.tokens, part.rows, part.room = part.tokens[rows], len(rows), len(rows)
            part.offsets = np.searchsorted(experts[rows], np.arange(5)).astype(np.int32)
            np.testing.assert_array_equal(part.run(device, float32), whole[rows])


@pytest.mark.parametrize("dtype", [bfloat16, float16], ids=lambda d: d.name)
def test_one_rounding_after_the_bias(device, dtype):
    biased = Case(normal, dtype, [9, 0, 15], 48, 264)
    plain = Case(normal, dtype, [9, 0, 15], 48, 264)
    plain.bias = None
    sums, whole = plain.run(device, float32), biased.run(device, float32)
    bias = biased.bias[biased.experts()]
    np.testing.assert_array_equal(whole, sums + bias.astype(np.float32))
    assert_same_bits(biased.run(device), whole.astype(dtype))
    assert (whole.astype(dtype) != sums.astype(dtype) + bias).any()  # two roundings would be seen


@pytest.mark.parametrize("dtype, tile", VARIANTS, ids=case_id)
def test_what_is_not_finite_stays_in_its_row_and_column(device, monkeypatch, dtype, tile):
    force(monkeypatch, tile)
    case = Case(integers, dtype, [20, 3], 70, 136, gathered=False, biased=False)
    clean = case.expected().astype(np.float32)
    case.x[4, 133], case.x[21, 0] = np.nan, np.inf
    case.weight[0, 69, 0], case.weight[1, 8, 135] = np.nan, -np.inf
    got, affected = case.run(device).astype(np.float32), np.zeros(clean.shape, bool)
    affected[[4, 21]] = affected[:20, 69] = affected[20:, 8] = True
    assert not np.isfinite(got[affected]).any()
    np.testing.assert_array_equal(got[~affected], clean[~affected])


@pytest.mark.parametrize("dtype, tile", VARIANTS, ids=case_id)
def test_order_of_threads_and_programmatic_launch(device, monkeypatch, dtype, tile):
    force(monkeypatch, tile)
    case = Case(normal, dtype, [3, 0, 21], 40, 776)
    expected = case.run(device)
    assert_same_bits(case.run(device, pdl=True), expected)
    if device.emulated:
        from tests.emulation.emulator import EmulatorBackend

        for seed in ORDER_SEEDS:
            with use_backend(EmulatorBackend(order_seed=seed)):
                assert_same_bits(case.run(device), expected)


def test_nothing_to_do(device):
    for groups, n in (([0, 0, 0], 16), ([0, 2], 0)):
        for spare in (0, 3):
            assert Case(integers, bfloat16, groups, n, 16, spare=spare).run(device).shape == (sum(groups), n)
    out = device.poisoned((4, 8), bfloat16)
    x, weight = device.array(np.ones((4, 16), bfloat16)), device.array(np.ones((0, 8, 16), bfloat16))
    grouped_linear(x, weight, device.array(np.zeros(1, np.int32)), out=out)
    assert np.isnan(device.numpy(out).astype(np.float32)).all()


def test_the_layer(device):
    """Routing to combination, as a layer of a model calls them, on all experts and on the halves of them."""
    from cutp.ops.activation_cuda import gated_activation
    from cutp.ops.moe_cuda import combine_experts, expert_rows
    from cutp.ops.moe_routing_cuda import route_softmax

    rng, (tokens, count, top_k, dim, width) = np.random.default_rng(3), (13, 6, 2, 64, 40)
    x, logits = normal(rng, tokens, dim).astype(bfloat16), normal(rng, tokens, count).astype(bfloat16)
    gate_up = (normal(rng, count, 2 * width, dim) / 8).astype(bfloat16)
    down = (normal(rng, count, dim, width) / 6).astype(bfloat16)

    def layer(first, own):
        experts = device.poisoned((tokens, top_k), np.int32)
        weights = device.poisoned((tokens, top_k), np.float32)
        route_softmax(device.array(logits), top_k, renormalize=True, experts=experts, weights=weights, pdl=True)
        of_row, offsets = device.poisoned((tokens * top_k,), np.int32), device.poisoned((own + 1,), np.int32)
        positions = device.poisoned((tokens, top_k), np.int32)
        expert_rows(experts, first, own, tokens=of_row, offsets=offsets, positions=positions, pdl=True)
        wide, narrow = (device.poisoned((tokens * top_k, n), bfloat16) for n in (2 * width, width))
        grouped_linear(device.array(x), device.array(gate_up[first : first + own]), offsets, tokens=of_row, out=wide,
                       pdl=True)
        gated_activation(wide, "silu", out=narrow, pdl=True)
        y, out = device.poisoned((tokens * top_k, dim), bfloat16), device.poisoned((tokens, dim), bfloat16)
        grouped_linear(narrow, device.array(down[first : first + own]), offsets, out=y, pdl=True)
        combine_experts(y, positions, weights, out=out, pdl=True)
        return device.numpy(out).astype(np.float64)

    probabilities = np.exp(logits.astype(np.float64))
    exact = np.zeros((tokens, dim))
    for t in range(tokens):
        best = np.argsort(-logits[t].astype(np.float64), kind="stable")[:top_k]
        for e in best:
            gate, up = np.split(gate_up[e].astype(np.float64) @ x[t].astype(np.float64), 2)
            y = down[e].astype(np.float64) @ (gate / (1 + np.exp(-gate)) * up)
            exact[t] += probabilities[t, e] / probabilities[t, best].sum() * y
    whole = layer(0, count)
    assert np.linalg.norm(whole - exact) <= 6e-3 * np.linalg.norm(exact)
    assert np.linalg.norm(layer(0, 4) + layer(4, 2) - exact) <= 6e-3 * np.linalg.norm(exact)


@emulated_only
def test_bad_arguments(device):
    def refused(message, **arrays):
        given = {"x": np.zeros((5, 16), bfloat16), "weight": np.zeros((3, 8, 16), bfloat16),
                 "offsets": np.zeros(4, np.int32), "bias": None, "tokens": np.zeros(6, np.int32),
                 "out": np.zeros((6, 8), bfloat16)} | arrays
        with pytest.raises(ConfigError, match=message):
            grouped_linear(given.pop("x"), given.pop("weight"), given.pop("offsets"), given.pop("bias"), **given)

    refused("x has dtype int32", x=np.zeros((5, 16), np.int32))
    refused("x has shape", x=np.zeros(16, bfloat16))
    refused("x has shape", x=np.zeros((5, 24), bfloat16))
    refused(r"x has shape \(5, 16\); it needs \(6, 16\)", tokens=None)
    refused("x .*not contiguous", x=np.zeros((5, 32), bfloat16)[:, ::2])
    refused("weight has shape", weight=np.zeros((8, 16), bfloat16))
    refused("weight has dtype float16", weight=np.zeros((3, 8, 16), float16))
    refused("weight .*not contiguous", weight=np.zeros((3, 16, 8), bfloat16).transpose(0, 2, 1))
    refused("offsets has shape", offsets=np.zeros(3, np.int32))
    refused("offsets has dtype int64", offsets=np.zeros(4, np.int64))
    refused("bias has shape", bias=np.zeros(8, bfloat16))
    refused("bias has dtype float32", bias=np.zeros((3, 8), np.float32))
    refused("tokens has shape", tokens=np.zeros(5, np.int32))
    refused("tokens has dtype int64", tokens=np.zeros(6, np.int64))
    refused("out has shape", out=np.zeros((6, 9), bfloat16))
    refused("out has shape", out=np.zeros(8, bfloat16))
    refused("out has dtype float16", out=np.zeros((6, 8), float16))
    refused("rows of 12 bfloat16 .*multiple of 8", x=np.zeros((5, 12), bfloat16), weight=np.zeros((3, 8, 12), bfloat16))
    refused("rows of 0 bfloat16", x=np.zeros((5, 0), bfloat16), weight=np.zeros((3, 8, 0), bfloat16))
    refused("rows of 6 float32 .*multiple of 4", x=np.zeros((5, 6), np.float32), weight=np.zeros((3, 8, 6), np.float32),
            out=np.zeros((6, 8), np.float32))


# ---- the choice of the tile


def test_every_tile_is_declared_and_chosen():
    chosen = {(d.name, choose_tile(rows, experts, n, d)) for d, rows, experts, n in
              product(DTYPES, (1, 8, 64, 512, 4096, 32768), (1, 8, 128), (64, 1536, 28672))}
    assert chosen == {(dtype.name, tile) for dtype, tile in VARIANTS}
    names = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
    wanted = {tuple(sorted([f"DTYPE={names[d]}", f"ROWS={t.rows}", f"COLUMNS={t.columns}", f"STAGES={t.stages}"]))
              for d, t in chosen}
    for variants in read_source("grouped_gemm.cu").variants.values():
        assert set(variants) == wanted
    for tile in TILES + FLOAT_TILES:
        blocks = 2 if tile.rows == 128 else 3
        assert blocks * (tile.shared_bytes + 1024) <= 227 * 1024  # of a multiprocessor


def test_expected_rows_decide_about_the_tile_only(device, monkeypatch):
    case, seen = Case(normal, bfloat16, [30, 0, 2], 40, 72, spare=200), []

    def recorded(rows, *rest):
        seen.append(choose_tile(rows, *rest).rows)
        return choose_tile(rows, *rest)

    monkeypatch.setattr(grouped_gemm_cuda, "choose_tile", recorded)
    usual = case.run(device)
    assert_same_bits(case.run(device, expected_rows=32), usual)
    assert_same_bits(case.run(device, expected_rows=10**6), usual)
    assert seen == [64, 16, 64]


def test_few_rows_occupy_every_multiprocessor():
    for rows, experts, n in ((2, 8, 4096), (8, 128, 2048), (2, 8, 28672)):  # one token of Mixtral, of Qwen3-30B-A3B
        tile = choose_tile(rows, experts, n, bfloat16)
        assert tile.rows == 16 and rows * -(-n // tile.columns) >= 132


def test_the_most_tiles():
    def ways(rows, experts):
        if experts == 1:
            yield (rows,)
        else:
            for first in range(rows + 1):
                for rest in ways(rows - first, experts - 1):
                    yield (first, *rest)

    for rows, experts, tile in product(range(1, 12), (1, 2, 3, 4), (2, 3, 5)):
        assert most_row_tiles(rows, experts, tile) == max(sum(-(-g // tile) for g in w) for w in ways(rows, experts))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equally_many_rows_without_offsets(device, dtype):
    rng = np.random.default_rng(9)
    for experts, rows in ((1, 37), (3, 24), (2, 0)):
        x, weight = integers(rng, rows, 40).astype(dtype), integers(rng, experts, 24, 40).astype(dtype)
        out = device.poisoned((rows, 24), float32)
        grouped_linear(device.array(x), device.array(weight), None, out=out, pdl=True)
        offsets = (np.arange(experts + 1) * (rows // experts)).astype(np.int32)
        expected = moe.grouped_linear(x.astype(float32), weight.astype(float32), offsets)
        np.testing.assert_array_equal(device.numpy(out), expected)


@emulated_only
def test_rows_that_cannot_be_divided_evenly(device):
    with pytest.raises(ConfigError, match="7 rows cannot be divided evenly among 2 experts"):
        grouped_linear(np.zeros((7, 8), np.float32), np.zeros((2, 8, 8), np.float32), None,
                       out=np.zeros((7, 8), np.float32))
