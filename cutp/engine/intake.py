"""From what a caller passes to prepared input: tokenised, completed, checked. Rank 0's work, JSON-safe.

`read_*` put a caller's arguments in one plain form, on every rank that was given some. `prepare` turns that form into
what the ranks then work on, or raises the error that all of them will raise.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cutp.checkpoint.chat_template import ChatTemplate
from cutp.checkpoint.generation_config import GenerationDefaults
from cutp.checkpoint.tokenizer import Tokenizer
from cutp.engine.prompts import check_ids, each_params, is_ids, plain_names, plain_prompts
from cutp.engine.sampling_params import SamplingParams
from cutp.engine.windows import rolling_windows
from cutp.errors import RequestError

POOLS = (None, "last", "mean")
_NUMBERS = (int, float, np.number)


class Intake:
    """Prepares input for one model: by its tokenizer, chat template, sampling defaults and limits.

    check_capacity(tokens, name): raises CapacityError when the cache cannot hold a request.
    """

    def __init__(self, tokenizer: Tokenizer | None, chat_template: ChatTemplate | None, defaults: GenerationDefaults,
                 vocab_size: int, max_len: int, num_layers: int, check_capacity: Callable[[int, str], None]):
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._defaults = defaults
        self._vocab_size = vocab_size
        self._max_len = max_len
        self._num_layers = num_layers
        self._check_capacity = check_capacity

    def generation(self, value: dict) -> list[dict]:
        """{"prompts", "params", "chat"} -> a list of {"ids", "text", "params", "reach"}, one a prompt."""
        rendered = [self._render(messages) for messages in value["prompts"]] if value["chat"] else value["prompts"]
        ids = self._tokenize(rendered, room=1, special=not value["chat"])
        prepared = []
        for index, (prompt, each, params) in enumerate(zip(rendered, ids, value["params"], strict=True)):
            params = self._complete(SamplingParams.from_dict(params))
            reach = min(len(each) + params.max_tokens, self._max_len)
            if params.min_tokens > reach - len(each):
                raise RequestError(f"prompt {index}: min_tokens is {params.min_tokens}, but only {reach - len(each)} "
                                   "tokens fit behind the prompt")
            self._check_capacity(reach, f"prompt {index}")
            prepared.append({"ids": each, "text": prompt if isinstance(prompt, str) else None,
                             "params": params.to_dict(), "reach": reach})
        return prepared

    def scoring(self, value: dict) -> list[dict]:
        """{"items", "names"} -> a list of {"ids", "first", "pair"}: token ids, of which those from `first` on are
        scored."""
        prepared = []
        for item, name in zip(value["items"], value["names"], strict=True):
            pair = isinstance(item, dict)
            if pair:
                ids, first = self._pair(item["context"], item["continuation"], name)
            else:
                [ids], first = self._tokenize([item], room=0, names=[name]), 1
            self._check_capacity(min(len(ids), self._max_len), name)
            prepared.append({"ids": ids, "first": first, "pair": pair})
        return prepared

    def rolling(self, value: dict) -> list[dict]:
        """{"texts", "names", "window"} -> a list of {"windows": [{"ids", "first"}], "bytes"}, one a text."""
        window = self._max_len if value["window"] is None else value["window"]
        if isinstance(window, bool) or not isinstance(window, int) or not 1 <= window <= self._max_len:
            raise RequestError(f"window must be a number of tokens from 1 to {self._max_len}, not {window!r}")
        self._check_capacity(window, "a window")
        prepared = []
        for text, name in zip(value["texts"], value["names"], strict=True):
            ids = self._ids(text, name, special=False)
            if ids:
                check_ids(ids, name, self._vocab_size, 2**31, 0)
            windows = [{"ids": piece, "first": first} for piece, first in rolling_windows(ids, self.prefix, window)]
            prepared.append({"windows": windows, "bytes": len(text.encode()) if isinstance(text, str) else None})
        return prepared

    def hidden_states(self, value: dict) -> dict:
        """{"prompts", "names", "layers", "pool", "gather"} -> the same with token ids and layers counted from 0."""
        layers = []
        for layer in value["layers"]:
            if isinstance(layer, bool) or not isinstance(layer, int) or \
                    not -self._num_layers - 1 <= layer <= self._num_layers:
                raise RequestError(f"layer {layer!r} is not in 0 .. {self._num_layers} (0: the embeddings, "
                                   f"{self._num_layers} or -1: after the final norm)")
            layers.append(layer % (self._num_layers + 1))
        if value["pool"] not in POOLS:
            raise RequestError(f"pool must be None, 'last' or 'mean', not {value['pool']!r}")
        if value["gather"] not in ("all", "root", "none"):
            raise RequestError(f"gather must be 'all', 'root' or 'none', not {value['gather']!r}")
        if not layers:
            raise RequestError("layers is empty", hint="layers=[-1] gives the last layer's states")
        ids = self._tokenize(value["prompts"], room=0, names=value["names"])
        for each, name in zip(ids, value["names"], strict=True):
            self._check_capacity(len(each), name)
        return {**value, "prompts": ids, "layers": layers}

    @property
    def prefix(self) -> int | None:
        """The token that stands before a text without a context: beginning-of-sequence, else end-of-sequence."""
        if self._tokenizer is not None and self._tokenizer.bos_token_id is not None:
            return self._tokenizer.bos_token_id
        if self._defaults.bos_token_id is not None:
            return self._defaults.bos_token_id
        return self._defaults.eos_token_ids[0] if self._defaults.eos_token_ids else None

    def _complete(self, params: SamplingParams) -> SamplingParams:
        """The parameters with the checkpoint's defaults, token ids for what is written as text, and a seed."""
        params = params.with_defaults(self._defaults)
        if params.seed is None:
            params = dataclasses.replace(params, seed=secrets.randbits(63))
        return params.resolved(self._tokenizer, self._vocab_size, self._defaults.eos_token_ids)

    def _render(self, messages: list) -> str:
        if self._chat_template is None:
            raise RequestError("the model has no chat template", hint="pass plain prompts")
        return self._chat_template.render(messages)

    def _tokenize(self, prompts: Sequence[str | list[int]], *, room: int, special: bool = True,
                  names: Sequence[str] | None = None) -> list[list[int]]:
        """Token ids of every prompt, checked; `room` tokens must fit behind each."""
        result = []
        for index, prompt in enumerate(prompts):
            name = names[index] if names else f"prompt {index}"
            if len(prompt) == 0:
                raise RequestError(f"{name} is empty")
            ids = self._ids(prompt, name, special)
            check_ids(ids, name, self._vocab_size, self._max_len, room)
            result.append(ids)
        return result

    def _ids(self, prompt: str | list[int], name: str, special: bool) -> list[int]:
        if not isinstance(prompt, str):
            return prompt
        if self._tokenizer is None:
            raise RequestError(f"{name} is text, but the model has no tokenizer.json", hint="pass token ids")
        try:
            return self._tokenizer.encode(prompt, add_special_tokens=special)
        except RequestError as error:
            raise RequestError(f"{name}: {error.message}", hint=error.hint) from None

    def _pair(self, context: str | list[int], continuation: str | list[int], name: str) -> tuple[list[int], int]:
        """Token ids of context and continuation, and where the continuation begins.

        Spaces between them count to the continuation, and text is split where the tokens of the whole begin to go
        beyond those of the context, as evaluation harnesses do.
        """
        if len(continuation) == 0:
            raise RequestError(f"{name}: the continuation is empty")
        if isinstance(continuation, str):
            stripped = context.rstrip()
            context, continuation = stripped, context[len(stripped):] + continuation
            before = self._ids(context, name, special=True) if context else []
            whole = self._ids(context + continuation, name, special=bool(context))
            ids, first = whole, len(before)
        else:
            ids, first = [*context, *continuation], len(context)
        if first == 0:
            if self.prefix is None:
                raise RequestError(f"{name}: an empty context needs a beginning- or end-of-sequence token, and the "
                                   "model names none", hint="pass the context as token ids")
            ids, first = [self.prefix, *ids], 1
        if first >= len(ids):
            raise RequestError(f"{name}: the continuation adds no token to the context")
        # The last token is only predicted, never fed.
        check_ids(ids, name, self._vocab_size, self._max_len + 1, 0)
        return ids, first


def read_generation(prompts: Any, params: Any, chat: bool = False) -> dict:
    """What `Intake.generation` prepares."""
    each = _plain_conversations(prompts) if chat else plain_prompts(prompts)
    return {"prompts": each, "params": [p.to_dict() for p in each_params(params, len(each))], "chat": chat}


def read_scoring(items: Any, names: Sequence[str] | None) -> dict:
    """What `Intake.scoring` prepares: texts, token ids and (context, continuation) pairs of these."""
    if isinstance(items, str) or is_ids(items):
        items = [items]
    try:
        items = list(items)
    except TypeError:
        raise RequestError(f"texts are a {type(items).__name__}, not text, token ids or a list of these") from None
    return {"items": [_plain_item(item, index) for index, item in enumerate(items)],
            "names": plain_names(names, len(items))}


def _plain_item(item: Any, index: int) -> Any:
    if isinstance(item, _NUMBERS):
        raise RequestError(f"prompt {index} is neither text nor token ids: {item!r}")
    is_pair = isinstance(item, (tuple, list)) and len(item) == 2 and not any(isinstance(x, _NUMBERS) for x in item)
    if not is_pair:
        [plain] = _named(index, [item])
        return plain
    if isinstance(item[0], str) != isinstance(item[1], str):
        raise RequestError(f"prompt {index}: context and continuation must both be text or both be token ids")
    context, continuation = _named(index, list(item))
    return {"context": context, "continuation": continuation}


def _named(index: int, prompts: list) -> list:
    """plain_prompts with errors that call all of `prompts` by `index`."""
    try:
        return plain_prompts(prompts)
    except RequestError as error:
        message = error.message.replace("prompt 0", f"prompt {index}").replace("prompt 1", f"prompt {index}", 1)
        raise type(error)(message, hint=error.hint) from None


def _plain_conversations(conversations: Any) -> list:
    """A list of conversations, each a JSON-safe list of messages; one conversation is a list of one."""
    try:
        conversations = list(conversations)
        if conversations and isinstance(conversations[0], dict):
            conversations = [conversations]
        return json.loads(json.dumps(conversations))
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"conversations must be lists of messages made of plain values: {error}") from None
