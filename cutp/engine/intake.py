"""From what a caller passes to requests: shared, tokenised, checked, the same on every rank.

Rank 0's input counts; the others pass None or an equal value. Rank 0 tokenises and checks and sends either the result
or the error to all, so that a bad prompt raises everywhere, before any work, and leaves the engine usable.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import secrets
from collections.abc import Callable, Sequence
from typing import Any

from cutp.checkpoint.chat_template import ChatTemplate
from cutp.checkpoint.detokenizer import Detokenizer
from cutp.checkpoint.generation_config import GenerationDefaults
from cutp.checkpoint.tokenizer import Tokenizer
from cutp.comm.communicator import Communicator
from cutp.engine.prompts import check_ids, each_params, plain_prompts
from cutp.engine.request import Request
from cutp.engine.sampling_params import SamplingParams
from cutp.engine.text_stream import TextStream
from cutp.errors import CutpError, InputMismatchError, RequestError


class Intake:
    """Makes requests for one model: its tokenizer, chat template, sampling defaults and limits."""

    def __init__(self, comm: Communicator, tokenizer: Tokenizer | None, chat_template: ChatTemplate | None,
                 defaults: GenerationDefaults, vocab_size: int, max_len: int):
        self._comm = comm
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._defaults = defaults
        self._vocab_size = vocab_size
        self._max_len = max_len

    def generation(self, prompts: Any, params: Any) -> list[Request]:
        """Requests that continue `prompts`."""
        return self._generation(plain_prompts, prompts, params, lambda value: value)

    def chat(self, conversations: Any, params: Any) -> list[Request]:
        """Requests that answer `conversations`."""
        return self._generation(_plain_conversations, conversations, params, self._render)

    def scoring(self, texts: Any, names: Sequence[str] | None = None) -> list[Request]:
        """Requests that score `texts`, which errors call by `names`."""
        ids = self._share(lambda: plain_prompts(texts), texts,
                          lambda value: self._tokenize(value, room=0, names=names))
        return [Request(index, None, each, max_total=len(each)) for index, each in enumerate(ids)]

    def _generation(self, plain: Callable, prompts: Any, params: Any, render: Callable) -> list[Request]:
        def read() -> dict:
            each = plain(prompts)
            return {"prompts": each, "params": [p.to_dict() for p in each_params(params, len(each))]}

        def prepare(value: dict) -> dict:
            rendered = render(value["prompts"])
            ids = self._tokenize(rendered, room=1, add_special_tokens=rendered is value["prompts"])
            texts = [prompt if isinstance(prompt, str) else None for prompt in rendered]
            return {"ids": ids, "texts": texts, "params": self._complete(value["params"])}

        shared = self._share(read, prompts, prepare)
        columns = zip(shared["texts"], shared["ids"], shared["params"], strict=True)
        return [self._request(index, text, ids, SamplingParams.from_dict(p))
                for index, (text, ids, p) in enumerate(columns)]

    def _request(self, index: int, text: str | None, ids: list[int], params: SamplingParams) -> Request:
        ends = set(params.stop_token_ids)
        if not params.ignore_eos:
            ends.update(self._defaults.eos_token_ids)
        stream = None
        if self._tokenizer is not None:
            stream = TextStream(Detokenizer(self._tokenizer, ids), params.stop)
        max_total = min(len(ids) + params.max_tokens, self._max_len)
        return Request(index, text, ids, max_total, params, frozenset(ends), stream)

    def _complete(self, params: Sequence[dict]) -> list[dict]:
        """The parameters with the checkpoint's defaults and a seed (one is drawn for all who have none)."""
        drawn = secrets.randbits(63)
        result = []
        for each in params:
            one = SamplingParams.from_dict(each)
            if one.stop and self._tokenizer is None:
                raise RequestError("stop strings need a tokenizer.json", hint="use stop_token_ids")
            one = one.with_defaults(self._defaults)
            result.append((one if one.seed is not None else dataclasses.replace(one, seed=drawn)).to_dict())
        return result

    def _render(self, conversations: Sequence) -> list[str]:
        if self._chat_template is None:
            raise RequestError("the model has no chat template", hint="pass plain prompts")
        return [self._chat_template.render(messages) for messages in conversations]

    def _tokenize(self, prompts: Sequence[str | list[int]], *, room: int, add_special_tokens: bool = True,
                  names: Sequence[str] | None = None) -> list[list[int]]:
        """Token ids of every prompt, checked; `room` tokens must fit behind each."""
        result = []
        for index, prompt in enumerate(prompts):
            name = names[index] if names else f"prompt {index}"
            if len(prompt) == 0:
                raise RequestError(f"{name} is empty")
            if isinstance(prompt, str):
                if self._tokenizer is None:
                    raise RequestError(f"{name} is text, but the model has no tokenizer.json", hint="pass token ids")
                try:
                    prompt = self._tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
                except RequestError as error:
                    raise RequestError(f"{name}: {error.message}", hint=error.hint) from None
            check_ids(prompt, name, self._vocab_size, self._max_len, room)
            result.append(prompt)
        return result

    def _share(self, read: Callable[[], Any], given: Any, prepare: Callable[[Any], Any]) -> Any:
        """prepare(read()) of rank 0 on every rank; both values are JSON-safe.

        Raises InputMismatchError when another rank's input is there and differs; otherwise, on all ranks, whatever
        CutpError reading or preparing raised on rank 0.
        """
        try:
            return self._shared(read, given, prepare)
        except CutpError as error:
            # Raised by all ranks alike (but for errors of communication, which the ranks know of).
            self._comm.host.agreed_error = error
            raise
        except BaseException as error:
            self._comm.fail(error)
            raise

    def _shared(self, read: Callable[[], Any], given: Any, prepare: Callable[[Any], Any]) -> Any:
        value = error = None
        if given is not None:
            try:
                value = read()
            except CutpError as raised:
                error = raised
        if self._comm.rank == 0 and given is None:
            error = InputMismatchError("rank 0 passed no input",
                                       hint="rank 0 passes the input, the others None or the same")
        if self._comm.size == 1:
            if error is not None:
                raise error
            return prepare(value)
        self._check_equal(given, error.to_dict() if error else value)
        reply = None
        if self._comm.rank == 0:
            try:
                if error is not None:
                    raise error
                reply = {"result": prepare(value)}
            except CutpError as raised:
                reply = {"error": raised.to_dict()}
        reply = self._comm.host.broadcast_json(reply)
        if "error" in reply:
            raise CutpError.from_dict(reply["error"])
        return reply["result"]

    def _check_equal(self, given: Any, value: Any) -> None:
        digest = None
        if given is not None:
            digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
        digests = self._comm.host.all_gather_json(digest)
        different = [rank for rank, other in enumerate(digests) if other not in (None, digests[0])]
        if different and digests[0] is not None:
            raise InputMismatchError(f"rank {different[0]} passed another input than rank 0",
                                     hint="pass None on the other ranks, or the same input everywhere")


def _plain_conversations(conversations: Any) -> list:
    """A list of conversations, each a JSON-safe list of messages; one conversation is a list of one."""
    try:
        conversations = list(conversations)
        if conversations and isinstance(conversations[0], dict):
            conversations = [conversations]
        return json.loads(json.dumps(conversations))
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"conversations must be lists of messages made of plain values: {error}") from None
