"""An evaluation task's generation settings as sampling parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cutp.engine.sampling_params import SamplingParams
from cutp.errors import RequestError

# Names of the number of tokens to generate; the first that is given counts.
_MAX_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAME = ("top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed", "min_tokens",
         "stop_token_ids", "ignore_eos")
_RENAMED = {"min_new_tokens": "min_tokens"}
# Settings that ask for nothing with these values.
_NEUTRAL: Mapping[str, tuple] = {"num_beams": (1,), "use_cache": (True, False), "num_return_sequences": (1,),
                                 "length_penalty": (1,), "early_stopping": (True, False)}


def sampling_params(settings: Mapping[str, Any], max_gen_toks: int, seed: int, eos: str) -> SamplingParams:
    """The parameters of one request.

    settings: of the task: "until" (a string or a list), the number of tokens (default `max_gen_toks`), "do_sample",
    "temperature" (default 0; it counts unless do_sample is false) and what SamplingParams has. seed: used where the
    settings have none. eos: the end-of-sequence token's text, which also ends a text.

    Raises RequestError for a setting that would not be applied.
    """
    left = {name: value for name, value in settings.items() if value is not None}
    numbers = [left.pop(name) for name in _MAX_TOKENS if name in left]
    until = left.pop("until", [])
    sample, temperature = left.pop("do_sample", None), left.pop("temperature", 0.0)
    if sample is True and not temperature:
        raise RequestError("do_sample is true, but the temperature is 0", hint="set a temperature, or do_sample: false")
    params = {"max_tokens": int(numbers[0] if numbers else max_gen_toks), "seed": seed,
              "temperature": 0.0 if sample is False else temperature, "stop": _stops(until, eos)}
    for name in list(left):
        if name in _SAME or name in _RENAMED:
            params[_RENAMED.get(name, name)] = left.pop(name)
    unknown = [name for name, value in left.items() if value not in _NEUTRAL.get(name, ())]
    if unknown:
        raise RequestError(f"the generation setting {unknown[0]}={left[unknown[0]]!r} is not supported",
                           hint=f"there are until, do_sample, temperature, {', '.join((*_MAX_TOKENS[:1], *_SAME))}")
    return SamplingParams(**params)


def _stops(until: Any, eos: str) -> tuple[str, ...]:
    until = [until] if isinstance(until, str) else until
    if not isinstance(until, (list, tuple)) or not all(isinstance(stop, str) for stop in until):
        raise RequestError(f"until must be a string or a list of strings, not {until!r}")
    return tuple(stop for stop in dict.fromkeys([*until, eos]) if stop)
