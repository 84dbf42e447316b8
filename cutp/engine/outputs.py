"""What a request gives back."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np


@dataclass(frozen=True)
class TokenLogprobs:
    """One token's log-probability, and the likeliest tokens at its place as (token id, log-probability)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class GenerationOutput:
    """The result of one sample of one prompt, equal on every rank.

    index: the prompt's place in the call, or the id of a request that was added. sample_index: 0 .. n - 1.
    token_ids: generated tokens, with the one that ended the request. text: their text without special tokens, cut
    before a stop string; None when the model has no tokenizer. finish_reason: "stop" (end-of-sequence token, stop
    token or stop string), "length" (max_tokens or the model's context is used up) or "cancelled". seed: the one that
    was used. logprobs: one entry a generated token when they were asked for, else None. prompt_logprobs: one entry a
    prompt token when they were asked for, None for the first token, which nothing predicts.
    """

    index: int | str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str | None
    finish_reason: str
    seed: int
    logprobs: tuple[TokenLogprobs, ...] | None = None
    sample_index: int = 0
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields, JSON-safe."""
        return asdict(self)

    @staticmethod
    def from_dict(d: dict[str, Any]) -> GenerationOutput:
        """The output that `to_dict` described, also after JSON has made lists of its tuples."""
        return GenerationOutput(**{
            **d, "prompt_token_ids": tuple(d["prompt_token_ids"]), "token_ids": tuple(d["token_ids"]),
            "logprobs": _token_logprobs(d["logprobs"]), "prompt_logprobs": _token_logprobs(d["prompt_logprobs"])})


class StreamEvent(NamedTuple):
    """What one step brought to one request: text that is new and certain, and the result once it is complete."""

    index: int | str
    text: str
    output: GenerationOutput | None
    sample_index: int = 0


@dataclass(frozen=True)
class ScoreOutput:
    """Natural log-probabilities of tokens, each given all tokens before it.

    token_ids: the tokens that were scored: a text's, or only the continuation's when a (context, continuation) pair was
    given; then context_token_ids holds the context. logprobs: one a token; None for the first token of a text without
    a context, which nothing predicts. greedy: whether each token is the likeliest one at its place, None likewise.
    """

    index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float | None, ...]
    greedy: tuple[bool | None, ...] = ()
    context_token_ids: tuple[int, ...] = ()

    @property
    def logprob(self) -> float:
        """The sum of the log-probabilities, 0 when there are none."""
        return math.fsum(value for value in self.logprobs if value is not None)

    @property
    def is_greedy(self) -> bool:
        """Whether greedy decoding would have chosen every token that was predicted."""
        return all(flag for flag in self.greedy if flag is not None)

    @property
    def perplexity(self) -> float | None:
        """exp of the negative mean log-probability; None when no token was predicted, infinity when it overflows."""
        return _perplexity(self.logprob, sum(value is not None for value in self.logprobs))


@dataclass(frozen=True)
class PerplexityOutput:
    """A text scored in rolling windows, every token predicted once.

    logprob: the sum over its tokens, natural. num_tokens: tokens that were predicted. num_bytes: UTF-8 bytes of the
    text, None for token ids.
    """

    index: int
    logprob: float
    num_tokens: int
    num_bytes: int | None

    @property
    def perplexity(self) -> float | None:
        """exp of the negative mean log-probability a token; None for an empty text."""
        return _perplexity(self.logprob, self.num_tokens)

    @property
    def bits_per_byte(self) -> float | None:
        """Bits to encode a byte of the text with the model; None for token ids and for an empty text."""
        return -self.logprob / math.log(2) / self.num_bytes if self.num_bytes else None


@dataclass(frozen=True)
class HiddenStatesOutput:
    """Hidden states of one prompt, in the numbering of Hugging Face's `output_hidden_states`.

    layers: the numbers, 0 .. L: 0 the embeddings, i after block i, L (of L blocks) after the final norm. array:
    float32 [layers, tokens, dim], or [layers, dim] when pooled; None on a rank that did not ask for it. It exports
    itself by DLPack.
    """

    index: int
    token_ids: tuple[int, ...]
    layers: tuple[int, ...]
    array: np.ndarray | None

    def numpy(self) -> np.ndarray:
        """The array on the host."""
        return self.array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def _perplexity(logprob: float, count: int) -> float | None:
    if not count:
        return None
    mean = logprob / count
    return math.exp(-mean) if -mean < 709.0 else math.inf


def _token_logprobs(entries) -> tuple[TokenLogprobs | None, ...] | None:
    if entries is None:
        return None
    return tuple(e and TokenLogprobs(e["token_id"], e["logprob"], tuple((t, v) for t, v in e["top"])) for e in entries)
