"""cutp as a model of the language model evaluation harness, lm-eval (pip install lm-eval; PyTorch is not needed).

    from lm_eval import simple_evaluate
    with CutpLM("path/to/model") as lm:         # under mpirun, on all ranks
        if lm.is_root:
            results = simple_evaluate(lm, tasks=["hellaswag"])
        else:
            lm.follow()
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from cutp.checkpoint.chat_template import ChatTemplate
from cutp.contrib.lm_eval_params import sampling_params
from cutp.engine.llm import LLM
from cutp.engine.windows import rolling_windows
from cutp.errors import ConfigError, RequestError

try:
    from lm_eval.api.model import TemplateLM
except ImportError as error:
    raise ImportError("cutp.contrib.lm_eval needs the evaluation harness: pip install lm-eval") from error

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

# Tokens that are given to the engine at once: enough to keep it busy, and few enough for progress to be seen.
_CHUNK_TOKENS = 1 << 16

Scoring = tuple[tuple[str, str] | None, list[int], list[int]]


class CutpLM(TemplateLM):
    """An `LLM` that lm-eval can drive.

    model: what `LLM` takes, or an open LLM, which is then closed with this object; the other arguments go to `LLM`.
    max_length: the context in tokens (default: the model's); what is longer loses its beginning. max_gen_toks: tokens
    to generate where a task does not say. seed: of the sampling of tasks that sample. add_bos_token: whether text gets
    the tokenizer's special tokens (default: as the tokenizer has it, and never twice).

    Tokens, windows and truncation are those of lm-eval's own HFLM, so that results can be compared: rolling
    log-likelihoods are those of the text with the tokenizer's special tokens, after the prefix token.

    It is made on all ranks. Rank 0 calls lm-eval, which sees one process (rank 0 of 1); the others call `follow()`.
    Closing it, or leaving its `with`, releases them. Raises ConfigError for a model without a tokenizer.
    """

    def __init__(self, model: LLM | str | os.PathLike | None = None, *, max_length: int | None = None,
                 max_gen_toks: int = 256, seed: int = 1234, add_bos_token: bool | None = None,
                 prefix_token_id: int | None = None, **options: Any):
        super().__init__()
        self.llm = model if isinstance(model, LLM) else LLM(model, **options)
        self._template = ChatTemplate.load(self.llm.path)
        self._max_length = max_length or self.llm.max_len
        self.max_gen_toks = max_gen_toks
        self._next_seed = seed
        self._add_bos_token = add_bos_token
        self._prefix_token_id = prefix_token_id
        try:
            if self.llm.tokenizer is None:
                raise ConfigError(f"{self.llm.path} has no tokenizer.json, which evaluation needs")
            if not 1 < self._max_length <= self.llm.max_len:
                raise ConfigError(f"max_length={max_length} is not from 2 to {self.llm.max_len}, the model's context")
            _ = self.prefix_token_id
        except ConfigError:
            self.close()
            raise

    @property
    def is_root(self) -> bool:
        """Whether this is rank 0, which calls lm-eval."""
        return self.llm.is_root

    def follow(self) -> None:
        """For the other ranks: does what rank 0 calls, until it closes."""
        self.llm.follow()

    def close(self) -> None:
        """Frees the model and releases the ranks that follow; safe to call twice."""
        self.llm.close()

    def __enter__(self) -> CutpLM:
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    # -- what lm-eval asks of a model ------------------------------------------------------------------

    @property
    def rank(self) -> int:
        return 0

    @property
    def world_size(self) -> int:
        return 1

    @property
    def max_length(self) -> int:
        return self._max_length

    @property
    def batch_size(self) -> str:
        """The engine packs requests by itself."""
        return "auto"

    @property
    def eot_token_id(self) -> int:
        """The end-of-sequence token."""
        token = self.llm.tokenizer.eos_token_id
        if token is None:
            raise ConfigError(f"the tokenizer of {self.llm.path} names no end-of-sequence token")
        return token

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without a context: the one that was given, else beginning- or end-of-sequence."""
        if self._prefix_token_id is not None:
            return self._prefix_token_id
        bos = self.llm.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return str(self.llm.path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's text, for the record; "" where there is none or none is applied."""
        return self._template.source if chat_template and self._template is not None else ""

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt of a conversation. Without `add_generation_prompt` the last message is left open, so that the
        model goes on with it. A system message is left out where the template refuses it."""
        if self._template is None:
            raise RequestError(f"{self.llm.path} has no chat template", hint="evaluate without one")
        try:
            return self._rendered(chat_history, add_generation_prompt)
        except RequestError:
            without = [message for message in chat_history if message["role"] != "system"]
            if len(without) == len(chat_history):
                raise
            return self._rendered(without, add_generation_prompt)

    def _rendered(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str:
        text = self._template.render(messages, add_generation_prompt)
        if add_generation_prompt:
            return text
        last = messages[-1]["content"].strip()
        begin = text.rfind(last)
        if begin < 0:
            raise RequestError("the chat template changes the last message, so it cannot be left open")
        return text[: begin + len(last)]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of text; None: with special tokens, unless the text begins with the prefix token's own text."""
        if add_special_tokens is None:
            prefix = self.llm.tokenizer.decode([self.prefix_token_id], skip_special_tokens=False)
            twice = bool(prefix) and string.startswith(prefix)
            add_special_tokens = not twice and self._add_bos_token is not False
        return self.llm.tokenize(string, special_tokens=add_special_tokens)

    def tok_decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self.llm.tokenizer.decode(tokens, skip_special_tokens)

    def _loglikelihood_tokens(self, requests: Sequence[Scoring], disable_tqdm: bool = False,
                              **kwargs: Any) -> list[tuple[float, bool]]:
        """(log-likelihood, whether it is the greedy choice) of each continuation; contexts lose what does not fit."""
        pairs = [(context, continuation, self._cut(context, continuation))
                 for _, context, continuation in requests]
        results: list[tuple[float, bool]] = []
        with _progress(len(pairs), "loglikelihood", disable_tqdm) as bar:
            for chunk in _chunks(pairs, lambda pair: len(pair[2]) + len(pair[1])):
                for output in self.llm.score([(cut, continuation) for _, continuation, cut in chunk]):
                    answer = output.logprob, output.is_greedy
                    key = requests[len(results)][0]
                    results.append(answer)
                    if key is not None:
                        self.cache_hook.add_partial("loglikelihood", key, answer)
                bar.update(len(chunk))
        return results

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each text, however long, every token predicted once."""
        results: list[float] = []
        with _progress(len(requests), "loglikelihood_rolling", disable_tqdm) as bar:
            for (text,) in (request.args for request in requests):
                windows = rolling_windows(self.tok_encode(text), self.prefix_token_id, self.max_length)
                pairs = ((ids[:first], ids[first:]) for ids, first in windows)
                total = 0.0
                for chunk in _chunks(pairs, lambda pair: len(pair[0]) + len(pair[1])):
                    total += sum(output.logprob for output in self.llm.score(chunk))
                results.append(total)
                self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
                bar.update(1)
        return results

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Each context continued, up to a stop string or `max_gen_toks` tokens; see `lm_eval_params`."""
        results: list[str] = []
        with _progress(len(requests), "generate_until", disable_tqdm) as bar:
            for chunk in _chunks(map(self._generation, requests), lambda each: len(each[0]) + each[1].max_tokens):
                ids, params = [each[0] for each in chunk], [each[1] for each in chunk]
                for output, (_, each, request) in zip(self.llm.generate(ids, params), chunk, strict=True):
                    text = self.tok_decode(output.token_ids)
                    for stop in each.stop:
                        text = text.split(stop)[0]
                    results.append(text)
                    self.cache_hook.add_partial("generate_until", request.args, text)
                bar.update(len(chunk))
        return results

    # -- how it is done -----------------------------------------------------------------------------------

    def _cut(self, context: list[int], continuation: list[int]) -> list[int]:
        """The end of the context that fits before the continuation, whose last token is only predicted."""
        if len(continuation) > self.max_length:
            raise RequestError(f"a continuation of {len(continuation)} tokens does not fit into the context of "
                               f"{self.max_length}")
        return context[-(self.max_length + 1 - len(continuation)):]

    def _generation(self, request: Instance):
        text, settings = request.args
        eos = self.tok_decode([self.eot_token_id], skip_special_tokens=False)
        params = sampling_params(settings, self.max_gen_toks, self._next_seed, eos)
        self._next_seed += 1
        room = self.max_length - params.max_tokens
        if room < 1:
            raise RequestError(f"max_gen_toks is {params.max_tokens}, which leaves no room for a prompt in the context "
                               f"of {self.max_length} tokens", hint="lower max_gen_toks")
        return self.tok_encode(text)[-room:], params, request


def _chunks(items: Iterable, tokens) -> Iterator[list]:
    """Runs of items of about _CHUNK_TOKENS tokens, at least one item."""
    chunk: list = []
    held = 0
    for item in items:
        chunk.append(item)
        held += tokens(item)
        if held >= _CHUNK_TOKENS:
            yield chunk
            chunk, held = [], 0
    if chunk:
        yield chunk


def _progress(total: int, what: str, disable: bool) -> tqdm:
    return tqdm(total=total, desc=what, disable=disable or not sys.stderr.isatty())
