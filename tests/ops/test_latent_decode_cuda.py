"""latent_decode.cu against ops/latent_attention.py, in the emulation and on a GPU."""

import ml_dtypes
import numpy as np
import pytest

from cutp.array.kernel import use_backend
from cutp.errors import ConfigError
from cutp.ops.latent_attention import latent_attention
from cutp.ops.latent_decode_cuda import (
    CHANNELS,
    VALUE_DIM,
    blocks_per_multiprocessor,
    latent_decode_attention,
    latent_decode_plan,
    latent_decode_workspace,
)
from tests.ops.kernel_results import bfloat16, emulated_only, float16, gpu_only

NO_PAGE = 2**30
SCALE = 0.07


class Case:
    """Requests of some lengths, 0 for padding, with everything around their tokens poisoned."""

    def __init__(self, dtype, lengths, heads, page_size=32, seed=0, scale=SCALE):
        rng = np.random.default_rng(seed)
        self.dtype, self.lengths, self.scale = dtype, np.array(lengths, np.int32), scale
        counts = -(-self.lengths // page_size)
        used = int(counts.sum()) + 2
        self.q = rng.standard_normal((len(lengths), heads, CHANNELS), np.float32).astype(dtype)
        pages = rng.standard_normal((used, 1, 1, page_size, CHANNELS), np.float32)
        self.table = np.full((len(lengths), counts.max(initial=0) + 1), NO_PAGE, np.int32)
        numbers, seen = iter(rng.permutation(used)), np.zeros((used, page_size), bool)
        for row, count, length in zip(self.table, counts, self.lengths, strict=True):
            row[:count] = [next(numbers) for _ in range(count)]
            positions = np.arange(length)
            seen[row[positions // page_size], positions % page_size] = True
        pages[~seen[:, None, None]] = np.nan
        self.pages = pages.astype(dtype)

    def expected(self):
        real, pages = np.flatnonzero(self.lengths), self.pages.astype(np.float32)
        out = np.zeros((*self.q.shape[:2], VALUE_DIM), np.float32)
        out[real] = latent_attention(
            self.q[real].astype(np.float32), np.where(np.isnan(pages), 0, pages), self.table[real],
            np.arange(len(real) + 1), self.lengths[real] - 1, self.scale, VALUE_DIM)
        return out

    def rows(self, *rows):
        """The same requests, only those of `rows`."""
        part = object.__new__(Case)
        part.__dict__.update(self.__dict__)
        part.q, part.table, part.lengths = (a[list(rows)] for a in (self.q, self.table, self.lengths))
        return part

    def run(self, device, blocks=5, pdl=True, extra_items=0, launches=1):
        batch, heads = self.q.shape[:2]
        shapes = latent_decode_workspace(batch, self.table.shape[1] * self.pages.shape[3], heads)
        items = shapes.plan[0] + extra_items
        plan = device.poisoned((items, 4), np.int32)
        partials = device.poisoned((shapes.partials[0] + extra_items * heads * (VALUE_DIM + 2),), np.float32)
        inputs = [device.array(a) for a in (self.q, self.pages, self.table, self.lengths)]
        if device.emulated:
            for array in inputs:
                array.flags.writeable = False
        for _ in range(launches):
            out = device.poisoned((batch, heads, VALUE_DIM), self.dtype)
            latent_decode_plan(inputs[3], heads, plan=plan, pdl=pdl)
            latent_decode_attention(*inputs, plan, self.scale, partials=partials, blocks=blocks, out=out, pdl=pdl)
        self.items = int(device.numpy(plan)[0, 0]) if batch else 0
        return device.numpy(out)


def assert_close(got, case):
    """Relative error as a whole, and nowhere more than two units in the last place of the greatest value of a row."""
    expected = case.expected()
    assert got.dtype == case.dtype and got.shape == expected.shape
    got, padding = got.astype(np.float32), case.lengths == 0
    assert np.isfinite(got).all() and not got[padding].any()
    tolerance, unit = {bfloat16: (4e-3, 2.0**-7), float16: (6e-4, 2.0**-10)}[case.dtype]
    assert np.linalg.norm(got - expected) <= tolerance * np.linalg.norm(expected)
    assert (np.abs(got - expected) <= 2 * unit * np.abs(expected).max(axis=-1, keepdims=True)).all()


# Blocks of 32 keys, splits of 64, pages: one token, ends of each, padding anywhere. Tiles of 16, 32 and 64 heads, whole
# and not, and more than one.
@pytest.mark.parametrize("dtype, lengths, heads, page_size", [
    (bfloat16, [0, 1, 33, 64, 0, 65, 31, 32, 130, 0], 16, 16),
    (bfloat16, [63, 200], 3, 64),
    (bfloat16, [100, 33], 32, 32),
    (bfloat16, [40, 97], 17, 48),
    (bfloat16, [70, 31], 64, 128),
    (bfloat16, [65], 130, 32),
    (float16, [17, 129, 0], 16, 16),
    (float16, [80], 24, 32),
    (float16, [96], 40, 16),
], ids=str)
def test_equals_the_reference(device, dtype, lengths, heads, page_size):
    case = Case(dtype, lengths, heads, page_size)
    assert_close(case.run(device), case)


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_few_blocks_take_all_tasks(device, blocks):
    case = Case(bfloat16, [40, 1, 130, 70, 0, 17], 16, 16)
    np.testing.assert_array_equal(case.run(device, blocks), case.run(device, 64))
    assert case.items >= 8


def test_one_rounding_of_weights_and_result(device):
    # One token: its own latents, to the bit. Two equal ones: still those.
    case = Case(bfloat16, [1, 2], 16)
    page, slot = case.table[1, 0], np.arange(2)
    case.pages[page, 0, 0, slot] = case.pages[page, 0, 0, 0]
    got = case.run(device)
    for row in (0, 1):
        latents = case.pages[case.table[row, 0], 0, 0, 0, :VALUE_DIM]
        np.testing.assert_array_equal(got[row], np.broadcast_to(latents, got[row].shape))


def test_splits_of_many_sizes(device):
    # From 64 * 64 tokens on splits are longer than a granule; beyond 64 * 2048 there would be more of them.
    case = Case(bfloat16, [64 * 64 + 30, 300], 2, page_size=64)
    got = case.run(device, blocks=7)
    assert case.items == 33 + 5
    assert_close(got, case)


@pytest.mark.parametrize("heads", [16, 128])
def test_the_plan_has_room_for_requests_of_any_length(device, heads):
    for length in (1, 64, 65, 64 * 64, 64 * 64 + 1, 10_000, 2048 * 32, 2048 * 64, 150_001):
        plan = device.poisoned(latent_decode_workspace(1, length, heads).plan, np.int32)
        latent_decode_plan(device.array(np.array([length], np.int32)), heads, plan=plan)
        (count, *_), *items = device.numpy(plan).tolist()
        for i, (request, place, first, last) in enumerate(items[:count]):
            assert (request, place) == (0, i | count << 16) and last > first
            assert first == (items[i - 1][3] if i else 0) and first % 64 == 0 and last - first <= 2048
        assert items[count - 1][3] == length


@gpu_only
def test_long_requests(device):
    for heads, lengths in ((16, [150_000, 9000, 1]), (128, [20_000, 70_000]), (32, [8192] * 16)):
        case = Case(bfloat16, lengths, heads, page_size=64)
        assert_close(case.run(device, blocks=132 * blocks_per_multiprocessor(heads)), case)


@pytest.mark.parametrize("heads", [16, 20, 40])
def test_a_request_does_not_depend_on_the_others(device, heads):
    case = Case(bfloat16, [70, 1, 0, 130], heads)
    together = case.run(device)
    for blocks in (1, 64):
        np.testing.assert_array_equal(case.run(device, blocks), together)
    for i in range(4):
        np.testing.assert_array_equal(case.rows(i).run(device, 3)[0], together[i])
    np.testing.assert_array_equal(case.rows(3, 0, 2, 1).run(device), together[[3, 0, 2, 1]])


def test_repeated_launches_leave_nothing_behind(device):
    case = Case(bfloat16, [130, 0, 70], 16)
    np.testing.assert_array_equal(case.run(device, extra_items=3, launches=3), case.run(device))


def test_scores_far_apart(device):
    """One token takes all the weight, the others' underflow; then peaks that rise from block to block, then fall."""
    case = Case(bfloat16, [150], 16, scale=40.0)
    assert_close(case.run(device), case)
    for order in (1, -1):
        case = Case(bfloat16, [128], 16, page_size=16)
        case.q[:] = np.abs(case.q)
        ramp = np.linspace(-2, 2, 128)[::order, None] * np.ones(CHANNELS - VALUE_DIM)
        case.pages[case.table[0, :8], 0, 0, :, VALUE_DIM:] = ramp.reshape(8, 16, -1).astype(bfloat16)
        assert_close(case.run(device), case)


def test_a_nan_stays_in_its_request_and_head(device):
    case = Case(bfloat16, [70, 40], 20)
    clean = case.run(device)
    case.q[0, 18, 570] = np.nan
    got = case.run(device)
    assert np.isnan(got[0, 18].astype(np.float32)).all()
    clean[0, 18] = got[0, 18] = 0
    np.testing.assert_array_equal(got, clean)


@pytest.mark.parametrize("heads", [16, 40])
def test_order_of_threads_and_programmatic_launch(device, heads):
    case = Case(bfloat16, [130, 0, 33], heads)
    expected = case.run(device, pdl=False)
    np.testing.assert_array_equal(case.run(device, pdl=True), expected)
    if device.emulated:
        from tests.emulation.emulator import EmulatorBackend

        for seed in range(5):
            with use_backend(EmulatorBackend(order_seed=seed)):
                np.testing.assert_array_equal(case.run(device, blocks=2), expected)


def test_nothing_to_do(device):
    assert Case(bfloat16, [], 16).run(device).shape == (0, 16, VALUE_DIM)
    assert not Case(bfloat16, [0, 0], 16).run(device).any()


@emulated_only
def test_bad_arguments(device):
    def refused(message, scale=SCALE, **changes):
        given = {"q": np.zeros((2, 16, 576), bfloat16), "pages": np.zeros((4, 1, 1, 16, 576), bfloat16),
                 "lookup_table": np.zeros((2, 2), np.int32), "kv_lengths": np.ones(2, np.int32),
                 "plan": np.zeros((3, 4), np.int32)}
        rest = {"partials": np.zeros(2 * 16 * 514, np.float32), "blocks": 1, "out": np.zeros((2, 16, 512), bfloat16)}
        rest |= {key: changes.pop(key) for key in list(changes) if key in rest}
        with pytest.raises(ConfigError, match=message):
            latent_decode_attention(*(given | changes).values(), scale, **rest)

    refused("q has dtype float32; it needs bfloat16, float16", q=np.zeros((2, 16, 576), np.float32))
    refused("q has shape", q=np.zeros((2, 16, 512), bfloat16))
    refused("q has shape", q=np.zeros((2, 576), bfloat16))
    refused("pages has shape", pages=np.zeros((4, 2, 1, 16, 576), bfloat16))
    refused("pages has dtype float16", pages=np.zeros((4, 1, 1, 16, 576), float16))
    refused("pages of 24 tokens; .* multiple of 16", pages=np.zeros((4, 1, 1, 24, 576), bfloat16))
    refused("lookup_table has shape", lookup_table=np.zeros((3, 2), np.int32))
    refused("lookup_table has dtype", lookup_table=np.zeros((2, 2), np.int64))
    refused("kv_lengths has shape", kv_lengths=np.ones(3, np.int32))
    refused("plan has dtype", plan=np.zeros((3, 4), np.uint32))
    refused("plan has room for 1 items; 2 requests of up to 32 tokens may need 2", plan=np.zeros((2, 4), np.int32))
    refused("plan has room for 2 items; 2 requests of up to 160 tokens may need 6",
            lookup_table=np.zeros((2, 10), np.int32))
    refused("partials has 1 elements", partials=np.zeros(1, np.float32))
    refused("partials has dtype", partials=np.zeros(2 * 16 * 514, bfloat16))
    refused("out has shape", out=np.zeros((2, 16, 576), bfloat16))
    refused("out has dtype float32", out=np.zeros((2, 16, 512), np.float32))
    refused("scale is 0.0", scale=0.0)
    refused("scale is nan", scale=float("nan"))
    refused("blocks is 0", blocks=0)
    with pytest.raises(ConfigError, match="a plan of 1 items for 2 requests"):
        latent_decode_plan(np.ones(2, np.int32), 16, plan=np.zeros((2, 4), np.int32))
    with pytest.raises(ConfigError, match="kv_lengths has dtype"):
        latent_decode_plan(np.ones(2, ml_dtypes.bfloat16), 16, plan=np.zeros((3, 4), np.int32))


def test_tokens_of_prompts(device):
    """Rows that share the row of their request in the table; only long ones are divided."""
    case = Case(bfloat16, [0, 70, 33], 3)
    rows = np.array([1, 2, 1, 1, 0])
    tokens = case.rows(*rows)
    tokens.lengths = np.array([70, 33, 1, 65, 0], np.int32)
    shapes = latent_decode_workspace(5, 70, 3, whole=True)
    assert shapes.plan == (6, 4) and latent_decode_workspace(1, 4097, 3, whole=True).plan == (4, 4)
    plan, partials = device.poisoned(shapes.plan, np.int32), device.poisoned(shapes.partials, np.float32)
    out = device.poisoned((5, 3, VALUE_DIM), bfloat16)
    lengths = device.array(tokens.lengths)
    latent_decode_plan(lengths, 3, whole=True, plan=plan)
    latent_decode_attention(device.array(case.q[rows]), device.array(case.pages), device.array(case.table), lengths,
                            plan, case.scale, table_rows=device.array(rows), whole=True, partials=partials, blocks=4,
                            out=out)
    assert device.numpy(plan)[0, 0] == 4
    assert_close(device.numpy(out), tokens)
