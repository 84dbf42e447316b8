"""Chat messages to the prompt text a model was trained on, by the Jinja template its directory carries."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from cutp.checkpoint.json_file import read_small_file
from cutp.checkpoint.tokenizer import read_special_tokens, read_tokenizer_config
from cutp.errors import CheckpointError, RequestError

MAX_TEMPLATE_BYTES = 1_000_000
_MAX_NESTING = 64


class ChatTemplate:
    """A compiled chat template; `source` is its text, `where` names the file it came from.

    Templates run in a sandbox with limits on time, memory and output (see `template_sandbox`).
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None, where: str = "the chat template"):
        """Raises CheckpointError when the template is too large or not valid Jinja."""
        from jinja2 import TemplateSyntaxError

        from cutp.checkpoint.template_sandbox import LimitedEnvironment

        self.source = source
        self.where = where
        self.special_tokens = dict(special_tokens or {})
        if len(source) > MAX_TEMPLATE_BYTES:
            raise CheckpointError(f"the chat template in {where} is larger than {MAX_TEMPLATE_BYTES} characters")
        self._environment = LimitedEnvironment()
        try:
            self._template = self._environment.from_string(source)
        except TemplateSyntaxError as e:
            message = f"the chat template in {where} is not valid at line {e.lineno}: {e.message}"
            raise CheckpointError(message, hint="give prompts as text instead, or fetch the file again") from None
        except Exception as e:  # nesting beyond what Python compiles: RecursionError, SyntaxError, MemoryError, ...
            message = f"the chat template in {where} cannot be compiled: {type(e).__name__}"
            raise CheckpointError(message, hint="give prompts as text instead") from None

    @classmethod
    def load(cls, directory: str | os.PathLike) -> ChatTemplate | None:
        """The template of a model directory, or None when it has none.

        chat_template.jinja wins over `chat_template` in tokenizer_config.json, which is a string or a list of
        {"name", "template"} of which "default" is taken. Raises CheckpointError for a malformed one.
        """
        path = Path(directory) / "chat_template.jinja"
        if path.exists():
            try:
                source = read_small_file(path, MAX_TEMPLATE_BYTES).decode("utf-8")
            except UnicodeDecodeError:
                raise CheckpointError(f"{path} is not UTF-8", hint="fetch the file again") from None
        else:
            path = Path(directory) / "tokenizer_config.json"
            source = _default_template(read_tokenizer_config(directory).get("chat_template"), path)
        return None if source is None else cls(source, read_special_tokens(directory), str(path))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        now: datetime | None = None,
        **variables: Any,
    ) -> str:
        """The prompt text for `messages`, a list of {"role": str, "content": str or list of parts, ...}.

        `variables` (tools, documents, enable_thinking, ...) are visible to the template and, like messages, must be
        plain JSON values. `now` is what strftime_now sees, by default the clock. Raises RequestError when the
        messages are malformed, the template refuses them, fails on them, or exceeds its limits.
        """
        from jinja2 import TemplateError

        from cutp.checkpoint.template_limits import Meter, TemplateLimitError
        from cutp.checkpoint.template_sandbox import TemplateRaised

        if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)) or not messages:
            raise RequestError("messages must be a non-empty list")
        for i, message in enumerate(messages):
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise RequestError(f"messages[{i}] must be an object with a string 'role'")
        values = {"tools": None, "documents": None, **self.special_tokens}
        values.update({key: _plain(value, key) for key, value in variables.items()})
        values.update(messages=_plain(messages, "messages"), add_generation_prompt=bool(add_generation_prompt))
        self._environment.use(Meter(now))
        try:
            return self._template.render(values)
        except TemplateRaised as e:
            raise RequestError(f"the chat template refuses these messages: {_line(e)}") from None
        except TemplateLimitError as e:
            raise RequestError(f"the chat template in {self.where} was stopped: {_line(e)}") from None
        except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as e:
            raise RequestError(f"the chat template in {self.where} fails on these messages: {_line(e)}") from None
        except (RecursionError, MemoryError) as e:
            raise RequestError(f"the chat template in {self.where} was stopped: {type(e).__name__}") from None
        finally:
            self._environment.use(None)


def _default_template(value: Any, path: Path) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and all(
        isinstance(t, dict) and isinstance(t.get("name"), str) and isinstance(t.get("template"), str) for t in value
    ):
        by_name = {t["name"]: t["template"] for t in value}
        if "default" in by_name or not by_name:
            return by_name.get("default")
        raise CheckpointError(f"chat_template in {path} has no entry 'default', only {', '.join(by_name)}")
    raise CheckpointError(f"chat_template in {path} is neither a string nor a list of named templates")


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """A copy made of exact JSON types, so that no method of a caller's object is within a template's reach."""
    if depth > _MAX_NESTING:
        raise RequestError(f"{where} is nested more than {_MAX_NESTING} deep")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise RequestError(f"{where} has a key that is not a string")
        return {str.__str__(k): _plain(v, f"{where}.{k}"[:200], depth + 1) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v, f"{where}[{i}]"[:200], depth + 1) for i, v in enumerate(value)]
    raise RequestError(f"{where} is a {type(value).__name__}, not a JSON value")


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 500 else text[:497] + "..."
