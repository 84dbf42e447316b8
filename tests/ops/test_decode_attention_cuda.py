"""The kernels of decode_plan.cu and decode_attention.cu against the specification in NumPy."""

from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
import pytest

from cutp.array.kernel import use_backend
from cutp.errors import ConfigError
from cutp.ops.attention import paged_attention
from cutp.ops.decode_attention_cuda import (
    decode_attention,
    decode_plan,
    decode_workspace,
    max_splits,
    rotary_decode_attention,
    turns_heads,
)
from cutp.ops.rotary_cuda import rotary_kv_write
from tests.emulation.emulator import EmulatorBackend, needs_compiler
from tests.ops.conftest import EmulatedArrays

bfloat16, float16, float32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32)
NO_PAGE = 2**30


@dataclass
class Case:
    """Requests of some lengths with everything around their tokens poisoned. A length of 0 pads the batch."""

    dtype: np.dtype
    lengths: list[int]
    head_dim: int = 64
    group: int = 4
    kv_heads: int = 2
    page_size: int = 16
    window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False
    scale: float | None = None
    seed: int = 0
    q: np.ndarray = field(init=False)

    def __post_init__(self):
        rng = np.random.default_rng(self.seed)
        batch, heads = len(self.lengths), self.kv_heads * self.group
        table_width = max(1, -(-max(self.lengths, default=0) // self.page_size)) + 1
        used = sum(-(-n // self.page_size) for n in self.lengths)
        self.q = rng.standard_normal((batch, heads, self.head_dim)).astype(self.dtype)
        shape = (used + 2, 2, self.kv_heads, self.page_size, self.head_dim)
        self.pages = rng.standard_normal(shape, np.float32)
        self.pages[:, 0, ..., 1] *= 3  # a channel that matters more than the others
        self.pages = self.pages.astype(self.dtype)
        self.table = np.full((batch, table_width), NO_PAGE, np.int32)
        numbers = iter(rng.permutation(used + 2))
        visible = np.zeros((used + 2, self.page_size), bool)
        for row, n in zip(self.table, self.lengths, strict=True):
            count = -(-n // self.page_size)
            row[:count] = [next(numbers) for _ in range(count)]
            positions = np.arange(max(0, n - (self.window or n)), n)
            visible[row[positions // self.page_size], positions % self.page_size] = True
        self.pages.transpose(0, 3, 1, 2, 4)[~visible] = np.nan
        self.scale = self.head_dim**-0.5 if self.scale is None else self.scale
        self.sinks = rng.choice([-30, 0, 1.5, 30], heads).astype(np.float32) if self.has_sinks else None

    def expected(self):
        """The specification, which does not read the poison: masked values count as 0 there."""
        real = np.flatnonzero(self.lengths)
        out = np.zeros(self.q.shape, np.float32)
        pages = np.where(np.isnan(self.pages.astype(np.float32)), 0, self.pages.astype(np.float32))
        q = self.q.astype(np.float32)
        out[real] = paged_attention(
            q[real], pages, self.table[real], np.arange(len(real) + 1), np.array(self.lengths, int)[real] - 1,
            self.scale, window=self.window, softcap=self.softcap, sinks=self.sinks)
        return out

    def rows(self, *rows):
        """The same requests, only those of `rows`."""
        part = Case(self.dtype, [1])
        part.__dict__.update(self.__dict__)
        part.q, part.table = self.q[list(rows)], self.table[list(rows)]
        part.lengths = [self.lengths[i] for i in rows]
        return part


def prepare(device, case, extra_items=0):
    """The case's arrays on the device, and a function that runs plan and attention on them."""
    workspace = decode_workspace(len(case.lengths), case.table.shape[1] * case.page_size, case.q.shape[1],
                                 case.kv_heads, case.head_dim)
    capacity = workspace.plan[0] - 1 + extra_items
    plan = device.poisoned((1 + capacity, 4), np.int32)
    partials = device.poisoned((capacity * case.q.shape[1] * (case.head_dim + 2),), np.float32)
    counters = device.array(np.zeros(capacity * case.q.shape[1] * 4, np.uint32))
    q, pages, table = device.array(case.q), device.array(case.pages), device.array(case.table)
    lengths = device.array(np.array(case.lengths, np.int32))
    sinks = None if case.sinks is None else device.array(case.sinks)
    if device.emulated:
        for a in (q, pages, table, lengths):
            a.flags.writeable = False

    def run(blocks=5, pdl=True):
        out = device.poisoned(case.q.shape, case.dtype)
        decode_plan(lengths, case.kv_heads, window=case.window, plan=plan, pdl=pdl)
        decode_attention(q, pages, table, lengths, plan, case.scale, softcap=case.softcap, sinks=sinks,
                         partials=partials, counters=counters, blocks=blocks, out=out, pdl=pdl)
        result = device.numpy(out)
        assert not device.numpy(counters).any()
        return result

    return run, plan


def run_case(device, case, blocks=5):
    return prepare(device, case)[0](blocks)


def assert_close(got, case):
    """Relative error as a whole, and nowhere more than two units in the last place of the greatest value of a row."""
    expected = case.expected()
    assert got.dtype == case.dtype
    got = got.astype(np.float32)
    assert np.isfinite(got).all()
    padding = np.array(case.lengths) == 0
    assert not got[padding].any()
    got, expected = got[~padding], expected[~padding]
    tolerance = {bfloat16: 4e-3, float16: 6e-4, float32: 4e-6}[case.dtype]
    assert np.linalg.norm(got - expected) <= tolerance * np.linalg.norm(expected)
    unit = {bfloat16: 2.0**-7, float16: 2.0**-10, float32: 2.0**-18}[case.dtype]
    smallest = 2.0**-24 if case.dtype == float16 else 0  # what float16 cannot tell from 0
    allowed = 2 * unit * np.abs(expected).max(axis=-1, keepdims=True) + smallest
    assert (np.abs(got - expected) <= allowed).all()


# Tiles of 16, splits of 64, pages: one token, ends of each, padding anywhere. With 2 key-value heads a request of up
# to 8192 tokens has splits of 64.
LENGTHS = [0, 1, 17, 64, 0, 65, 15, 16, 130, 0]
CASES = [
    Case(bfloat16, LENGTHS, head_dim=128),
    Case(bfloat16, [63, 300], head_dim=128, group=16, kv_heads=1, page_size=64, has_sinks=True),
    Case(bfloat16, [100, 33, 64], head_dim=80, group=7, page_size=32, softcap=20.0, scale=0.4),
    Case(float16, LENGTHS, head_dim=64, group=8, kv_heads=1, has_sinks=True),
    Case(float16, [80, 129], head_dim=96, group=3, kv_heads=3, page_size=128),
    Case(bfloat16, [31, 145], head_dim=256, group=2, page_size=32, softcap=50.0, window=100),
    Case(bfloat16, [70], head_dim=256, group=9, kv_heads=1, page_size=48),
    Case(bfloat16, [1, 40], head_dim=128, group=20, kv_heads=2),
    Case(float32, [0, 1, 66, 17], head_dim=64, group=1, kv_heads=3),
    Case(float32, [70, 129], head_dim=80, group=9, kv_heads=1, page_size=32, softcap=10.0, scale=0.5, has_sinks=True),
    Case(float32, [40, 21], head_dim=256, group=2, kv_heads=1, window=20),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.dtype}-{c.head_dim}-group{c.group}")
def test_equals_the_reference(device, case):
    assert_close(run_case(device, case), case)


@pytest.mark.parametrize("window", [1, 15, 16, 17, 63, 64, 65, 100, 1000])
def test_window(device, window):
    case = Case(bfloat16, [1, 16, 64, 66, 150], window=window, has_sinks=window % 2 == 0, kv_heads=1)
    assert_close(run_case(device, case), case)


def test_more_splits_than_are_merged_at_once(device):
    case = Case(bfloat16, [64 * 33 - 5, 64 * 65], kv_heads=1, group=2, page_size=64)
    run, plan = prepare(device, case)
    got = run(blocks=7)
    assert device.numpy(plan)[0, 0] == 33 + 65
    assert_close(got, case)


def test_splits_of_several_rounds(device):
    """32 key-value heads: a long request has few splits, whose tiles the warps take in turn."""
    case = Case(float16, [64 * 25 + 3], kv_heads=32, group=1, page_size=64)
    run, plan = prepare(device, case)
    got = run(blocks=3)
    assert device.numpy(plan)[0, 0] == 7
    assert_close(got, case)


@pytest.mark.parametrize("dtype", [bfloat16, float32], ids=str)
def test_a_request_does_not_depend_on_the_others(device, dtype):
    case = Case(dtype, [70, 1, 0, 200, 65, 130], has_sinks=True)
    together = run_case(device, case)
    for blocks in (1, 2, 64):
        np.testing.assert_array_equal(run_case(device, case, blocks), together)
    for i in range(len(case.lengths)):
        np.testing.assert_array_equal(run_case(device, case.rows(i), 3)[0], together[i])
    order = [3, 0, 5, 1, 4, 2]
    np.testing.assert_array_equal(run_case(device, case.rows(*order)), together[order])


def test_shared_pages(device):
    case = Case(bfloat16, [70, 90], page_size=16)
    case.table[1, :4] = case.table[0, :4]
    assert_close(run_case(device, case), case)


def test_repeated_launches_leave_nothing_behind(device):
    case = Case(bfloat16, [200, 0, 130], has_sinks=True)
    run, _ = prepare(device, case, extra_items=3)
    first = run()
    for _ in range(3):
        np.testing.assert_array_equal(run(), first)


def test_scores_far_apart(device):
    """One token takes all the weight; the others' underflow. Then all scores equal: the mean of the values."""
    case = Case(bfloat16, [150], scale=40.0)
    assert_close(run_case(device, case), case)
    case = Case(bfloat16, [150], scale=0.0)
    assert_close(run_case(device, case), case)


def test_a_nan_stays_in_its_request_and_head(device):
    case = Case(bfloat16, [70, 90, 40])
    clean = run_case(device, case)
    case.q[1, 2, 5] = np.nan
    got = run_case(device, case)
    assert np.isnan(got[1, 2].astype(np.float32)).all()
    clean[1, 2] = got[1, 2] = 0
    np.testing.assert_array_equal(got, clean)


@needs_compiler
def test_the_result_does_not_depend_on_the_order_of_threads():
    case = Case(bfloat16, [130, 0, 64, 17], head_dim=128, group=5, has_sinks=True)
    results = []
    for seed in range(5):
        with use_backend(EmulatorBackend(order_seed=seed)):
            results.append(run_case(EmulatedArrays(), case))
    for result in results:
        np.testing.assert_array_equal(result, results[0])
    assert_close(results[0], case)


# ---- with the rotary embedding and the write of keys and values


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


# ---- the plan


def expected_items(lengths, kv_heads, window):
    """The splits of each request: multiples of 64 tokens, as many as there should be or fewer."""
    items = []
    for request, length in enumerate(lengths):
        first = max(0, length - window) if window else 0
        start = first // 16 * 16
        wanted = max(1, 256 // kv_heads)
        size = min(2048, 64 * max(1, -(-(length - start) // (64 * wanted))))
        begins = range(start, length, size)
        items += [(request, split | len(begins) << 16, max(begin, first), min(begin + size, length))
                  for split, begin in enumerate(begins)]
    return np.array(items, np.int64).reshape(-1, 4)


@pytest.mark.parametrize(("kv_heads", "window"), [(8, None), (8, 1000), (1, None), (64, 20), (512, None)])
def test_plan(device, kv_heads, window):
    rng = np.random.default_rng(kv_heads)
    lengths = np.concatenate([[0, 1, 63, 64, 65, 1023, 1024, 1025, 2048, 2049, 70000], rng.integers(0, 5000, 50)])
    plan = device.poisoned(decode_workspace(len(lengths), 70000, kv_heads, kv_heads, 64).plan, np.int32)
    decode_plan(device.array(lengths.astype(np.int32)), kv_heads, window=window, plan=plan, pdl=True)
    got, expected = device.numpy(plan), expected_items(lengths, kv_heads, window)
    assert got[0, 0] == len(expected)
    np.testing.assert_array_equal(got[1 : 1 + len(expected)], expected)
    assert (got[1 + len(expected) :] == np.iinfo(np.int32).max).all()


def test_plan_of_more_requests_than_threads(device):
    lengths = np.random.default_rng(0).integers(0, 300, 600).astype(np.int32)
    plan = device.poisoned(decode_workspace(600, 300, 4, 4, 64).plan, np.int32)
    decode_plan(device.array(lengths), 4, plan=plan)
    expected = expected_items(lengths, 4, None)
    assert device.numpy(plan)[0, 0] == len(expected)
    np.testing.assert_array_equal(device.numpy(plan)[1 : 1 + len(expected)], expected)


def test_a_plan_that_is_too_short_is_not_overrun(device):
    plan = device.poisoned((3, 4), np.int32)
    decode_plan(device.array(np.array([200, 10], np.int32)), 4, plan=plan)
    assert device.numpy(plan)[0, 0] == 2


def test_one_long_request_fills_the_machine():
    """8 key-value heads, 1000 tokens or more: tasks for 132 multiprocessors, but few partial results."""
    for length in (1024, 2048, 4096, 8192, 32768):
        assert 128 <= 8 * len(expected_items([length], 8, None)) <= 264


@pytest.mark.parametrize("kv_heads", [1, 2, 8, 96])
def test_workspace_holds_every_length(kv_heads):
    longest = [len(expected_items([length], kv_heads, None)) for length in range(1, 20000, 61)]
    for i, length in enumerate(range(1, 20000, 61)):
        assert max_splits(length, kv_heads) >= max(longest[: i + 1])
    assert max_splits(19947, kv_heads) <= max(longest)
    shapes = decode_workspace(3, 5000, 2 * kv_heads, kv_heads, 128)
    assert shapes.bytes == 4 * sum(np.prod(s) for s in (shapes.plan, shapes.partials, shapes.counters))


# ---- arguments


def arguments(**change):
    given = {
        "q": np.zeros((2, 4, 64), np.float32), "pages": np.zeros((3, 2, 2, 16, 64), np.float32),
        "lookup_table": np.zeros((2, 5), np.int32), "kv_lengths": np.zeros(2, np.int32),
        "plan": np.zeros((5, 4), np.int32), "scale": 0.1, "softcap": None, "sinks": None,
        "partials": np.zeros(4 * 4 * 66, np.float32), "counters": np.zeros(64, np.uint32), "blocks": 2,
        "out": np.zeros((2, 4, 64), np.float32),
    }
    return {**given, **change}


@pytest.mark.parametrize(("change", "message"), [
    ({"q": np.zeros((2, 4, 64))}, "q has dtype float64; it needs bfloat16, float16, float32"),
    ({"q": np.zeros((2, 256), np.float32)}, "q has shape"),
    ({"q": np.zeros((2, 4, 72), np.float32)}, "head dimension 72; it needs one of 64, 80"),
    ({"q": np.zeros((4, 2, 64), np.float32).transpose(1, 0, 2)}, "q of shape .* is not contiguous"),
    ({"q": np.zeros((2, 5, 64), np.float32)}, "5 heads, not a multiple of the 2 heads of pages"),
    ({"pages": np.zeros((3, 2, 2, 16, 64), np.float16)}, "pages has dtype float16; it needs float32"),
    ({"pages": np.zeros((3, 1, 2, 16, 64), np.float32)}, "pages has shape .* it needs .any, 2, any, any, 64."),
    ({"pages": np.zeros((3, 2, 2, 24, 64), np.float32)}, "pages have 24 tokens; it must be a multiple of 16"),
    ({"lookup_table": np.zeros((2, 5), np.int64)}, "lookup_table has dtype int64; it needs int32"),
    ({"lookup_table": np.zeros((3, 5), np.int32)}, "lookup_table has shape"),
    ({"lookup_table": np.zeros((2, 9), np.int32)}, "plan has room for 4 items; 2 requests of up to 144 .* need 6"),
    ({"kv_lengths": np.zeros(3, np.int32)}, "kv_lengths has shape"),
    ({"plan": np.zeros((5, 3), np.int32)}, "plan has shape"),
    ({"plan": np.zeros((2, 4), np.int32)}, "plan has room for 1 items"),
    ({"sinks": np.zeros(2, np.float32)}, "sinks has shape"),
    ({"sinks": np.zeros(4, np.float16)}, "sinks has dtype"),
    ({"softcap": 0.0}, "softcap is 0.0"),
    ({"partials": np.zeros(4 * 4 * 66 - 1, np.float32)}, "partials has 1055 elements; a plan of 4 items needs 1056"),
    ({"counters": np.zeros(63, np.uint32)}, "counters has 63 elements"),
    ({"counters": np.zeros(64, np.int32)}, "counters has dtype int32"),
    ({"blocks": 0}, "blocks is 0"),
    ({"out": np.zeros((2, 4, 64), np.float16)}, "out has dtype"),
])
def test_arguments_that_do_not_fit(change, message):
    with pytest.raises(ConfigError, match=message):
        decode_attention(**arguments(**change))


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


@pytest.mark.parametrize(("change", "message"), [
    ({"kv_lengths": np.zeros((2, 1), np.int32)}, "kv_lengths has shape"),
    ({"kv_lengths": np.zeros(2, np.int64)}, "kv_lengths has dtype int64"),
    ({"plan": np.zeros((5, 4), np.float32)}, "plan has dtype float32"),
    ({"plan": np.zeros((2, 4), np.int32)}, "plan has room for 1 items, fewer than the 2 requests"),
    ({"window": 0}, "window is 0"),
    ({"n_kv_heads": 0}, "n_kv_heads is 0"),
])
def test_plan_arguments_that_do_not_fit(change, message):
    given = {"kv_lengths": np.zeros(2, np.int32), "n_kv_heads": 2, "plan": np.zeros((5, 4), np.int32), **change}
    with pytest.raises(ConfigError, match=message):
        decode_plan(**given)


def test_no_requests(device):
    case = Case(bfloat16, [])
    assert run_case(device, case).shape == (0, 8, 64)


# ---- on a GPU only: real sizes


GPU_CASES = [
    Case(bfloat16, [0], head_dim=dim, group=group, kv_heads=kv_heads, page_size=page)
    for dim, group, kv_heads, page in [(128, 4, 8, 64), (64, 8, 8, 16), (80, 1, 32, 64), (96, 5, 2, 128),
                                       (256, 8, 1, 32), (256, 16, 2, 64), (128, 16, 4, 64), (128, 40, 1, 64)]
]


@pytest.mark.parametrize("dtype", [bfloat16, float16, float32], ids=str)
@pytest.mark.parametrize("shape", GPU_CASES, ids=lambda c: f"{c.head_dim}-{c.group}-{c.kv_heads}-{c.page_size}")
def test_large(device, shape, dtype):
    if device.emulated:
        pytest.skip("too large to emulate")
    lengths = [1, 15, 16, 17, 0, 63, 64, 65, 1023, 1024, 1025, 4097, 0, 9000, 33000]
    for window, softcap, has_sinks in ((None, None, False), (1000, 30.0, True)):
        case = Case(dtype, lengths, head_dim=shape.head_dim, group=shape.group, kv_heads=shape.kv_heads,
                    page_size=shape.page_size, window=window, softcap=softcap, has_sinks=has_sinks)
        got = run_case(device, case, blocks=396)
        assert_close(got, case)
        for blocks in (132, 50, 1000):
            np.testing.assert_array_equal(run_case(device, case, blocks=blocks), got)
        for i in (4, 9, 13):
            np.testing.assert_array_equal(run_case(device, case.rows(i), blocks=264)[0], got[i])


@pytest.mark.parametrize("dtype", [bfloat16, float16, float32], ids=str)
@pytest.mark.parametrize(("head_dim", "group"), [(128, 4), (128, 8), (64, 4)])
def test_one_kernel_equals_two_in_large(device, dtype, head_dim, group):
    if device.emulated:
        pytest.skip("too large to emulate")
    lengths = [1, 15, 16, 17, 0, 63, 64, 65, 1023, 1024, 1025, 4097, 0, 9000, 33000]
    for window in (None, 1000):
        case = Case(dtype, lengths, head_dim=head_dim, group=group, kv_heads=8, page_size=64, window=window)
        for blocks in (396, 50):
            RotaryCase(case).check(device, blocks)


def test_a_hundred_launches_of_a_large_batch_agree(device):
    if device.emulated:
        pytest.skip("too large to emulate")
    rng = np.random.default_rng(0)
    case = Case(bfloat16, list(rng.integers(1, 2500, 64)), head_dim=128, kv_heads=8, page_size=64)
    run, _ = prepare(device, case)
    first = run(blocks=396)
    for _ in range(100):
        np.testing.assert_array_equal(run(blocks=396), first)
