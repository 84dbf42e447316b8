"""Prompts and parameters as callers write them, in one plain form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cutp.engine.sampling_params import SamplingParams
from cutp.errors import InvalidTokenError, PromptTooLongError, RequestError

# DLPack's numbers for CUDA and CUDA managed memory.
_GPU_KINDS = (2, 13)


def plain_prompts(prompts: Any) -> list[str | list[int]]:
    """Prompts as strings and lists of ints, JSON-safe.

    Accepts one prompt or a sequence of them; a prompt is a string or a sequence of token ids: a list, a tuple, or a
    one-dimensional integer array of any library that exports it by DLPack or as a buffer. Raises RequestError naming
    the prompt.
    """
    if isinstance(prompts, str) or is_ids(prompts):
        prompts = [prompts]
    try:
        prompts = list(prompts)
    except TypeError:
        raise RequestError(f"prompts are a {type(prompts).__name__}, not text, token ids or a list of these") from None
    return [prompt if isinstance(prompt, str) else _ids(prompt, index) for index, prompt in enumerate(prompts)]


def plain_names(names: Sequence[str] | None, count: int) -> list[str]:
    """What errors call each of `count` prompts; RequestError unless there is one name a prompt."""
    if names is None:
        return [f"prompt {index}" for index in range(count)]
    if len(names) != count:
        raise RequestError(f"{count} prompts were given {len(names)} names")
    return [str(name) for name in names]


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


def is_ids(value: Any) -> bool:
    """Whether `value` is one sequence of token ids rather than a sequence of prompts."""
    if isinstance(value, (list, tuple)):
        return len(value) > 0 and isinstance(value[0], (int, np.integer))
    if isinstance(value, (str, bytes, bytearray)):
        return False
    try:
        array = _as_array(value)
    except Exception:  # whatever an array library says of what it cannot export
        return False
    return array.ndim == 1 and array.dtype.kind in "iuf"


def _ids(prompt: Any, index: int) -> list[int]:
    try:
        array = _as_array(prompt)
    except Exception as error:  # an array library's own kinds of errors
        raise RequestError(f"prompt {index} is neither text nor token ids: {error}") from None
    if array.size == 0:
        return []
    if array.ndim != 1 or array.dtype.kind not in "iu" or isinstance(prompt, (bytes, bytearray)):
        raise RequestError(f"prompt {index} is neither text nor a sequence of integer token ids")
    return array.tolist()


def _as_array(value: Any) -> np.ndarray:
    """`value` as a NumPy array; arrays of other libraries come by DLPack, from a GPU by a copy to the host."""
    if isinstance(value, np.ndarray) or not hasattr(value, "__dlpack__"):
        return np.asarray(value)
    if value.__dlpack_device__()[0] in _GPU_KINDS:
        from cutp.array.cuda import cupy

        return cupy().from_dlpack(value).get()
    return np.from_dlpack(value)
