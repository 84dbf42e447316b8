"""How a request is sampled, and when it ends."""

from __future__ import annotations

import dataclasses
import math
import sys
from dataclasses import dataclass
from typing import Any

from cutp.checkpoint.generation_config import GenerationDefaults
from cutp.errors import RequestError

DEFAULT_MAX_TOKENS = 128
MAX_LOGPROBS = 20


@dataclass(frozen=True)
class SamplingParams:
    """Parameters of one request; None takes the checkpoint's own default (generation_config.json).

    max_tokens: tokens to generate at most (default: the checkpoint's max_new_tokens, else 128).
    temperature: logits are divided by it; 0 is greedy (default: the checkpoint's, 0 where it says do_sample false,
    else 1). top_k: keep the k likeliest tokens, 0 keeps all. top_p: keep the likeliest tokens up to this total
    probability (nucleus sampling, Holtzman et al., 2020). min_p: keep tokens at least this fraction as likely as the
    likeliest. They apply in that order. seed: 0 .. 2**64 - 1; without one a seed is drawn and reported.
    stop: strings that end the text, which is cut before them. stop_token_ids: tokens that end it. ignore_eos: do not
    end at the model's end-of-sequence tokens. logprobs: report this many likeliest tokens at each step (0 to 20),
    with the natural logarithm of their probabilities under the unmodified logits.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self):
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))

    def check(self) -> None:
        """RequestError naming the first parameter that is out of range."""
        _integer("max_tokens", self.max_tokens, 1, 2**31)
        _number("temperature", self.temperature, 0.0, math.inf)
        _integer("top_k", self.top_k, 0, 2**31)
        _number("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _number("min_p", self.min_p, 0.0, 1.0)
        _integer("seed", self.seed, 0, 2**64 - 1)
        _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise RequestError(f"stop holds {text!r}; stop strings must be strings that are not empty")
        for token in self.stop_token_ids:
            _integer("stop_token_ids", token, 0, 2**31)
        if not isinstance(self.ignore_eos, bool):
            raise RequestError(f"ignore_eos must be true or false, not {self.ignore_eos!r}")

    def with_defaults(self, defaults: GenerationDefaults) -> SamplingParams:
        """Every None filled in, from the checkpoint's defaults where they say something; the seed stays None."""
        temperature = self.temperature
        if temperature is None:
            temperature = 0.0 if defaults.do_sample is False else _first(defaults.temperature, 1.0)
        return dataclasses.replace(
            self,
            max_tokens=_first(self.max_tokens, defaults.max_new_tokens, DEFAULT_MAX_TOKENS),
            temperature=float(temperature),
            top_k=_first(self.top_k, defaults.top_k, 0),
            top_p=float(_first(self.top_p, defaults.top_p or None, 1.0)),
            min_p=float(_first(self.min_p, defaults.min_p, 0.0)),
        )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(d: dict[str, Any]) -> SamplingParams:
        return SamplingParams(**d)


def _first(*values):
    return next(value for value in values if value is not None)


def _integer(name: str, value: Any, low: int, high: int) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high):
        raise RequestError(f"{name} must be an integer from {low} to {high}, not {value!r}")


def _number(name: str, value: Any, low: float, high: float, *, open_low: bool = False) -> None:
    if value is None:
        return
    good = not isinstance(value, bool) and isinstance(value, (int, float)) and value <= sys.float_info.max
    if not good or not low <= value <= high or (open_low and value == low):
        bounds = f"{'above' if open_low else 'at least'} {low:g}"
        if high < math.inf:
            bounds += f" and at most {high:g}"
        raise RequestError(f"{name} must be a number {bounds}, not {value!r}")
