"""The body of a request to OpenAI's completion routes, as sampling parameters.

Names and meanings: OpenAI's API reference for /v1/completions and /v1/chat/completions. Sampling parameters of cutp
that the API does not have (top_k, min_p, repetition_penalty, stop_token_ids, ...) are taken under their own names, as
other servers do.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from cutp.engine.sampling_params import SamplingParams
from cutp.errors import RequestError

CHAT, COMPLETION = "chat.completion", "text_completion"
_ROUTES = {"/v1/chat/completions": CHAT, "/v1/completions": COMPLETION}
# What says who asks and what the record is for, but not what the answer is.
_WITHOUT_EFFECT = ("model", "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
# What is accepted only with the value that asks for nothing.
_ONLY = {"stream": (False,), "echo": (False,), "best_of": (1,), "suffix": ("",), "tools": ([],), "functions": ([],),
         "tool_choice": ("none",), "function_call": ("none",), "response_format": ({"type": "text"},),
         "modalities": (["text"],), "stream_options": ()}
_SAME_NAME = frozenset(field.name for field in dataclasses.fields(SamplingParams)) - {"logprobs"}


def read_body(url: Any, body: Any) -> tuple[str, dict[str, Any]]:
    """(the object that is asked for, {"messages" or "prompt", and sampling parameters}) of a batch line.

    A field that is null counts as absent. Raises RequestError for a route or field that cannot be honoured.
    """
    kind = _ROUTES.get(url) if isinstance(url, str) else None
    if kind is None:
        raise RequestError(f"url is {json.dumps(url)[:80]}, not {' or '.join(_ROUTES)}")
    if not isinstance(body, dict):
        raise RequestError("it has no body that is an object")
    fields = {name: value for name, value in body.items() if value is not None and name not in _WITHOUT_EFFECT}
    source = "messages" if kind == CHAT else "prompt"
    if source not in fields:
        raise RequestError(f"the body has no {source}")
    given = {source: fields.pop(source), **_max_tokens(fields), **_logprobs(kind, fields)}
    for name, value in fields.items():
        if name in _SAME_NAME:
            given[name] = value
        elif name not in _ONLY:
            raise RequestError(f"the body has a field {json.dumps(name)}, which is not supported")
        elif value not in _ONLY[name] or type(value) is not type(_ONLY[name][_ONLY[name].index(value)]):
            raise RequestError(f"{name} is {json.dumps(value)[:80]}, which is not supported")
    return kind, given


def _max_tokens(fields: dict[str, Any]) -> dict[str, Any]:
    names = [name for name in ("max_completion_tokens", "max_tokens") if name in fields]
    values = [fields.pop(name) for name in names]
    if len(values) == 2 and values[0] != values[1]:
        raise RequestError("max_completion_tokens and max_tokens differ")
    return {"max_tokens": values[0]} if values else {}


def _logprobs(kind: str, fields: dict[str, Any]) -> dict[str, Any]:
    """A number for completions; true or false, with a number of its own, for chats."""
    value = fields.pop("logprobs", None)
    if kind == COMPLETION:
        return {} if value is None else {"logprobs": value}
    top = fields.pop("top_logprobs", None)
    if value not in (None, True, False) or isinstance(value, (int, float)) and not isinstance(value, bool):
        raise RequestError(f"logprobs is {json.dumps(value)[:80]}, not true or false")
    if not value:
        if top is not None and top != 0:
            raise RequestError("top_logprobs needs logprobs to be true")
        return {}
    return {"logprobs": 0 if top is None else top}
