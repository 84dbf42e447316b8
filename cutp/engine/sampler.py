"""From logits to the next token of each request, and the log-probabilities that were asked for.

The order, which is vLLM's: logit_bias; min_tokens and bad_words; repetition, frequency and presence penalties;
temperature; top-k, top-p, min-p (`ops.sampling`). Log-probabilities are of the logits before all of these.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cutp.comm.communicator import Communicator
from cutp.engine.logit_rules import LogitRules, apply_rules
from cutp.engine.outputs import TokenLogprobs
from cutp.engine.request import Request
from cutp.ops.logprobs import target_logprobs, top_logprobs
from cutp.ops.penalties import PenaltyRows, apply_penalties, count_tokens
from cutp.ops.sampling import SamplingRows, sample


class Sampler:
    """The sampling parameters of the running requests, one line of every array a slot.

    vocab_start, vocab_stop: this rank's slice of the vocabulary. A draw depends on the logits and on the request's
    seed, sample index and length, so not on its slot, on the batch, or on the number of ranks.
    """

    def __init__(self, vocab_start: int, vocab_stop: int, max_running: int, comm: Communicator):
        self._vocab_start = vocab_start
        self._columns = vocab_stop - vocab_start
        self._comm = comm
        self._settings = SamplingRows(
            temperature=np.zeros(max_running, np.float32),
            top_k=np.zeros(max_running, np.int32),
            top_p=np.ones(max_running, np.float32),
            min_p=np.zeros(max_running, np.float32),
            seed=np.zeros(max_running, np.uint64),
            sample_index=np.zeros(max_running, np.int64),
            position=np.zeros(max_running, np.int64),
        )
        self._logprobs = np.full(max_running, -1)  # likeliest tokens that are wanted; -1: no log-probabilities
        self._rules: list[LogitRules | None] = [None] * max_running
        self._penalties = PenaltyRows(*(np.zeros(max_running, np.float32) for _ in range(3)))
        self._has_penalties = np.zeros(max_running, bool)
        self._has_rules = np.zeros(max_running, bool)
        self._counts: np.ndarray | None = None

    def admit(self, request: Request) -> None:
        """Takes the parameters of a request into its slot; also after a preemption, in the middle of its output."""
        params, slot = request.params, request.slot
        if params is None:
            return
        for name in ("temperature", "top_k", "top_p", "min_p", "seed"):
            getattr(self._settings, name)[slot] = getattr(params, name)
        self._settings.sample_index[slot] = request.sample_index
        self._logprobs[slot] = -1 if params.logprobs is None else params.logprobs
        self._rules[slot] = LogitRules(request) or None
        self._has_rules[slot] = self._rules[slot] is not None
        penalties = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
        self._has_penalties[slot] = penalties != (1.0, 0.0, 0.0)
        for values, value in zip(vars(self._penalties).values(), penalties, strict=True):
            values[slot] = value
        if self._has_penalties[slot]:
            self._count_again(request)

    def sample(self, logits_local: np.ndarray, requests: Sequence[Request]) -> np.ndarray:
        """The next token of each request, int64 [B], equal on all ranks. Collective.

        logits_local: float32 [B, V_local], which stay as they are. The tokens count as generated from now on, so each
        is to be appended to its request. Raises CutpError, on all ranks, where a row holds a NaN or only -inf.
        """
        slots = np.array([request.slot for request in requests], np.int64)
        rows = self._settings.take(slots)
        rows.position = np.array([request.length for request in requests], np.int64)
        ruled, penalized = self._has_rules[slots].any(), self._has_penalties[slots]
        if ruled or penalized.any():
            logits_local = logits_local.copy()
        if ruled:
            apply_rules(logits_local, self._vocab_start, requests, [self._rules[slot] for slot in slots])
        if not penalized.any():
            return sample(logits_local, self._vocab_start, rows, self._comm)
        lines = np.where(penalized, slots, -1)
        penalties = PenaltyRows(**{name: values[slots] for name, values in vars(self._penalties).items()})
        apply_penalties(logits_local, self._counts, lines, penalties)
        tokens = sample(logits_local, self._vocab_start, rows, self._comm)
        count_tokens(self._counts, self._vocab_start, lines, tokens)
        return tokens

    def record_logprobs(self, logits_local: np.ndarray, requests: Sequence[Request], tokens: Sequence[int]) -> None:
        """Adds the log-probabilities of the tokens [B] to the requests that want them, equal on all ranks. Collective.

        logits_local: float32 [B, V_local], as the model computed them.
        """
        counts = self._logprobs[[request.slot for request in requests]]
        wanted = np.flatnonzero(counts >= 0)
        if not len(wanted):
            return
        logits, chosen = logits_local[wanted], np.asarray(tokens)[wanted]
        values, _ = target_logprobs(logits, self._vocab_start, chosen, self._comm)
        ids, likeliest = top_logprobs(logits, self._vocab_start, int(counts.max()), self._comm)
        columns = zip(wanted, chosen.tolist(), values.tolist(), ids.tolist(), likeliest.tolist(), strict=True)
        for row, token, value, row_ids, row_values in columns:
            pairs = tuple(zip(row_ids, row_values, strict=True))[: counts[row]]
            top = tuple(pair for pair in pairs if pair[0] >= 0)  # a small vocabulary has fewer
            requests[row].logprobs.append(TokenLogprobs(token, value, top))

    def _count_again(self, request: Request) -> None:
        if self._counts is None:
            # Lines are memory only once they are written to, so what no request with penalties uses costs nothing.
            self._counts = np.zeros((len(self._logprobs), self._columns), np.int32)
        self._counts[request.slot] = 0
        for tokens, in_prompt in ((request.prompt_token_ids, True), (request.generated, False)):
            slots = np.full(len(tokens), request.slot)
            count_tokens(self._counts, self._vocab_start, slots, np.array(tokens, np.int64), in_prompt=in_prompt)
