"""From logits to the next token of each request, and the log-probabilities that were asked for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cutp.comm.communicator import Communicator
from cutp.engine.outputs import TokenLogprobs
from cutp.engine.request import Request
from cutp.ops.logprobs import target_logprobs, top_logprobs
from cutp.ops.sampling import SamplingRows, sample


def sample_next(logits_local: np.ndarray, vocab_start: int, requests: Sequence[Request],
                comm: Communicator) -> list[int]:
    """One token for each request, from this rank's slice of the logits, float32 [B, V_local]; equal on all ranks."""
    params = [request.params for request in requests]
    rows = SamplingRows(
        temperature=np.array([p.temperature for p in params]),
        top_k=np.array([p.top_k for p in params]),
        top_p=np.array([p.top_p for p in params]),
        min_p=np.array([p.min_p for p in params]),
        seed=np.array([p.seed for p in params], np.uint64),
        sample_index=np.zeros(len(params), np.int64),
        position=np.array([request.length for request in requests]),
    )
    return sample(logits_local, vocab_start, rows, comm).tolist()


def record_logprobs(logits_local: np.ndarray, vocab_start: int, requests: Sequence[Request], tokens: Sequence[int],
                    comm: Communicator) -> None:
    """Adds the log-probabilities of `tokens` to the requests that want them, under the unmodified logits."""
    wanted = [i for i, request in enumerate(requests) if request.params.logprobs is not None]
    if not wanted:
        return
    logits = logits_local[wanted]
    chosen, _ = target_logprobs(logits, vocab_start, np.array([tokens[i] for i in wanted]), comm)
    ids, values = top_logprobs(logits, vocab_start, max(requests[i].params.logprobs for i in wanted), comm)
    for row, i in enumerate(wanted):
        count = requests[i].params.logprobs
        top = tuple((int(t), float(v)) for t, v in zip(ids[row, :count], values[row, :count], strict=True) if t >= 0)
        requests[i].logprobs.append(TokenLogprobs(tokens[i], float(chosen[row]), top))
