"""The lines a job writes: for OpenAI batch lines what the API answers, for others the text and what came with it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cutp.batch.inputs import Line
from cutp.batch.openai_body import CHAT
from cutp.batch.records import PLAIN, Record, key_of
from cutp.engine.outputs import GenerationOutput, TokenLogprobs
from cutp.errors import CutpError

# What stands for minus infinity, which JSON cannot hold; the value is OpenAI's.
_LEAST_LOGPROB = -9999.0


@dataclass(frozen=True)
class ResultWriter:
    """Makes result lines. token_text: the text of one token id, None without a tokenizer. created: Unix time, the same
    for all lines of a job, so that a job that was interrupted writes the same lines as one that was not."""

    model: str
    created: int
    token_text: Callable[[int], str] | None

    def line(self, record: Record, outputs: Sequence[GenerationOutput]) -> dict[str, Any]:
        """The result line of `record`; outputs: one a sample, in order."""
        usage = _usage(outputs)
        if record.kind == PLAIN:
            samples = [self._plain(output) for output in outputs]
            return {"id": record.id, **(samples[0] if len(samples) == 1 else {"choices": samples}), "usage": usage}
        name = key_of(record.id).hex()
        is_chat = record.kind == CHAT
        choices = [self._chat_choice(output) if is_chat else self._choice(output) for output in outputs]
        body = {"id": f"{'chatcmpl' if is_chat else 'cmpl'}-{name}", "object": record.kind, "created": self.created,
                "model": self.model, "choices": choices, "usage": usage}
        return {"id": f"batch_req_{name}", "custom_id": record.id,
                "response": {"status_code": 200, "request_id": name, "body": body}, "error": None}

    def _plain(self, output: GenerationOutput) -> dict[str, Any]:
        line = {"text": output.text, "finish_reason": output.finish_reason, "seed": output.seed}
        if output.text is None:
            line["token_ids"] = list(output.token_ids)
        if output.logprobs is not None:
            line["logprobs"] = [_entry(entry) for entry in output.logprobs]
        if output.prompt_logprobs is not None:
            line["prompt_logprobs"] = [entry and _entry(entry) for entry in output.prompt_logprobs]
        return line

    def _choice(self, output: GenerationOutput) -> dict[str, Any]:
        choice = {"index": output.sample_index, "text": output.text, "logprobs": None,
                  "finish_reason": output.finish_reason, **self._extras(output)}
        if output.logprobs is not None:
            texts = [self._text(entry.token_id) for entry in output.logprobs]
            offsets = list(itertools.accumulate((len(text) for text in texts[:-1]), initial=0)) if texts else []
            choice["logprobs"] = {
                "tokens": texts, "token_logprobs": [_finite(entry.logprob) for entry in output.logprobs],
                "top_logprobs": [{self._text(token): _finite(value) for token, value in entry.top}
                                 for entry in output.logprobs],
                "text_offset": offsets}
        return choice

    def _chat_choice(self, output: GenerationOutput) -> dict[str, Any]:
        choice = {"index": output.sample_index, "message": {"role": "assistant", "content": output.text},
                  "logprobs": None, "finish_reason": output.finish_reason, **self._extras(output)}
        if output.logprobs is not None:
            choice["logprobs"] = {"content": [
                {**self._chat_token(entry.token_id, entry.logprob),
                 "top_logprobs": [self._chat_token(token, value) for token, value in entry.top]}
                for entry in output.logprobs]}
        return choice

    def _chat_token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._text(token)
        return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode("utf-8", "replace"))}

    def _extras(self, output: GenerationOutput) -> dict[str, Any]:
        """What the API has no place for, under names of its own."""
        extras: dict[str, Any] = {"seed": output.seed}
        if output.text is None:
            extras["token_ids"] = list(output.token_ids)
        if output.prompt_logprobs is not None:
            extras["prompt_logprobs"] = [entry and _entry(entry) for entry in output.prompt_logprobs]
        return extras

    def _text(self, token: int) -> str:
        return f"token_id:{token}" if self.token_text is None else self.token_text(token)


def error_line(identity: str | int | None, openai: bool, line: Line | None, error: CutpError) -> dict[str, Any]:
    """The error record of one line; without an id (`identity` None) the place of the line stands for it."""
    cause = {"code": error.code, "message": str(error)}
    if identity is None:
        return {"id": None, "file": line.name, "line": line.number, "error": cause}
    if not openai:
        return {"id": identity, "error": cause}
    return {"id": f"batch_req_{key_of(identity).hex()}", "custom_id": identity, "response": None, "error": cause}


def _usage(outputs: Sequence[GenerationOutput]) -> dict[str, int]:
    prompt = len(outputs[0].prompt_token_ids)
    completion = sum(len(output.token_ids) for output in outputs)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _entry(entry: TokenLogprobs) -> dict[str, Any]:
    return {"token_id": entry.token_id, "logprob": _finite(entry.logprob),
            "top": [[token, _finite(value)] for token, value in entry.top]}


def _finite(value: float) -> float:
    return value if math.isfinite(value) else _LEAST_LOGPROB
