"""generation_config.json: how the authors of a model sample from it, and where generation ends."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from cutp.checkpoint.config import ModelConfig
from cutp.checkpoint.json_file import read_json_object
from cutp.errors import ModelConfigError


@dataclass(frozen=True)
class GenerationDefaults:
    """What the checkpoint says; None (or an empty tuple) where it says nothing."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    do_sample: bool | None = None
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    max_new_tokens: int | None = None
    repetition_penalty: float | None = None


def load_generation_config(directory: str | os.PathLike, config: ModelConfig) -> GenerationDefaults:
    """The defaults of a model directory; token ids that generation_config.json lacks come from `config`.

    A directory without generation_config.json is fine. Raises ModelConfigError for a malformed file or value, and for
    a token id that lies outside `vocab_size` when `config` has one.
    """
    path = Path(directory) / "generation_config.json"
    raw = read_json_object(path, ModelConfigError) if path.exists() else {}
    generation = ModelConfig(raw, path)

    def ids(key: str) -> tuple[int, ...]:
        for source in (generation, config):
            found = source.token_ids(key, ())
            vocab_size = config.positive_int("vocab_size", None)
            if vocab_size is not None and any(i >= vocab_size for i in found):
                raise source.error(key, f"below vocab_size {vocab_size}")
            if found:
                return found
        return ()

    def one_id(key: str) -> int | None:
        found = ids(key)
        if len(found) > 1:
            raise (generation if key in generation else config).error(key, "one token id")
        return found[0] if found else None

    def pad_id() -> int | None:
        # Older configs write -1 or an id beyond the vocabulary for "none"; padding is never fed to the model.
        for source in (generation, config):
            value = source.raw.get("pad_token_id")
            if type(value) is int:
                return value if 0 <= value < config.positive_int("vocab_size", 2**31) else None
            if value is not None:
                raise source.error("pad_token_id", "a token id")
        return None

    def probability(key: str) -> float | None:
        value = generation.non_negative_float(key, None)
        if value is not None and value > 1.0:
            raise generation.error(key, "from 0 to 1")
        return value

    return GenerationDefaults(
        temperature=generation.non_negative_float("temperature", None),
        top_k=generation.non_negative_int("top_k", None),
        top_p=probability("top_p"),
        min_p=probability("min_p"),
        do_sample=generation.boolean("do_sample", None),
        eos_token_ids=ids("eos_token_id"),
        bos_token_id=one_id("bos_token_id"),
        pad_token_id=pad_id(),
        max_new_tokens=generation.positive_int("max_new_tokens", None),
        repetition_penalty=generation.positive_float("repetition_penalty", None),
    )
