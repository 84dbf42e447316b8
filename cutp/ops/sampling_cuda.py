"""Launchers of sampling_logits.cu and sampling_records.cu. The specification is `cutp.ops.sampling.sample`.

`sample` launches a whole sequence; what it is made of can be launched alone. Nothing here waits for the device or
allocates: everything lies in arrays of the caller (`buffer_shapes` says which), so that the sequence can be captured in
a graph. Rows whose temperature is negative are not in use: nothing of them is read, their token is -1.

Logits are float32, bfloat16 or float16. Those of 16 bits stand for their values in float32: the tokens are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from cutp.array.kernel import launch
from cutp.array.layout import Layout, layout, optional_layout, remembered
from cutp.errors import ConfigError
from cutp.ops.launch_arguments import DTYPE_DEFINES, LaunchPlan, check_array, check_axes
from cutp.ops.sampling import SamplingRows
from cutp.ops.vocab_rows_launch import THREADS, WARP, Gather, blocks_per_row, check_gathered, check_logits

_DTYPES = tuple(DTYPE_DEFINES)  # of logits
_DIGIT_THREADS = 512  # of the kernel
SEARCH_WORDS = 5
BINS = (2048, 2048, 1024)  # of the digits
# Digits of the passes: top-k's, or top-p's where there is no top-k; then top-p's after top-k. They share the first.
PASSES = (0, 1, 2, 1, 2)


@dataclass
class SamplingArrays:
    """`SamplingRows` where kernels can use it: arrays [B], but for `min_score`, the logarithm of min_p (-inf: off)."""

    temperature: Any  # float32
    top_k: Any  # int32
    top_p: Any  # float32
    min_score: Any  # float32
    seed: Any  # uint64
    sample_index: Any  # int64
    position: Any  # int64

    @classmethod
    def of(cls, rows: SamplingRows, to_device: Callable[[np.ndarray], Any]) -> SamplingArrays:
        """RequestError for settings out of range. The logarithm is NumPy's: thresholds are then the same."""
        fields = vars(rows.checked()).copy()
        with np.errstate(divide="ignore"):
            fields["min_score"] = np.log(fields.pop("min_p").astype(np.float64)).astype(np.float32)
        return cls(**{name: to_device(values) for name, values in fields.items()})

    def __len__(self) -> int:
        return self.temperature.shape[0]

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """Of the arrays, in the order of the fields."""
        return tuple(map(layout, vars(self).values()))


def passes_needed(rows: SamplingRows) -> int:
    """How many of the PASSES these rows need: 0, 3, or 5 if one of them uses both top-k and top-p."""
    drawn = np.asarray(rows.temperature) > 0
    top_k, top_p = np.asarray(rows.top_k) > 0, np.asarray(rows.top_p) < 1
    return 5 if (drawn & top_k & top_p).any() else 3 if (drawn & (top_k | top_p)).any() else 0


@dataclass
class SamplingBuffers:
    """What `sample` works with, for batches of B rows; shapes and dtypes as from `buffer_shapes`.

    `tickets` begins as zeros, and is zeros again after each launch; the others begin as anything. `status` tells per
    row what to look at some time later: 0, 1 if the row has NaN, 2 if it has no logit above -inf (its token is -1).
    """

    parts: Any
    tickets: Any
    pairs: Any
    row_max: Any
    status: Any
    search: Any
    least: Any
    histograms: tuple[Any, Any, Any]


def buffer_shapes(batch: int, columns: int) -> dict[str, Any]:
    """(shape, dtype) of the fields of SamplingBuffers, for shards of up to `columns` columns."""
    u64, f32 = np.dtype(np.uint64), np.dtype(np.float32)
    return {
        "parts": ((batch, blocks_per_row(batch, columns)), u64), "tickets": ((batch,), np.dtype(np.uint32)),
        "pairs": ((batch,), u64), "row_max": ((batch,), f32), "status": ((batch,), np.dtype(np.int32)),
        "search": ((batch, SEARCH_WORDS), u64), "least": ((batch,), f32),
        "histograms": tuple(((batch, 2, bins), u64) for bins in BINS),
    }


def sample(logits: Any, vocab_start: int, rows: SamplingArrays, buffers: SamplingBuffers, gather: Gather, *,
           tokens: Any, passes: int = 5, pdl: bool = False) -> None:
    """tokens = one token per row, int64 [B], as from `cutp.ops.sampling.sample`, equal on all ranks.

    logits: [B, V_local], float32, bfloat16 or float16, the columns from token id `vocab_start` on, after
    `apply_penalties` and so on. ConfigError for arrays that do not fit.
    gather(x): [n_ranks, *x.shape], the ranks' x in rank order, for x among `pairs` and `histograms` (sums over ranks as
    [1, *x.shape] do as well for the latter). With one rank, x[None]. It may return the same memory for arrays of the
    same shape, except that what it returns for the first histogram stays until `sample` has ended, if passes is 5.
    passes: 0, 3 or 5 as from `passes_needed`; less than needed leaves rows without a token (-1).
    """
    if passes not in (0, 3, 5):
        raise ConfigError(f"sample: passes is {passes}; it is 0, 3 or 5")
    b = buffers
    row_argmax(logits, vocab_start, rows.temperature, parts=b.parts, tickets=b.tickets, pairs=b.pairs, pdl=pdl)
    combine_argmax(gather(b.pairs), rows, row_max=b.row_max, tokens=tokens, status=b.status, search=b.search,
                   least=b.least, histogram=b.histograms[0], pdl=pdl)
    first = None
    for i, level in enumerate(PASSES[:passes]):
        mine = b.histograms[level]
        count_digits(logits, rows.temperature, b.row_max, b.search, level, histogram=mine, pdl=pdl)
        gathered = gather(mine)
        first = gathered if i == 0 else first
        following = b.histograms[PASSES[i + 1]] if i + 1 < passes else None
        find_digits(gathered, first, level, rows, search=b.search, least=b.least, following=following, pdl=pdl)
    draw(logits, vocab_start, rows, b.row_max, b.least, parts=b.parts, tickets=b.tickets, pairs=b.pairs, pdl=pdl)
    combine_draw(gather(b.pairs), rows.temperature, tokens=tokens, pdl=pdl)


def greedy(logits: Any, vocab_start: int, rows: SamplingArrays, buffers: SamplingBuffers, gather: Gather, *,
           tokens: Any, pdl: bool = False) -> None:
    """`sample` for batches where no row has a temperature above 0."""
    b = buffers
    row_argmax(logits, vocab_start, rows.temperature, parts=b.parts, tickets=b.tickets, pairs=b.pairs, pdl=pdl)
    combine_argmax(gather(b.pairs), rows, row_max=b.row_max, tokens=tokens, status=b.status, pdl=pdl)


# The steps of `sample`


def row_argmax(logits: Any, vocab_start: int, temperature: Any, *, parts: Any, tickets: Any, pairs: Any,
               pdl: bool = False) -> None:
    """pairs, uint64 [B] = (greatest logit, its lowest id) as from `sampling_keys.pack_pairs`, NAN_PAIR, or NO_PAIR.

    logits: as for `sample`, as for the other steps.
    """
    plan = _argmax_plan(layout(logits), vocab_start, layout(temperature), layout(parts), layout(tickets),
                        layout(pairs))
    launch("sampling_logits.cu", "row_argmax", plan.grid, plan.block,
           [logits, temperature, parts, tickets, pairs, *plan.numbers], defines=plan.defines, pdl=pdl)


def combine_argmax(pairs: Any, rows: SamplingArrays, *, row_max: Any, tokens: Any, status: Any, search: Any = None,
                   least: Any = None, histogram: Any = None, pdl: bool = False) -> None:
    """From all ranks' pairs, uint64 [n_ranks, B]: row_max float32, tokens int64 and status int32, all [B].

    With search, least and histogram (this rank's of the first digit), it also begins the search of the thresholds.
    """
    plan = _combine_argmax_plan(layout(pairs), rows.layouts, layout(row_max), layout(tokens), layout(status),
                                optional_layout(search), optional_layout(least), optional_layout(histogram))
    launch("sampling_records.cu", "combine_argmax", plan.grid, plan.block,
           [pairs, *plan.numbers, rows.temperature, rows.top_k, rows.top_p, rows.min_score, row_max, tokens, status,
            search, least, histogram], pdl=pdl)


def count_digits(logits: Any, temperature: Any, row_max: Any, search: Any, level: int, *, histogram: Any,
                 pdl: bool = False) -> None:
    """Add this rank's tokens by digit `level` to histogram, uint64 [B, (count, mass), bins], for rows that search it.

    The step before has cleared these rows; others stay as they are.
    """
    plan = _count_plan(layout(logits), layout(temperature), layout(row_max), layout(search), level, layout(histogram))
    launch("sampling_logits.cu", "count_digits", plan.grid, plan.block,
           [logits, temperature, row_max, search, histogram, *plan.numbers], defines=plan.defines, pdl=pdl)


def find_digits(histograms: Any, first: Any, level: int, rows: SamplingArrays, *, search: Any, least: Any,
                following: Any, pdl: bool = False) -> None:
    """Find digit `level` in the histograms of all ranks, uint64 [n_ranks, B, 2, bins]; clear those of the next pass.

    first: the histograms of the first pass. following: this rank's own of the next pass, None in the last one.
    The last digit of a row sets least[row].
    """
    plan = _find_plan(layout(histograms), layout(first), level, rows.layouts, layout(search), layout(least),
                      optional_layout(following))
    n_ranks, batch, level_number, following_bins = plan.numbers
    launch("sampling_records.cu", "find_digits", plan.grid, plan.block,
           [histograms, first, n_ranks, batch, level_number, rows.top_k, rows.top_p, rows.min_score, search, least,
            following, following_bins], pdl=pdl)


def draw(logits: Any, vocab_start: int, rows: SamplingArrays, row_max: Any, least: Any, *, parts: Any, tickets: Any,
         pairs: Any, pdl: bool = False) -> None:
    """pairs, uint64 [B] = (greatest score + noise, its id) of this rank's survivors; NO_PAIR where there are none."""
    plan = _draw_plan(layout(logits), vocab_start, rows.layouts, layout(row_max), layout(least), layout(parts),
                      layout(tickets), layout(pairs))
    launch("sampling_logits.cu", "draw", plan.grid, plan.block,
           [logits, rows.temperature, row_max, least, rows.seed, rows.sample_index, rows.position, parts, tickets,
            pairs, *plan.numbers], defines=plan.defines, pdl=pdl)


def combine_draw(pairs: Any, temperature: Any, *, tokens: Any, pdl: bool = False) -> None:
    """tokens, int64 [B], of rows with a temperature above 0, from all ranks' pairs, uint64 [n_ranks, B]."""
    plan = _combine_draw_plan(layout(pairs), layout(temperature), layout(tokens))
    launch("sampling_records.cu", "combine_draw", plan.grid, plan.block,
           [pairs, *plan.numbers, temperature, tokens], pdl=pdl)


# Checks, and what follows from the layouts


@remembered
def _argmax_plan(logits: Layout, vocab_start: int, temperature: Layout, parts: Layout, tickets: Layout,
                 pairs: Layout) -> LaunchPlan:
    op = "row_argmax"
    batch, columns = check_logits(op, logits, vocab_start, _DTYPES)
    check_array(op, "temperature", temperature, (batch,), np.float32)
    blocks = _check_row_max(op, batch, parts, tickets, pairs)
    return LaunchPlan((blocks, batch), THREADS, _defines(logits), (np.int32(columns), np.int64(vocab_start)))


@remembered
def _combine_argmax_plan(pairs: Layout, rows: tuple[Layout, ...], row_max: Layout, tokens: Layout, status: Layout,
                         search: Layout | None, least: Layout | None, histogram: Layout | None) -> LaunchPlan:
    op = "combine_argmax"
    n_ranks, batch = check_gathered(op, "pairs", pairs, "n_ranks, B")
    _check_rows(op, rows, batch)
    for name, array, dtype in (("row_max", row_max, np.float32), ("tokens", tokens, np.int64),
                               ("status", status, np.int32)):
        check_array(op, name, array, (batch,), dtype)
    given = [x is not None for x in (search, least, histogram)]
    if any(given):
        if not all(given):
            raise ConfigError("combine_argmax: search, least and histogram are given together")
        check_array(op, "search", search, (batch, SEARCH_WORDS), np.uint64)
        check_array(op, "least", least, (batch,), np.float32)
        check_array(op, "histogram", histogram, (batch, 2, BINS[0]), np.uint64)
    return LaunchPlan(batch, THREADS if all(given) else WARP, numbers=(np.int32(n_ranks), np.int32(batch)))


@remembered
def _count_plan(logits: Layout, temperature: Layout, row_max: Layout, search: Layout, level: int,
                histogram: Layout) -> LaunchPlan:
    op = "count_digits"
    batch, columns = check_logits(op, logits, 0, _DTYPES)
    for name, array in (("temperature", temperature), ("row_max", row_max)):
        check_array(op, name, array, (batch,), np.float32)
    _check_level(op, level)
    check_array(op, "search", search, (batch, SEARCH_WORDS), np.uint64)
    check_array(op, "histogram", histogram, (batch, 2, BINS[level]), np.uint64)
    return LaunchPlan((blocks_per_row(batch, columns), batch), THREADS, _defines(logits),
                      (np.int32(columns), np.int32(level)))


@remembered
def _find_plan(histograms: Layout, first: Layout, level: int, rows: tuple[Layout, ...], search: Layout, least: Layout,
               following: Layout | None) -> LaunchPlan:
    op = "find_digits"
    n_ranks, batch = check_gathered(op, "histograms", histograms, "n_ranks, B, 2, bins")
    _check_level(op, level)
    check_array(op, "histograms", histograms, (n_ranks, batch, 2, BINS[level]), np.uint64)
    check_array(op, "first", first, (n_ranks, batch, 2, BINS[0]), np.uint64)
    _check_rows(op, rows, batch)
    check_array(op, "search", search, (batch, SEARCH_WORDS), np.uint64)
    check_array(op, "least", least, (batch,), np.float32)
    following_bins = 0
    if following is not None:
        following_bins = BINS[1] if level != 1 else BINS[2]
        check_array(op, "following", following, (batch, 2, following_bins), np.uint64)
    return LaunchPlan(batch, _DIGIT_THREADS, numbers=tuple(map(np.int32, (n_ranks, batch, level, following_bins))))


@remembered
def _draw_plan(logits: Layout, vocab_start: int, rows: tuple[Layout, ...], row_max: Layout, least: Layout,
               parts: Layout, tickets: Layout, pairs: Layout) -> LaunchPlan:
    op = "draw"
    batch, columns = check_logits(op, logits, vocab_start, _DTYPES)
    _check_rows(op, rows, batch)
    for name, array in (("row_max", row_max), ("least", least)):
        check_array(op, name, array, (batch,), np.float32)
    blocks = _check_row_max(op, batch, parts, tickets, pairs)
    return LaunchPlan((blocks, batch), THREADS, _defines(logits), (np.int32(columns), np.int64(vocab_start)))


@remembered
def _combine_draw_plan(pairs: Layout, temperature: Layout, tokens: Layout) -> LaunchPlan:
    op = "combine_draw"
    n_ranks, batch = check_gathered(op, "pairs", pairs, "n_ranks, B")
    check_array(op, "temperature", temperature, (batch,), np.float32)
    check_array(op, "tokens", tokens, (batch,), np.int64)
    return LaunchPlan(-(-batch // THREADS), THREADS, numbers=(np.int32(n_ranks), np.int32(batch)))


def _defines(logits: Layout) -> tuple[str, ...]:
    return (f"DTYPE={DTYPE_DEFINES[logits.dtype.name]}",)


def _check_rows(op: str, rows: tuple[Layout, ...], batch: int) -> None:
    dtypes = np.float32, np.int32, np.float32, np.float32, np.uint64, np.int64, np.int64
    for field, array, dtype in zip(fields(SamplingArrays), rows, dtypes, strict=True):
        check_array(op, f"rows.{field.name}", array, (batch,), dtype)


def _check_row_max(op: str, batch: int, parts: Layout, tickets: Layout, pairs: Layout) -> int:
    """How many blocks share a row: as many as there are parts."""
    check_axes(op, "parts", parts, "B, blocks of a row")
    blocks = parts.shape[1]
    check_array(op, "parts", parts, (batch, blocks), np.uint64)
    if blocks < 1:
        raise ConfigError(f"{op}: parts has shape {parts.shape}; each row needs a block")
    check_array(op, "tickets", tickets, (batch,), np.uint32)
    check_array(op, "pairs", pairs, (batch,), np.uint64)
    return blocks


def _check_level(op: str, level: int) -> None:
    if level not in range(len(BINS)):
        raise ConfigError(f"{op}: level is {level}; it is 0, 1 or 2")
