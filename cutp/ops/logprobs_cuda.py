"""Launchers of logprobs.cu. The specification is `cutp.ops.logprobs`.

Nothing here waits for the device or allocates: everything lies in arrays of the caller.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cutp.array.kernel import launch
from cutp.array.layout import Layout, layout, remembered
from cutp.errors import ConfigError
from cutp.ops.launch_arguments import LaunchPlan, check_array, check_axes
from cutp.ops.vocab_rows_launch import THREADS, WARP, Gather, check_gathered, check_logits

MAX_TOP = 20
TOP_WORD = 3  # of a record: where the top pairs begin
_SLICE_COLUMNS = 8192  # of a block


def slices_per_row(columns: int) -> int:
    """Blocks that share a row in `logprob_records`: from the columns only, as sums of floats depend on it."""
    return max(1, -(-columns // _SLICE_COLUMNS))


def logprobs(logits: Any, vocab_start: int, wanted: Any, targets: Any, gather: Gather, *, parts: Any, tickets: Any,
             records: Any, logprobs: Any, is_greedy: Any, top_ids: Any, top_logprobs: Any, pdl: bool = False) -> None:
    """`logprobs.target_logprobs` and `top_logprobs` for rows with wanted >= 0; others stay as they are.

    gather: as of `sample`, for `records`. Arrays as of `logprob_records` and `combine_logprobs`.
    """
    logprob_records(logits, vocab_start, wanted, targets, parts=parts, tickets=tickets, records=records, pdl=pdl)
    combine_logprobs(gather(records), wanted, targets, logprobs=logprobs, is_greedy=is_greedy, top_ids=top_ids,
                     top_logprobs=top_logprobs, pdl=pdl)


def logprob_records(logits: Any, vocab_start: int, wanted: Any, targets: Any, *, parts: Any, tickets: Any,
                    records: Any, pdl: bool = False) -> None:
    """records, uint64 [B, TOP_WORD + n]: of this rank's columns the greatest pair, sum, target and n top pairs.

    logits: float32 [B, V_local]. wanted: int32 [B], negative for rows that are not wanted. targets: int64 [B].
    parts: uint64 [B, slices_per_row(V_local), TOP_WORD + n]; tickets: uint32 [B], zeros. n is at most MAX_TOP.
    """
    plan = _records_plan(layout(logits), vocab_start, layout(wanted), layout(targets), layout(parts), layout(tickets),
                         layout(records))
    launch("logprobs.cu", "logprob_records", plan.grid, plan.block,
           [logits, wanted, targets, parts, tickets, records, *plan.numbers], pdl=pdl)


def combine_logprobs(records: Any, wanted: Any, targets: Any, *, logprobs: Any, is_greedy: Any, top_ids: Any,
                     top_logprobs: Any, pdl: bool = False) -> None:
    """From all ranks' records, uint64 [n_ranks, B, TOP_WORD + n]: the results for rows with wanted >= 0.

    logprobs: float32 [B], NaN where no rank has the target or the row has no usable logit. is_greedy: bool [B].
    top_ids: int64 [B, n], top_logprobs: float32 [B, n], falling, then -1 and -inf.
    """
    plan = _combine_plan(layout(records), layout(wanted), layout(targets), layout(logprobs), layout(is_greedy),
                         layout(top_ids), layout(top_logprobs))
    n_ranks, batch, n_top = plan.numbers
    launch("logprobs.cu", "combine_logprobs", plan.grid, plan.block,
           [records, n_ranks, batch, wanted, targets, n_top, logprobs, is_greedy, top_ids, top_logprobs], pdl=pdl)


@remembered
def _records_plan(logits: Layout, vocab_start: int, wanted: Layout, targets: Layout, parts: Layout, tickets: Layout,
                  records: Layout) -> LaunchPlan:
    op = "logprob_records"
    batch, columns = check_logits(op, logits, vocab_start)
    check_array(op, "wanted", wanted, (batch,), np.int32)
    check_array(op, "targets", targets, (batch,), np.int64)
    check_axes(op, "records", records, f"B, {TOP_WORD} + n")
    words = records.shape[1]
    _check_top(op, "records", words - TOP_WORD)
    check_array(op, "records", records, (batch, words), np.uint64)
    slices = slices_per_row(columns)
    check_array(op, "parts", parts, (batch, slices, words), np.uint64)
    check_array(op, "tickets", tickets, (batch,), np.uint32)
    return LaunchPlan((slices, batch), THREADS,
                      numbers=(np.int32(columns), np.int64(vocab_start), np.int32(words - TOP_WORD)))


@remembered
def _combine_plan(records: Layout, wanted: Layout, targets: Layout, logprobs: Layout, is_greedy: Layout,
                  top_ids: Layout, top_logprobs: Layout) -> LaunchPlan:
    op = "combine_logprobs"
    n_ranks, batch = check_gathered(op, "records", records, f"n_ranks, B, {TOP_WORD} + n")
    n_top = records.shape[2] - TOP_WORD
    _check_top(op, "records", n_top)
    check_array(op, "wanted", wanted, (batch,), np.int32)
    check_array(op, "targets", targets, (batch,), np.int64)
    check_array(op, "logprobs", logprobs, (batch,), np.float32)
    check_array(op, "is_greedy", is_greedy, (batch,), np.bool_)
    check_array(op, "top_ids", top_ids, (batch, n_top), np.int64)
    check_array(op, "top_logprobs", top_logprobs, (batch, n_top), np.float32)
    return LaunchPlan(batch, WARP, numbers=(np.int32(n_ranks), np.int32(batch), np.int32(n_top)))


def _check_top(op: str, name: str, n_top: int) -> None:
    if not 0 <= n_top <= MAX_TOP:
        raise ConfigError(f"{op}: {name} has room for {n_top} top tokens; from 0 to {MAX_TOP} are possible")
