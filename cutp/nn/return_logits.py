"""Which rows of a ragged batch become logits, and in which shape they are returned."""

from __future__ import annotations

from enum import Enum

import numpy as np

from cutp.errors import RequestError


class ReturnLogits(Enum):
    """LAST_TOKEN: the last token of each request. VARIABLE: the last n of each. ALL: every token."""

    LAST_TOKEN = "last_token"
    VARIABLE = "variable"
    ALL = "all"


def logit_rows(mode: ReturnLogits, input_row_offsets: np.ndarray, n: int = 1) -> np.ndarray:
    """The rows of the ragged batch whose logits `mode` needs, int [R].

    LAST_TOKEN: R = B. VARIABLE: R = B * n, in order. ALL: R = T. RequestError naming the first request with fewer
    tokens than the mode needs of each: n for VARIABLE, one otherwise.
    """
    ends = np.asarray(input_row_offsets[1:], np.int64)
    count = n if mode is ReturnLogits.VARIABLE else 1
    if count < 1:
        raise RequestError(f"VARIABLE logits need at least one token a request, not {count}")
    lengths = np.diff(input_row_offsets)
    short = np.flatnonzero(lengths < count)
    if len(short):
        raise RequestError(f"request {short[0]} of the batch has {lengths[short[0]]} tokens, "
                           f"but logits of its last {count} were asked for")
    if mode is ReturnLogits.ALL:
        return np.arange(input_row_offsets[-1])
    return (ends[:, None] + np.arange(-count, 0)).ravel()
