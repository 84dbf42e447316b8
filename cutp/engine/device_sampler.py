"""`Sampler` on a GPU: the rules and draws are kernels, the parameters stay with the slots on the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cutp.array.scratch import Memory, scratch
from cutp.comm.communicator import Communicator
from cutp.engine.device_scores import DeviceScores
from cutp.engine.logit_rules import additions
from cutp.engine.outputs import TokenLogprobs
from cutp.engine.pending_tokens import checked_tokens
from cutp.engine.request import Request
from cutp.engine.sampler import Sampler
from cutp.ops.penalties_cuda import add_logit_bias, apply_penalties, count_tokens
from cutp.ops.sampling import SamplingRows
from cutp.ops.sampling_cuda import SamplingArrays, SamplingBuffers, buffer_shapes, greedy, passes_needed, sample


class DeviceSampler(Sampler):
    """See `Sampler`; logits are device arrays, tokens come back as NumPy's."""

    def __init__(self, vocab_start: int, vocab_stop: int, max_running: int, comm: Communicator, memory: Memory):
        super().__init__(vocab_start, vocab_stop, max_running, comm)
        self._memory = memory
        self._scores = DeviceScores(memory, comm)
        self._device_counts: Any = None

    def is_plain(self, requests: Sequence[Request]) -> bool:
        """Whether tokens are drawn from the logits as they are, and nothing else is wanted of them."""
        slots = [request.slot for request in requests]
        return not (self._has_rules[slots].any() or self._has_penalties[slots].any()
                    or (self._logprobs[slots] >= 0).any())

    def rows(self, requests: Sequence[Request]) -> SamplingRows:
        """The parameters of `requests`, with the positions of their next tokens."""
        rows = self._settings.take(np.array([request.slot for request in requests], np.int64))
        rows.position = np.array([request.length for request in requests], np.int64)
        return rows

    def sample(self, logits_local: Any, requests: Sequence[Request]) -> np.ndarray:
        slots = np.array([request.slot for request in requests], np.int64)
        rows, up = self.rows(requests), self._scores.uploaded
        penalized = self._has_penalties[slots]
        if self._has_rules[slots].any() or penalized.any():
            unchanged = logits_local
            logits_local = scratch().empty(unchanged.shape, unchanged.dtype)
            logits_local[...] = unchanged
        for ids, values in additions(requests, [self._rules[slot] for slot in slots]):
            add_logit_bias(logits_local, self._vocab_start, up(ids, np.int32), up(values, np.float32), pdl=True)
        lines = None
        if penalized.any():
            lines = up(np.where(penalized, slots, -1), np.int32)
            penalties = (up(values[slots], np.float32) for values in vars(self._penalties).values())
            apply_penalties(logits_local, self._device_counts, lines, *penalties, pdl=True)
        tokens = self._draw(logits_local, rows)
        if lines is not None:
            count_tokens(self._device_counts, self._vocab_start, lines, tokens, pdl=True)
        return checked_tokens(self._scores.fetched(tokens))

    def record_logprobs(self, logits_local: Any, requests: Sequence[Request], tokens: Sequence[int]) -> None:
        counts = self._logprobs[[request.slot for request in requests]]
        if not (counts >= 0).any():
            return
        scored = self._scores.logprobs(logits_local, self._vocab_start, tokens, int(counts.max()))
        for request, count, token, (value, _, likeliest) in zip(requests, counts, tokens, scored, strict=True):
            if count >= 0:
                request.logprobs.append(TokenLogprobs(token, value, tuple(likeliest[:count])))

    def _draw(self, logits: Any, rows: SamplingRows) -> Any:
        """int64 [B] on the device."""
        count = len(rows)
        shapes = buffer_shapes(count, logits.shape[1])
        arrays = {name: scratch().empty(*shape) for name, shape in shapes.items() if name != "histograms"}
        arrays["tickets"][...] = 0
        histograms = tuple(scratch().empty(*shape) for shape in shapes["histograms"])
        buffers = SamplingBuffers(**arrays, histograms=histograms)
        tokens = scratch().empty(count, np.int64)
        on_device = SamplingArrays.of(rows, lambda values: self._scores.uploaded(values, values.dtype))
        arguments = logits, self._vocab_start, on_device, buffers, self._scores.gather
        if (np.asarray(rows.temperature) > 0).any():
            sample(*arguments, tokens=tokens, passes=passes_needed(rows), pdl=True)
        else:
            greedy(*arguments, tokens=tokens, pdl=True)
        return tokens

    def _count_again(self, request: Request) -> None:
        if self._device_counts is None:
            self._device_counts = self._memory.empty((len(self._logprobs), self._columns), np.int32)
        self._device_counts[request.slot] = 0
        for tokens, in_prompt in ((request.prompt_token_ids, True), (request.generated, False)):
            if tokens:
                slots = self._scores.uploaded(np.full(len(tokens), request.slot), np.int32)
                count_tokens(self._device_counts, self._vocab_start, slots,
                             self._scores.uploaded(tokens, np.int64), in_prompt=in_prompt, pdl=True)
