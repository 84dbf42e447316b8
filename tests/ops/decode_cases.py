"""Requests for tests of the kernels of decode attention."""

from dataclasses import dataclass, field

import ml_dtypes
import numpy as np

from cutp.ops.attention import paged_attention
from cutp.ops.decode_attention_cuda import decode_attention, decode_plan, decode_workspace

bfloat16, float16, float32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32)
NO_PAGE = 2**30

# Too large for the emulation.
LARGE_LENGTHS = [1, 15, 16, 17, 0, 63, 64, 65, 1023, 1024, 1025, 4097, 0, 9000, 33000]


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


def arguments(**change):
    """Of `decode_attention`, as NumPy arrays."""
    given = {
        "q": np.zeros((2, 4, 64), np.float32), "pages": np.zeros((3, 2, 2, 16, 64), np.float32),
        "lookup_table": np.zeros((2, 5), np.int32), "kv_lengths": np.zeros(2, np.int32),
        "plan": np.zeros((5, 4), np.int32), "scale": 0.1, "softcap": None, "sinks": None,
        "partials": np.zeros(4 * 4 * 66, np.float32), "counters": np.zeros(64, np.uint32), "blocks": 2,
        "out": np.zeros((2, 4, 64), np.float32),
    }
    return {**given, **change}
