"""From an input line to a record: an id that is stable across runs, a prompt, and parameters.

Three kinds of lines are known: OpenAI batch lines ({"custom_id", "url", "body"}), plain JSON lines ({"id", "prompt" or
"messages", ...}) and lines of text. A field either has an effect or is refused; the few that have none by their nature
("model", "user", "metadata") are accepted.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from cutp.batch.inputs import MAX_LINE_BYTES, Line
from cutp.batch.openai_body import read_body
from cutp.engine.sampling_params import SamplingParams
from cutp.errors import RequestError

PLAIN = "plain"
_OPENAI_FIELDS = ("custom_id", "method", "url", "body")
_OWN_FIELDS = ("id", "prompt", "messages", "metadata")


@dataclass(frozen=True)
class Record:
    """One request of the corpus, JSON-safe but for `params`.

    index: its place among all records of the input. kind: "plain", or the OpenAI object it asks for. prompt: text,
    token ids, or messages with `chat`. where: the input line, for errors.
    """

    index: int
    id: str | int
    kind: str
    chat: bool
    prompt: str | list
    params: SamplingParams
    where: str

    @property
    def cost(self) -> int:
        """What the record is worth when work is dealt: about the tokens it may take."""
        is_ids = isinstance(self.prompt, list) and not self.chat
        prompt = len(self.prompt) if is_ids else len(str(self.prompt)) // 4
        return prompt + self.params.n * (self.params.max_tokens or 0)

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "params": self.params.to_dict()}

    @staticmethod
    def from_json(d: dict[str, Any]) -> Record:
        return Record(**{**d, "params": SamplingParams.from_dict(d["params"])})


@dataclass(frozen=True)
class JobDefaults:
    """What holds for records that say nothing else. params: without None. chat: text prompts are user messages."""

    params: dict[str, Any]
    chat: bool
    seed: int


def key_of(identity: str | int | list) -> bytes:
    """16 bytes that stand for an id (or for [file, line number], where a line has no id)."""
    return hashlib.blake2b(json.dumps(identity).encode(), digest_size=16).digest()


def record_seed(job_seed: int, identity: str | int) -> int:
    """The seed of one record: neither the order, nor the replica, nor a resumption changes it."""
    return int.from_bytes(hashlib.blake2b(json.dumps([job_seed, identity]).encode(), digest_size=8).digest(), "big")


def read_identity(line: Line) -> tuple[str | int, Any]:
    """(id, content) of a line: the content is a text or a JSON object. Raises RequestError when it has no usable id."""
    if line.data is None:
        raise RequestError(f"{line.where} is longer than {MAX_LINE_BYTES} bytes")
    try:
        text = line.data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{line.where} is not UTF-8 at byte {error.start}") from None
    if line.is_text:
        return f"{line.name}:{line.number}", text.rstrip("\r\n")
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{line.where} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise RequestError(f"{line.where} is not a JSON object")
    name = "custom_id" if "custom_id" in value else "id"
    identity = value.get(name)
    good = isinstance(identity, str) and identity or (type(identity) is int and name == "id")
    if not good:
        kind = "a string that is not empty" + (" or an integer" if name == "id" else "")
        found = "has no id" if identity is None else f"has {name} {json.dumps(identity)[:80]}"
        raise RequestError(f"{line.where} {found}", hint=f'"{name}" must be {kind}, different in every line')
    return identity, value


def make_record(index: int, line: Line, identity: str | int, content: Any, defaults: JobDefaults) -> Record:
    """The record of a line that `read_identity` has read. Raises RequestError naming the line and what is wrong."""
    try:
        if isinstance(content, str):
            kind, chat, prompt, given = PLAIN, False, content, {}
        elif "custom_id" in content:
            kind, chat, prompt, given = _openai(content)
        else:
            kind, chat, prompt, given = _plain(content)
        if kind == PLAIN and defaults.chat and isinstance(prompt, str):
            chat, prompt = True, [{"role": "user", "content": prompt}]
        params = SamplingParams.from_dict({**defaults.params, "seed": record_seed(defaults.seed, identity), **given})
        params.check()
    except RequestError as error:
        raise RequestError(f"{line.where}: {error.message}", hint=error.hint) from None
    return Record(index, identity, kind, chat, prompt, params, line.where)


def _plain(value: dict) -> tuple[str, bool, Any, dict]:
    chat = value.get("messages") is not None
    if chat == (value.get("prompt") is not None):
        raise RequestError('it needs either "prompt" or "messages"')
    prompt = check_messages(value["messages"]) if chat else check_prompt(value["prompt"])
    return PLAIN, chat, prompt, {k: v for k, v in value.items() if k not in _OWN_FIELDS and v is not None}


def _openai(value: dict) -> tuple[str, bool, Any, dict]:
    unknown = [name for name in value if name not in _OPENAI_FIELDS]
    if unknown:
        raise RequestError(f"unknown field {json.dumps(unknown[0])} beside custom_id, method, url and body")
    if value.get("method", "POST") != "POST":
        raise RequestError(f"method is {json.dumps(value['method'])[:80]}, not POST")
    kind, given = read_body(value.get("url"), value.get("body"))
    chat = "messages" in given
    prompt = check_messages(given.pop("messages")) if chat else check_prompt(given.pop("prompt", None))
    return kind, chat, prompt, given


def check_prompt(prompt: Any) -> str | list[int]:
    """A prompt that is text or token ids; RequestError for anything else."""
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
        prompt = prompt[0]
    good = isinstance(prompt, str) or isinstance(prompt, list) and all(type(token) is int for token in prompt)
    if not good:
        raise RequestError("the prompt is neither text nor a list of token ids", hint="one prompt a line")
    if not prompt:
        raise RequestError("the prompt is empty")
    return prompt


def check_messages(messages: Any) -> list[dict]:
    """Messages with string contents, as chat templates expect them; parts of text are joined with line feeds."""
    if not isinstance(messages, list) or not messages:
        raise RequestError("messages must be a list that is not empty")
    return [_message(message, index) for index, message in enumerate(messages)]


def _message(message: Any, index: int) -> dict:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise RequestError(f'messages[{index}] must be an object with a string "role"')
    content = message.get("content")
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        if len(texts) != len(content) or not all(isinstance(text, str) for text in texts):
            raise RequestError(f"messages[{index}] has a part that is not text")
        return {**message, "content": "\n".join(texts)}
    if content is not None and not isinstance(content, str):
        raise RequestError(f'messages[{index}]: "content" must be a string or a list of text parts')
    return message


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
