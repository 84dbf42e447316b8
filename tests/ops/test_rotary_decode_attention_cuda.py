"""The rotary embedding, the write of keys and values, and decode attention: one kernel against two."""

import numpy as np
import pytest

from cutp.errors import ConfigError
from cutp.ops.decode_attention_cuda import (
    decode_attention,
    decode_plan,
    decode_workspace,
    rotary_decode_attention,
    turns_heads,
)
from cutp.ops.rotary_cuda import rotary_kv_write
from tests.ops.decode_cases import LARGE_LENGTHS, Case, arguments, assert_close, bfloat16, float16, float32


class RotaryCase:
    """The requests of a `Case` before their newest keys and values are in the cache, where poison is instead."""

    def __init__(self, case):
        rng = np.random.default_rng(case.seed + 1)
        self.case, heads = case, case.q.shape[1] + 2 * case.kv_heads
        real = np.flatnonzero(case.lengths)
        last = np.array(case.lengths, int) - 1
        self.slots = np.full(len(case.lengths), -1, np.int64)
        pages, rows = case.table[real, last[real] // case.page_size], last[real] % case.page_size
        self.slots[real] = pages * case.page_size + rows
        self.pages = case.pages.copy()
        self.pages.transpose(0, 3, 1, 2, 4)[pages, rows] = np.nan
        self.qkv = rng.standard_normal((len(case.lengths), heads * case.head_dim)).astype(case.dtype)
        angles = rng.uniform(-4, 4, (len(case.lengths), case.head_dim // 2))
        self.cos, self.sin = (f(angles).astype(np.float32) for f in (np.cos, np.sin))

    def run(self, device, together, blocks=5):
        """(results, pages) of one kernel or of two."""
        case = self.case
        shapes = decode_workspace(len(case.lengths), case.table.shape[1] * case.page_size, case.q.shape[1],
                                  case.kv_heads, case.head_dim)
        plan, partials = device.poisoned(shapes.plan, np.int32), device.poisoned(shapes.partials, np.float32)
        counters = device.array(np.zeros(shapes.counters, np.uint32))
        qkv, cos, sin, pages, table = map(device.array, (self.qkv, self.cos, self.sin, self.pages, case.table))
        lengths = device.array(np.array(case.lengths, np.int32))
        sinks = None if case.sinks is None else device.array(case.sinks)
        q, out = (device.poisoned(case.q.shape, case.dtype) for _ in range(2))
        if device.emulated:
            for a in (qkv, cos, sin, table, lengths):
                a.flags.writeable = False
        options = {"softcap": case.softcap, "sinks": sinks, "partials": partials, "counters": counters,
                   "blocks": blocks, "out": out, "pdl": True}
        decode_plan(lengths, case.kv_heads, window=case.window, plan=plan, pdl=True)
        if together:
            rotary_decode_attention(qkv, cos, sin, pages, table, lengths, plan, case.scale, **options)
        else:
            rotary_kv_write(qkv, cos, sin, device.array(self.slots), pages, q_out=q, pdl=True)
            decode_attention(q, pages, table, lengths, plan, case.scale, **options)
        assert not device.numpy(counters).any()
        return device.numpy(out).copy(), device.numpy(pages).copy()

    def check(self, device, blocks=5):
        got, expected = self.run(device, True, blocks), self.run(device, False, 3)
        assert np.isfinite(got[0].astype(np.float32)).all()
        for one, other in zip(got, expected, strict=True):
            assert one.tobytes() == other.tobytes()


# The newest token: alone, first or last in a tile, in a tile of each warp, in a split of its own.
NEWEST = [1, 2, 16, 17, 0, 24, 33, 49, 64, 65, 66, 130, 0]


@pytest.mark.parametrize(("dtype", "head_dim", "group"), [
    (bfloat16, 128, 4), (float16, 128, 8), (bfloat16, 128, 12), (bfloat16, 64, 1), (float16, 64, 16), (float32, 128, 3),
    (float32, 64, 8)], ids=str)
@pytest.mark.parametrize("options", [{}, {"window": 1}, {"window": 20, "has_sinks": True, "softcap": 20.0}], ids=str)
def test_one_kernel_equals_two(device, dtype, head_dim, group, options):
    RotaryCase(Case(dtype, NEWEST, head_dim=head_dim, group=group, **options)).check(device)


@pytest.mark.parametrize("dtype", [bfloat16, float32], ids=str)
@pytest.mark.parametrize("length", [64 * 24 + 1, 64 * 25 - 17, 64 * 28])
def test_one_kernel_equals_two_in_splits_of_several_rounds(device, dtype, length):
    """32 key-value heads: splits of 256 tokens, the newest token in a later tile of its warp."""
    RotaryCase(Case(dtype, [length], head_dim=64, kv_heads=32, group=1, page_size=64)).check(device, 3)


def test_one_kernel_is_right(device):
    """Against the specification: q and k turned, then attention over the cache with the new keys and values."""
    case = Case(float32, [70, 1, 0, 33], head_dim=64)
    rotary = RotaryCase(case)
    got, pages = rotary.run(device, True)
    heads = rotary.qkv.reshape(4, -1, 64)
    first, second = heads[..., :32], heads[..., 32:]
    cos, sin = rotary.cos[:, None], rotary.sin[:, None]
    case.q = np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)[:, :8]
    case.pages = pages
    assert_close(got, case)
    newest = pages.transpose(0, 3, 1, 2, 4).reshape(-1, 2, 2, 64)[rotary.slots[[0, 1, 3]]]
    np.testing.assert_array_equal(newest[:, 1], heads[[0, 1, 3], 10:])


@pytest.mark.parametrize("change", [
    {"head_dim": 80, "rotary_dim": 80}, {"head_dim": 256, "rotary_dim": 256}, {"rotary_dim": 64}, {"rotary_dim": 0},
    {"interleaved": True}, {"n_heads": 34}, {"n_heads": 18, "dtype": float32}])
def test_heads_that_need_two_kernels(change):
    given = {"head_dim": 128, "rotary_dim": 128, "n_heads": 32, "n_kv_heads": 2, "dtype": bfloat16,
             "interleaved": False}
    assert turns_heads(**given)
    assert not turns_heads(**given | change)


@pytest.mark.parametrize(("change", "message"), [
    ({"qkv": np.zeros((2, 511), np.float32)}, r"qkv has shape .* it needs \(2, 512\)"),
    ({"qkv": np.zeros((2, 512), np.float16)}, "qkv has dtype float16; it needs float32"),
    ({"cos": np.zeros((2, 16), np.float32)}, "cos has shape"),
    ({"sin": np.zeros((2, 32), np.float16)}, "sin has dtype"),
    ({"out": np.zeros((2, 4, 72), np.float32)}, "head dimension 72"),
    ({"out": np.zeros((2, 4, 64))}, "out has dtype float64"),
    ({"out": np.zeros((2, 36, 64), np.float32)}, "rotary_decode_attention: partials"),
    ({"lookup_table": np.zeros((3, 5), np.int32)}, "lookup_table has shape"),
    ({"softcap": -1.0}, "softcap is -1.0"),
])
def test_rotary_arguments_that_do_not_fit(change, message):
    given = arguments(qkv=np.zeros((2, 8 * 64), np.float32), cos=np.zeros((2, 32), np.float32),
                      sin=np.zeros((2, 32), np.float32))
    del given["q"]
    with pytest.raises(ConfigError, match=message):
        rotary_decode_attention(**given | change)


def test_there_is_no_rotary_kernel_for_large_groups():
    given = arguments(qkv=np.zeros((2, 40 * 64), np.float32), cos=np.zeros((2, 32), np.float32),
                      sin=np.zeros((2, 32), np.float32), out=np.zeros((2, 36, 64), np.float32),
                      partials=np.zeros(4 * 36 * 66, np.float32), counters=np.zeros(4 * 36 * 4, np.uint32))
    del given["q"]
    with pytest.raises(ConfigError, match="no kernel for 18 float32 query heads of 64"):
        rotary_decode_attention(**given)


# ---- on a GPU only: real sizes


@pytest.mark.parametrize("dtype", [bfloat16, float16, float32], ids=str)
@pytest.mark.parametrize(("head_dim", "group"), [(128, 4), (128, 8), (64, 4)])
def test_one_kernel_equals_two_in_large(device, dtype, head_dim, group):
    if device.emulated:
        pytest.skip("too large to emulate")
    for window in (None, 1000):
        case = Case(dtype, LARGE_LENGTHS, head_dim=head_dim, group=group, kv_heads=8, page_size=64, window=window)
        for blocks in (396, 50):
            RotaryCase(case).check(device, blocks)
