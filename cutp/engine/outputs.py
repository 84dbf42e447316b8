"""What a request gives back."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class TokenLogprobs:
    """One generated token's log-probability, and the likeliest tokens there as (token id, log-probability)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class GenerationOutput:
    """The result of one prompt, equal on every rank.

    token_ids: generated tokens, with the one that ended the request. text: their text without special tokens, cut
    before a stop string; None when the model has no tokenizer. finish_reason: "stop" (end-of-sequence token, stop
    token or stop string) or "length" (max_tokens or the model's context is used up). seed: the one that was used.
    logprobs: one entry a generated token when they were asked for, else None.
    """

    index: int
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str | None
    finish_reason: str
    seed: int
    logprobs: tuple[TokenLogprobs, ...] | None = None


@dataclass(frozen=True)
class ScoreOutput:
    """Natural log-probabilities of a text's tokens, each given the tokens before it; the first is None."""

    index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float | None, ...]

    @property
    def perplexity(self) -> float | None:
        """exp of the negative mean log-probability; None for a single token, infinity when it overflows."""
        values = self.logprobs[1:]
        if not values:
            return None
        mean = math.fsum(values) / len(values)
        return math.exp(-mean) if -mean < 709.0 else math.inf
