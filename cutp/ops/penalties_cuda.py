"""Launchers of penalties.cu. The specification is `cutp.ops.penalties`."""

from __future__ import annotations

from typing import Any

import numpy as np

from cutp.array.kernel import launch
from cutp.array.layout import Layout, layout, optional_layout, remembered
from cutp.errors import ConfigError
from cutp.ops.launch_arguments import LaunchPlan, check_array, check_axes
from cutp.ops.vocab_rows_launch import THREADS, blocks_per_row, check_logits, check_vocab_start


def apply_penalties(logits: Any, counts: Any, slots: Any, repetition: Any, presence: Any, frequency: Any, *,
                    pdl: bool = False) -> None:
    """`penalties.apply_penalties`: logits float32 [B, V_local], in place; counts int32 [slots, V_local].

    slots: int32 [B], or None where row i has slot i. repetition, presence, frequency: float32 [B].
    """
    plan = _penalties_plan(layout(logits), layout(counts), optional_layout(slots), layout(repetition), layout(presence),
                           layout(frequency))
    if plan is not None:
        launch("penalties.cu", "apply_penalties", plan.grid, plan.block,
               [logits, counts, slots, repetition, presence, frequency, *plan.numbers], pdl=pdl)


def add_logit_bias(logits: Any, vocab_start: int, ids: Any, values: Any, *, pdl: bool = False) -> None:
    """`penalties.add_logit_bias`: logits float32 [B, V_local], in place; ids int32 and values float32 [B, M]."""
    plan = _bias_plan(layout(logits), vocab_start, layout(ids), layout(values))
    if plan is not None:
        launch("penalties.cu", "add_logit_bias", plan.grid, plan.block, [logits, ids, values, *plan.numbers], pdl=pdl)


def count_tokens(counts: Any, vocab_start: int, slots: Any, tokens: Any, *, in_prompt: bool = False,
                 pdl: bool = False) -> None:
    """`penalties.count_tokens`: counts int32 [slots, V_local], in place; slots int32 [n] or None, tokens int64 [n]."""
    plan = _count_plan(layout(counts), vocab_start, optional_layout(slots), layout(tokens))
    if plan is not None:
        launch("penalties.cu", "count_tokens", plan.grid, plan.block,
               [counts, slots, tokens, *plan.numbers, np.int32(in_prompt)], pdl=pdl)


@remembered
def _penalties_plan(logits: Layout, counts: Layout, slots: Layout | None, repetition: Layout, presence: Layout,
                    frequency: Layout) -> LaunchPlan | None:
    op = "apply_penalties"
    batch, columns = check_logits(op, logits, 0)
    _check_counts(op, counts, columns, slots, batch)
    for name, array in (("repetition", repetition), ("presence", presence), ("frequency", frequency)):
        check_array(op, name, array, (batch,), np.float32)
    if columns == 0:
        return None
    return LaunchPlan((blocks_per_row(batch, columns), batch), THREADS, numbers=(np.int32(columns),))


@remembered
def _bias_plan(logits: Layout, vocab_start: int, ids: Layout, values: Layout) -> LaunchPlan | None:
    op = "add_logit_bias"
    batch, columns = check_logits(op, logits, vocab_start)
    check_axes(op, "ids", ids, "B, M")
    per_row = ids.shape[1]
    check_array(op, "ids", ids, (batch, per_row), np.int32)
    check_array(op, "values", values, (batch, per_row), np.float32)
    if columns == 0 or per_row == 0:
        return None
    return LaunchPlan(batch, THREADS, numbers=(np.int32(per_row), np.int32(columns), np.int64(vocab_start)))


@remembered
def _count_plan(counts: Layout, vocab_start: int, slots: Layout | None, tokens: Layout) -> LaunchPlan | None:
    op = "count_tokens"
    check_axes(op, "counts", counts, "slots, V_local")
    check_axes(op, "tokens", tokens, "n")
    n, columns = tokens.shape[0], counts.shape[1]
    _check_counts(op, counts, columns, slots, n)
    check_array(op, "tokens", tokens, (n,), np.int64)
    check_vocab_start(op, vocab_start, columns)
    if columns == 0:
        return None
    return LaunchPlan(-(-n // THREADS), THREADS, numbers=(np.int32(n), np.int32(columns), np.int64(vocab_start)))


def _check_counts(op: str, counts: Layout, columns: int, slots: Layout | None, rows: int) -> None:
    check_axes(op, "counts", counts, "slots, V_local")
    check_array(op, "counts", counts, (counts.shape[0], columns), np.int32)
    if slots is not None:
        check_array(op, "slots", slots, (rows,), np.int32)
    elif counts.shape[0] < rows:
        raise ConfigError(f"{op}: counts has shape {counts.shape}; without slots it needs a line for each of "
                          f"{rows} rows")
