"""How a request is sampled, and when it ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cutp.checkpoint.generation_config import GenerationDefaults
from cutp.checkpoint.tokenizer import Tokenizer
from cutp.engine.param_checks import (
    as_pairs,
    as_texts,
    as_tuple,
    as_words,
    check_bad_words,
    check_biases,
    check_flag,
    check_integer,
    check_number,
    check_texts,
    check_token_ids,
    refuse,
)
from cutp.errors import InvalidTokenError, RequestError

DEFAULT_MAX_TOKENS = 128
MAX_LOGPROBS = 20
MAX_SAMPLES = 128
MAX_LOGIT_BIAS = 100.0
_NEED_TEXT = "the model has no tokenizer.json"


@dataclass(frozen=True)
class SamplingParams:
    """Parameters of one request; None takes the checkpoint's own default (generation_config.json).

    max_tokens: tokens to generate at most (default: the checkpoint's max_new_tokens, else 128). min_tokens: so many
    tokens are generated whatever they are: till then those that would end the request get no probability, and a stop
    string that is completed by an earlier one stays in the text (default: the checkpoint's min_new_tokens, else 0).
    n: samples of the prompt, 1 to 128. They differ in their `sample_index`, and have the seed in common.

    temperature: logits are divided by it; 0 is greedy (default: the checkpoint's, 0 where it says do_sample false,
    else 1). top_k: keep the k likeliest tokens, 0 keeps all. top_p: keep the likeliest tokens up to this total
    probability (nucleus sampling, Holtzman et al., 2020). min_p: keep tokens at least this fraction as likely as the
    likeliest. They apply in that order. seed: 0 .. 2**64 - 1; a prompt without one gets one, which is reported.

    These change the logits before the temperature, in the order in which vLLM applies them:
    logit_bias: {token id: number from -100 to 100}, added to the logits (OpenAI's API). bad_words: strings, and lists
    of token ids, that must not appear: the last token of one gets no probability where the ones before it, of prompt
    and output, are there (Hugging Face's NoBadWordsLogitsProcessor); a string counts as the tokens it has at the start
    of a text and as those after a space. repetition_penalty: 0.01 to 100; logits of tokens of prompt and output are
    divided by it where positive, else multiplied (Keskar et al., "CTRL", 2019). frequency_penalty, presence_penalty:
    -2 to 2, subtracted from the logits of tokens of the output, once for each time and once in all (OpenAI's API).

    stop: strings that end the text, which is cut before them. stop_token_ids: tokens that end it. ignore_eos: do not
    end at the model's end-of-sequence tokens, which are then like any others. logprobs, prompt_logprobs: report
    this many likeliest tokens beside each generated token, or each prompt token but the first (0 to 20; 0 reports only
    the token itself), with natural logarithms of probabilities under the logits as the model computes them.
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
    prompt_logprobs: int | None = None
    n: int = 1
    min_tokens: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    bad_words: tuple[str | tuple[int, ...], ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "stop", as_texts(self.stop))
        object.__setattr__(self, "stop_token_ids", as_tuple(self.stop_token_ids))
        object.__setattr__(self, "logit_bias", as_pairs(self.logit_bias))
        object.__setattr__(self, "bad_words", as_words(self.bad_words))

    def check(self) -> None:
        """RequestError naming the first parameter that is out of range, or two that contradict each other."""
        check_integer("max_tokens", self.max_tokens, 1, 2**31)
        check_number("temperature", self.temperature, 0.0, 1e30)
        check_integer("top_k", self.top_k, 0, 2**31 - 1)
        check_number("top_p", self.top_p, 0.0, 1.0, open_low=True)
        check_number("min_p", self.min_p, 0.0, 1.0)
        check_integer("seed", self.seed, 0, 2**64 - 1)
        check_texts("stop", self.stop)
        check_token_ids("stop_token_ids", self.stop_token_ids)
        check_flag("ignore_eos", self.ignore_eos)
        check_integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        check_integer("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)
        check_integer("n", self.n, 1, MAX_SAMPLES)
        check_integer("min_tokens", self.min_tokens, 0, 2**31)
        check_number("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        check_number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        check_number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        check_biases("logit_bias", self.logit_bias, MAX_LOGIT_BIAS)
        check_bad_words("bad_words", self.bad_words)
        for name in ("n", "presence_penalty", "frequency_penalty"):
            if getattr(self, name) is None:
                refuse(name, "a number", None)
        if None not in (self.min_tokens, self.max_tokens) and self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens is {self.min_tokens}, more than max_tokens, which is {self.max_tokens}")
        if self.n > 1 and self.temperature == 0:
            raise RequestError(f"n is {self.n}, but at temperature 0 all samples of a prompt are equal",
                               hint="set a temperature above 0, or n to 1")

    def with_defaults(self, defaults: GenerationDefaults) -> SamplingParams:
        """Every None filled in, from the checkpoint's defaults where they say something; the seed stays None."""
        temperature = self.temperature
        if temperature is None:
            temperature = 0.0 if defaults.do_sample is False else _first(defaults.temperature, 1.0)
        max_tokens = _first(self.max_tokens, defaults.max_new_tokens, DEFAULT_MAX_TOKENS)
        return dataclasses.replace(
            self,
            max_tokens=max_tokens,
            min_tokens=_first(self.min_tokens, min(defaults.min_new_tokens or 0, max_tokens)),
            temperature=float(temperature),
            top_k=_first(self.top_k, defaults.top_k, 0),
            top_p=float(_first(self.top_p, defaults.top_p or None, 1.0)),
            min_p=float(_first(self.min_p, defaults.min_p, 0.0)),
            repetition_penalty=float(_first(self.repetition_penalty, defaults.repetition_penalty, 1.0)),
        )

    def resolved(self, tokenizer: Tokenizer | None, vocab_size: int, eos_token_ids: tuple[int, ...]) -> SamplingParams:
        """What `with_defaults` gave with bad words as token ids, and checked against the model and once more in whole.

        Raises RequestError, also where a default contradicts a parameter, and InvalidTokenError for an id outside the
        vocabulary.
        """
        if self.stop and tokenizer is None:
            raise RequestError(f"stop strings need a tokenizer, and {_NEED_TEXT}", hint="use stop_token_ids")
        words: list[tuple[int, ...]] = []
        for word in self.bad_words:
            words += _spellings(word, tokenizer) if isinstance(word, str) else [word]
        params = dataclasses.replace(self, bad_words=tuple(dict.fromkeys(words)))
        params.check()
        params._check_ids(vocab_size, params.end_token_ids(eos_token_ids))
        return params

    def end_token_ids(self, eos_token_ids: tuple[int, ...]) -> frozenset[int]:
        """The tokens that end the request, of a model with these end-of-sequence tokens."""
        return frozenset(self.stop_token_ids) | frozenset(() if self.ignore_eos else eos_token_ids)

    def to_dict(self) -> dict[str, Any]:
        """The parameters, JSON-safe."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(d: Mapping[str, Any]) -> SamplingParams:
        """The parameters that `to_dict` wrote, or that a caller wrote as JSON; RequestError for an unknown name."""
        unknown = sorted(str(key) for key in d if key not in _NAMES)
        if unknown:
            raise RequestError(f"unknown sampling parameter{'s' * (len(unknown) > 1)} {', '.join(unknown)}",
                               hint=f"the known ones are {', '.join(_NAMES)}")
        return SamplingParams(**d)

    def _check_ids(self, vocab_size: int, ends: frozenset[int]) -> None:
        ids = {"stop_token_ids": self.stop_token_ids, "logit_bias": [token for token, _ in self.logit_bias],
               "bad_words": [token for word in self.bad_words for token in word]}
        for name, tokens in ids.items():
            bad = next((token for token in tokens if token >= vocab_size), None)
            if bad is not None:
                raise InvalidTokenError(f"{name}: token id {bad} is not in 0 .. {vocab_size - 1}")
        # A row in which every token is forbidden could not be sampled; this is that case, and a little more.
        forbidden = {word[-1] for word in self.bad_words} | (ends if self.min_tokens else frozenset())
        if len(forbidden) >= vocab_size:
            raise RequestError("bad_words and the tokens that min_tokens forbids leave no token of the vocabulary")


_NAMES = tuple(field.name for field in dataclasses.fields(SamplingParams))


def _spellings(word: str, tokenizer: Tokenizer | None) -> list[tuple[int, ...]]:
    """The token sequences of a bad word: at the start of a text, and after a space."""
    if tokenizer is None:
        raise RequestError(f"bad_words that are text need a tokenizer, and {_NEED_TEXT}", hint="pass token ids")
    word = word.lstrip(" ")
    found = [tuple(tokenizer.encode(text, add_special_tokens=False)) for text in (word, " " + word)]
    if not all(found):
        raise RequestError(f"bad_words holds {word!r}, which has no tokens", hint="pass token ids")
    return found


def _first(*values):
    return next(value for value in values if value is not None)
