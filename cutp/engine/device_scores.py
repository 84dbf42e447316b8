"""Log-probabilities on a GPU, as lists on the host."""

from __future__ import annotations

from typing import Any

import numpy as np

from cutp.array.scratch import Memory, scratch
from cutp.comm.communicator import Communicator
from cutp.ops.logprobs_cuda import TOP_WORD, logprobs, slices_per_row


class DeviceScores:
    """Scores tokens under logits that are divided by vocabulary over the ranks of `comm`."""

    def __init__(self, memory: Memory, comm: Communicator):
        self._memory = memory
        self._comm = comm

    def uploaded(self, values: Any, dtype: Any) -> Any:
        """`values` as an array in scratch memory."""
        host = np.ascontiguousarray(values, dtype)
        target = scratch().empty(host.shape, dtype)
        self._memory.upload(target, host)
        return target

    def zeros(self, shape: Any, dtype: Any) -> Any:
        """Zeros in scratch memory."""
        array = scratch().empty(shape, dtype)
        array[...] = 0
        return array

    def gather(self, x: Any) -> Any:
        """The ranks' x in rank order, [n_ranks, *x.shape]."""
        size = self._comm.size
        return x[None] if size == 1 else self._comm.all_gather(x[None], axis=0, sizes=(1,) * size)

    def fetched(self, x: Any) -> np.ndarray:
        """`x` on the host; a rank that has failed meanwhile is heard of."""
        if self._comm.size > 1:
            self._comm.wait()
        return self._memory.numpy(x)

    def logprobs(self, logits: Any, vocab_start: int, targets: Any,
                 top: int) -> list[tuple[float, bool, list[tuple[int, float]]]]:
        """(log p(targets[i]), whether it is the likeliest token, the `top` likeliest ones) for each row of `logits`,
        float32 [R, V_local]; equal on all ranks."""
        count, columns = logits.shape
        empty = scratch().empty
        out = {"logprobs": empty(count, np.float32), "is_greedy": empty(count, np.bool_),
               "top_ids": empty((count, top), np.int64), "top_logprobs": empty((count, top), np.float32)}
        logprobs(logits, vocab_start, self.zeros(count, np.int32), self.uploaded(targets, np.int64), self.gather,
                 parts=empty((count, slices_per_row(columns), TOP_WORD + top), np.uint64),
                 tickets=self.zeros(count, np.uint32), records=empty((count, TOP_WORD + top), np.uint64), **out,
                 pdl=True)
        values, greedy, ids, tops = (self.fetched(array).tolist() for array in out.values())
        likeliest = [[pair for pair in zip(*row, strict=True) if pair[0] >= 0] for row in zip(ids, tops, strict=True)]
        return list(zip(values, greedy, likeliest, strict=True))
