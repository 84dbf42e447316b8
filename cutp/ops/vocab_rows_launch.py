"""What the launchers on vocabulary shards share: how rows are divided into blocks, and checks of their arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from cutp.array.layout import Layout
from cutp.errors import ConfigError
from cutp.ops.launch_arguments import check_array, check_axes, check_dtype

MAX_COLUMNS = 1 << 18  # of one rank's shard
MAX_ROWS = 65535  # blocks along y
TOKEN_IDS = 1 << 32

# Of the kernels.
THREADS, WARP = 256, 32
_GROUP = 4  # logits that a thread works on together
_BLOCKS = 528  # that fill a large GPU

Gather = Callable[[Any], Any]


def blocks_per_row(batch: int, columns: int) -> int:
    """Blocks that share a row in the integer kernels, whose results do not depend on it."""
    useful = -(-columns // (THREADS * _GROUP))
    return max(1, min(_BLOCKS // max(1, batch), useful))


def check_logits(op: str, logits: Layout, vocab_start: int,
                 dtypes: tuple[str, ...] = ("float32",)) -> tuple[int, int]:
    """The rows and columns of logits, contiguous [B, V_local] of one of these dtypes. ConfigError otherwise."""
    check_axes(op, "logits", logits, "B, V_local")
    check_dtype(op, "logits", logits, dtypes)
    batch, columns = logits.shape
    check_array(op, "logits", logits, (batch, columns))
    if batch > MAX_ROWS or columns > MAX_COLUMNS:
        raise ConfigError(f"{op}: logits of shape {logits.shape}; at most {MAX_ROWS} rows of {MAX_COLUMNS} columns "
                          "are possible")
    check_vocab_start(op, vocab_start, columns)
    return batch, columns


def check_vocab_start(op: str, vocab_start: int, columns: int) -> None:
    if not 0 <= vocab_start <= TOKEN_IDS - columns:
        raise ConfigError(f"{op}: vocab_start is {vocab_start}; token ids are from 0 to {TOKEN_IDS - 1}")


def check_gathered(op: str, name: str, array: Layout, axes: str) -> tuple[int, int]:
    check_axes(op, name, array, axes)
    n_ranks, batch = array.shape[:2]
    check_array(op, name, array, array.shape, np.uint64)
    if n_ranks < 1:
        raise ConfigError(f"{op}: {name} has shape {array.shape}; it needs one rank or more")
    return n_ranks, batch
