"""What a request adds to its logits, and which tokens it forbids at the moment."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from cutp.engine.request import Request
from cutp.ops.penalties import add_logit_bias


class LogitRules:
    """logit_bias, min_tokens and bad_words of one request; token ids are of the whole vocabulary."""

    def __init__(self, request: Request):
        params = request.params
        self.bias_ids = np.array([token for token, _ in params.logit_bias], np.int64)
        self.bias = np.array([bias for _, bias in params.logit_bias], np.float32)
        self._min_tokens = params.min_tokens if request.end_token_ids else 0
        self._always = {word[0] for word in params.bad_words if len(word) == 1}
        self._before_min_tokens = self._always | request.end_token_ids
        # By the token before the forbidden one, so that a step looks only at the words that may be under way.
        self._words: dict[int, list[tuple[list[int], int]]] = defaultdict(list)
        for *start, last in params.bad_words:
            if start:
                self._words[start[-1]].append((start, last))

    def __bool__(self) -> bool:
        """Whether there is anything to do, now or later."""
        return bool(len(self.bias_ids) or self._min_tokens or self._always or self._words)

    def forbidden(self, request: Request) -> set[int]:
        """The tokens that must not come next: those that end the request too early, and last ones of bad words."""
        tokens = self._before_min_tokens if len(request.generated) < self._min_tokens else self._always
        length = request.length
        words = self._words.get(request.tokens(length - 1, length)[0], ()) if self._words else ()
        under_way = {last for start, last in words
                     if len(start) <= length and request.tokens(length - len(start), length) == start}
        return tokens | under_way if under_way else tokens


def apply_rules(logits_local: np.ndarray, vocab_start: int, requests: Sequence[Request],
                rules: Sequence[LogitRules | None]) -> None:
    """Changes the logits, float32 [B, V_local] from token id `vocab_start` on, in place."""
    for ids, values in additions(requests, rules):
        add_logit_bias(logits_local, vocab_start, ids, values)


def additions(requests: Sequence[Request], rules: Sequence[LogitRules | None]) -> list[tuple[np.ndarray, np.ndarray]]:
    """What is to be added to the logits of B requests, in this order: (ids int32 [B, M], values float32 [B, M]), with
    the id -1 where a row has fewer than the longest one.

    The bias comes first, and a forbidden token gets -inf, so that no bias and no penalty brings it back.
    """
    used = [(row, rule, rule.forbidden(requests[row])) for row, rule in enumerate(rules) if rule is not None]
    biases = [(row, rule.bias_ids, rule.bias) for row, rule, _ in used if len(rule.bias_ids)]
    forbidden = [(row, list(ids), -np.inf) for row, _, ids in used if ids]
    return [_padded(len(requests), each) for each in (biases, forbidden) if each]


def _padded(count: int, rows: list) -> tuple[np.ndarray, np.ndarray]:
    """(row, token ids, values) of some of `count` rows as two arrays."""
    most = max(len(ids) for _, ids, _ in rows)
    all_ids = np.full((count, most), -1, np.int32)
    all_values = np.zeros((count, most), np.float32)
    for row, ids, values in rows:
        all_ids[row, : len(ids)] = ids
        all_values[row, : len(ids)] = values
    return all_ids, all_values
