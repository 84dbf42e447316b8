"""Penalties on tokens that a sequence already has, and additions to the logits of given tokens.

They change the logits before anything else happens to them, on each rank its own columns, without communication.
Counts are kept per sequence ("slot") in a table int32 [slots, V_local], sharded like the logits. An entry is the
number of times the token was generated, plus PROMPT_FLAG if the prompt has it.

For a token in the prompt or generated: repetition divides positive logits and multiplies negative ones (Hugging Face's
RepetitionPenaltyLogitsProcessor; Keskar et al., "CTRL", 2019). For generated tokens only: frequency is subtracted once
for each time, and presence once (OpenAI's API; engines agree that the prompt does not count). They apply in this
order. A bias of -inf forbids a token, before or after penalties. Temperature is none of this: `sampling.scores` divides
by it after subtracting the row's maximum.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cutp.errors import ConfigError, RequestError
from cutp.ops.sampling_keys import row_blocks

PROMPT_FLAG = 1 << 30
GENERATED = PROMPT_FLAG - 1  # the bits that hold the number


@dataclass
class PenaltyRows:
    """The penalties of each of B rows, float32 [B]; repetition 1 and the others 0 change nothing."""

    repetition: np.ndarray
    presence: np.ndarray
    frequency: np.ndarray

    def checked(self) -> PenaltyRows:
        """The same as float32. Raises RequestError naming the row of a value out of range."""
        rows = PenaltyRows(**{name: np.asarray(values, np.float32) for name, values in vars(self).items()})
        shapes = {name: values.shape for name, values in vars(rows).items()}
        if len(set(shapes.values())) != 1 or rows.repetition.ndim != 1:
            raise ConfigError(f"penalties must be one-dimensional and equally long: {shapes}")
        for name, values in vars(rows).items():
            good = np.isfinite(values) & (values > 0 if name == "repetition" else True)
            if not good.all():
                row = int(np.argmin(good))
                raise RequestError(f"row {row} of the batch: {name} penalty {values[row]} is out of range")
        return rows


def apply_penalties(logits_local: np.ndarray, counts: np.ndarray, slots: np.ndarray, rows: PenaltyRows) -> None:
    """Change the logits, float32 [B, V_local], in place.

    counts: int32 [slots, V_local]. slots: integers [B], the line of `counts` of each row; a negative one has none, and
    its row stays as it is. Each operation is one in float32.
    """
    rows = rows.checked()
    _check(logits_local, counts)
    slots = np.asarray(slots)
    used = np.flatnonzero(slots >= 0)
    for block in row_blocks(len(used), logits_local.shape[1]):
        counted = counts[slots[used[block]]]
        row, ids = np.divmod(np.flatnonzero(counted != 0), counted.shape[1])
        generated, row = counted[row, ids] & GENERATED, used[block][row]
        x = logits_local[row, ids]
        x = np.where(x < 0, x * rows.repetition[row], x / rows.repetition[row])
        x -= rows.frequency[row] * generated.astype(np.float32)
        logits_local[row, ids] = np.where(generated > 0, x - rows.presence[row], x)


def add_logit_bias(logits_local: np.ndarray, vocab_start: int, ids: np.ndarray, values: np.ndarray) -> None:
    """Add values[b, i] to the logit of token ids[b, i] in row b, in place, where this rank has the token.

    logits_local: float32 [B, V_local], the columns from token id `vocab_start` on. ids: integers [B, M], those of a
    row different from each other, a negative one adds nothing. values: float32 [B, M].
    """
    columns = np.asarray(ids, np.int64) - vocab_start
    row, place = np.nonzero((ids >= 0) & (columns >= 0) & (columns < logits_local.shape[1]))
    logits_local[row, columns[row, place]] += values[row, place]


def count_tokens(counts: np.ndarray, vocab_start: int, slots: np.ndarray, tokens: np.ndarray, *,
                 in_prompt: bool = False) -> None:
    """Note in the table, in place, that the sequence in slots[i] has tokens[i], generated or in its prompt.

    counts: int32 [slots, V_local], the columns from token id `vocab_start` on. slots, tokens: integers [n]; nothing
    happens where one of them is negative or another rank has the token.
    """
    tokens, slots = np.asarray(tokens, np.int64), np.asarray(slots)
    columns = tokens - vocab_start
    mine = (slots >= 0) & (tokens >= 0) & (columns >= 0) & (columns < counts.shape[1])
    place = slots[mine], columns[mine]
    if in_prompt:
        counts[place] |= PROMPT_FLAG
    else:
        np.add.at(counts, place, 1)


def _check(logits_local: np.ndarray, counts: np.ndarray) -> None:
    if logits_local.ndim != 2 or logits_local.dtype != np.float32:
        raise ConfigError(f"logits must be float32 [rows, vocab], not {logits_local.dtype} {logits_local.shape}")
    if counts.ndim != 2 or counts.dtype != np.int32 or counts.shape[1] != logits_local.shape[1]:
        raise ConfigError(f"counts must be int32 [slots, {logits_local.shape[1]}], not {counts.dtype} {counts.shape}")
