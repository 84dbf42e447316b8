"""Launchers of penalties.cu. The specification is `cutp.ops.penalties`."""

from __future__ import annotations

from typing import Any

import numpy as np

from cutp.array.kernel import launch
from cutp.errors import ConfigError
from cutp.ops.launch_arguments import check_array, check_axes
from cutp.ops.vocab_rows_launch import THREADS, blocks_per_row, check_logits, check_vocab_start


def apply_penalties(logits: Any, counts: Any, slots: Any, repetition: Any, presence: Any, frequency: Any, *,
                    pdl: bool = False) -> None:
    """`penalties.apply_penalties`: logits float32 [B, V_local], in place; counts int32 [slots, V_local].

    slots: int32 [B], or None where row i has slot i. repetition, presence, frequency: float32 [B].
    """
    op = "apply_penalties"
    batch, columns = check_logits(op, logits, 0)
    _check_counts(op, counts, columns, slots, batch)
    for name, array in (("repetition", repetition), ("presence", presence), ("frequency", frequency)):
        check_array(op, name, array, (batch,), np.float32)
    if columns:
        launch("penalties.cu", op, (blocks_per_row(batch, columns), batch), THREADS,
                [logits, counts, slots, repetition, presence, frequency, np.int32(columns)], pdl=pdl)


def add_logit_bias(logits: Any, vocab_start: int, ids: Any, values: Any, *, pdl: bool = False) -> None:
    """`penalties.add_logit_bias`: logits float32 [B, V_local], in place; ids int32 and values float32 [B, M]."""
    op = "add_logit_bias"
    batch, columns = check_logits(op, logits, vocab_start)
    check_axes(op, "ids", ids, "B, M")
    per_row = ids.shape[1]
    check_array(op, "ids", ids, (batch, per_row), np.int32)
    check_array(op, "values", values, (batch, per_row), np.float32)
    if columns and per_row:
        launch("penalties.cu", op, batch, THREADS,
                [logits, ids, values, np.int32(per_row), np.int32(columns), np.int64(vocab_start)], pdl=pdl)


def count_tokens(counts: Any, vocab_start: int, slots: Any, tokens: Any, *, in_prompt: bool = False,
                 pdl: bool = False) -> None:
    """`penalties.count_tokens`: counts int32 [slots, V_local], in place; slots int32 [n] or None, tokens int64 [n]."""
    op = "count_tokens"
    check_axes(op, "counts", counts, "slots, V_local")
    check_axes(op, "tokens", tokens, "n")
    n, columns = tokens.shape[0], counts.shape[1]
    _check_counts(op, counts, columns, slots, n)
    check_array(op, "tokens", tokens, (n,), np.int64)
    check_vocab_start(op, vocab_start, columns)
    if columns:
        launch("penalties.cu", op, -(-n // THREADS), THREADS,
                [counts, slots, tokens, np.int32(n), np.int32(columns), np.int64(vocab_start), np.int32(in_prompt)],
                pdl=pdl)


def _check_counts(op: str, counts: Any, columns: int, slots: Any, rows: int) -> None:
    check_axes(op, "counts", counts, "slots, V_local")
    check_array(op, "counts", counts, (counts.shape[0], columns), np.int32)
    if slots is not None:
        check_array(op, "slots", slots, (rows,), np.int32)
    elif counts.shape[0] < rows:
        raise ConfigError(f"{op}: counts has shape {counts.shape}; without slots it needs a line for each of "
                          f"{rows} rows")
