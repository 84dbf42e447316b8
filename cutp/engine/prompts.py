"""Prompts and parameters as callers write them, in one plain form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cutp.engine.sampling_params import SamplingParams
from cutp.errors import InvalidTokenError, PromptTooLongError, RequestError


def plain_prompts(prompts: Any) -> list[str | list[int]]:
    """Prompts as strings and lists of ints, JSON-safe.

    Accepts one prompt or a sequence of them; a prompt is a string or a sequence of token ids (list, tuple, NumPy array
    or whatever NumPy turns into a one-dimensional integer array). Raises RequestError naming the prompt.
    """
    if isinstance(prompts, str) or _is_ids(prompts):
        prompts = [prompts]
    try:
        prompts = list(prompts)
    except TypeError:
        raise RequestError(f"prompts are a {type(prompts).__name__}, not text, token ids or a list of these") from None
    return [prompt if isinstance(prompt, str) else _ids(prompt, index) for index, prompt in enumerate(prompts)]


def each_params(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    """One SamplingParams a prompt, checked; RequestError when one is bad or their number does not fit."""
    if params is None or isinstance(params, SamplingParams):
        params = [params or SamplingParams()] * count
    if not isinstance(params, Sequence) or len(params) != count or \
            not all(isinstance(p, SamplingParams) for p in params):
        raise RequestError(f"{count} prompts need one SamplingParams, or a list of {count}")
    for each in params:
        each.check()
    return list(params)


def check_ids(ids: Sequence[int], name: str, vocab_size: int, max_len: int, room: int) -> None:
    """InvalidTokenError for an id outside the vocabulary, PromptTooLongError unless `room` more tokens fit."""
    bad = next((t for t in ids if not 0 <= t < vocab_size), None)
    if bad is not None:
        raise InvalidTokenError(f"{name}: token id {bad} is not in 0 .. {vocab_size - 1}")
    if not ids:
        raise RequestError(f"{name} is empty once tokenized")
    if len(ids) + room > max_len:
        raise PromptTooLongError(f"{name} has {len(ids)} tokens, more than the {max_len - room} that fit"
                                 + (" with room for one more" if room else ""))


def _is_ids(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.ndim == 1 and value.dtype != object
    return isinstance(value, (list, tuple)) and len(value) > 0 and isinstance(value[0], (int, np.integer))


def _ids(prompt: Any, index: int) -> list[int]:
    try:
        array = np.asarray(prompt)
    except (TypeError, ValueError) as error:
        raise RequestError(f"prompt {index} is neither text nor token ids: {error}") from None
    if array.size == 0:
        return []
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise RequestError(f"prompt {index} is neither text nor a sequence of integer token ids")
    return array.tolist()
