"""Text to token ids and back, over the `tokenizers` library and a directory's tokenizer.json."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cutp.checkpoint.json_file import read_json_object, read_small_file
from cutp.errors import CheckpointError, InvalidTokenError, RequestError


class Tokenizer:
    """The tokenizer of a model directory.

    `special_tokens` maps "bos_token", "eos_token", "pad_token", ... to their text as tokenizer_config.json (or the
    older special_tokens_map.json) gives it. Truncation and padding settings in tokenizer.json are switched off:
    they belong to training, and would silently drop the end of a prompt.
    """

    def __init__(self, directory: str | os.PathLike):
        """Raises CheckpointError when tokenizer.json is missing or damaged."""
        from tokenizers import Tokenizer as Backend

        self.path = Path(directory) / "tokenizer.json"
        data = read_small_file(self.path)
        try:
            self.backend = Backend.from_str(data.decode("utf-8"))
        except Exception as e:  # the library raises plain Exception for every defect
            reason = str(e).split("\n")[0][:200]
            raise CheckpointError(f"{self.path} is damaged: {reason}", hint="fetch the file again") from None
        self.backend.no_truncation()
        self.backend.no_padding()
        self.special_tokens = read_special_tokens(directory)
        settings = json.loads(self.backend.to_str())
        self.decoder_settings: dict[str, Any] | None = settings.get("decoder")
        self.special_ids = frozenset(t["id"] for t in settings.get("added_tokens") or () if t.get("special"))

    @classmethod
    def load(cls, directory: str | os.PathLike) -> Tokenizer | None:
        """The tokenizer of `directory`, or None when it has no tokenizer.json."""
        return cls(directory) if (Path(directory) / "tokenizer.json").exists() else None

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; the model's embedding may have more rows."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def bos_token_id(self) -> int | None:
        return self._special_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._special_id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        return self._special_id("pad_token")

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. Raises RequestError when it is not text (lone surrogates included)."""
        return self.encode_batch([text], add_special_tokens)[0]

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """Token ids of each text, as `encode` gives them; long batches use several threads."""
        for text in texts:
            if not isinstance(text, str):
                raise RequestError(f"a prompt is a {type(text).__name__}, not a string")
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as e:
                raise RequestError(f"a prompt holds half of a surrogate pair at character {e.start}") from None
        try:
            if len(texts) == 1:
                return [self.backend.encode(texts[0], add_special_tokens=add_special_tokens).ids]
            encodings = self.backend.encode_batch(list(texts), add_special_tokens=add_special_tokens)
        except Exception as e:  # for example a vocabulary without an unknown token
            raise RequestError(f"the tokenizer {self.path} cannot encode a prompt: {e}") from None
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; incomplete UTF-8 becomes U+FFFD. Ids without a token (padding rows of the embedding) are
        left out. Raises InvalidTokenError for an id that no vocabulary can have."""
        try:
            return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)
        except (OverflowError, TypeError):
            raise InvalidTokenError("token ids must be integers from 0 to 2**32 - 1") from None

    def token_to_id(self, token: str) -> int | None:
        return self.backend.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        return self.backend.id_to_token(token_id)

    def _special_id(self, kind: str) -> int | None:
        token = self.special_tokens.get(kind)
        return None if token is None else self.backend.token_to_id(token)


def read_tokenizer_config(directory: str | os.PathLike) -> dict[str, Any]:
    """tokenizer_config.json as a dict, empty when there is none; CheckpointError when it is damaged."""
    path = Path(directory) / "tokenizer_config.json"
    return read_json_object(path) if path.exists() else {}


def read_special_tokens(directory: str | os.PathLike) -> dict[str, str]:
    """{"bos_token": "<s>", ...} from tokenizer_config.json, filled up from special_tokens_map.json."""
    result: dict[str, str] = {}
    older = Path(directory) / "special_tokens_map.json"
    for settings in (read_json_object(older) if older.exists() else {}, read_tokenizer_config(directory)):
        for key, value in settings.items():
            if not key.endswith("_token"):
                continue
            content = value.get("content") if isinstance(value, dict) else value
            if isinstance(content, str):
                result[key] = content
            elif content is not None and not isinstance(content, bool):  # add_bos_token is a flag
                message = f"{key} in the tokenizer settings of {directory} is {content!r}, not a string"
                raise CheckpointError(message, hint="fetch the file again")
    return result
