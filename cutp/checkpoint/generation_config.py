"""generation_config.json: how the authors of a model sample from it, and where generation ends."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten

from cutp.checkpoint.config import ModelConfig
from cutp.checkpoint.json_file import read_json_object
from cutp.errors import ModelConfigError

# Settings of Hugging Face's GenerationConfig that change what is generated and that cutp does not have, with the values
# (beside null and empty lists and objects) that ask for nothing. Left out: max_length, which counts the prompt and is
# there the limit for callers who set none, as max_tokens and max_len are here; and what only changes speed or output.
_NOT_APPLIED: dict[str, tuple] = {
    "num_beams": (1,), "num_beam_groups": (1,), "constraints": (), "force_words_ids": (), "penalty_alpha": (0,),
    "dola_layers": (), "guidance_scale": (1,), "num_return_sequences": (1,), "max_time": (),
    "typical_p": (1,), "top_h": (1,), "epsilon_cutoff": (0,), "eta_cutoff": (0,),
    "no_repeat_ngram_size": (0,), "encoder_no_repeat_ngram_size": (0,), "encoder_repetition_penalty": (1,),
    "bad_words_ids": (), "sequence_bias": (), "suppress_tokens": (), "begin_suppress_tokens": (),
    "forced_bos_token_id": (), "forced_eos_token_id": (), "exponential_decay_length_penalty": (), "min_length": (0,),
    "stop_strings": (), "token_healing": (False,), "watermarking_config": (),
}  # fmt: skip


@dataclass(frozen=True)
class GenerationDefaults:
    """What the checkpoint says; None (or an empty tuple) where it says nothing.

    not_applied: what it asks for that cutp does not do, as "key value".
    """

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
    min_new_tokens: int | None = None
    not_applied: tuple[str, ...] = ()


def load_generation_config(directory: str | os.PathLike, config: ModelConfig) -> GenerationDefaults:
    """The defaults of a model directory; token ids that generation_config.json lacks come from `config`.

    A directory without generation_config.json is fine. Raises ModelConfigError for a malformed file or value. A token
    id outside the `vocab_size` of `config` is not applied: a small model often has the ids of the large one whose
    configuration it started from, and no text can hold them.
    """
    path = Path(directory) / "generation_config.json"
    raw = read_json_object(path, ModelConfigError) if path.exists() else {}
    generation = ModelConfig(raw, path)
    outside: dict[str, None] = {}  # sentences, each once

    def ids(key: str) -> tuple[int, ...]:
        for source in (generation, config):
            found = source.token_ids(key, ())
            vocab_size = config.positive_int("vocab_size", None)
            known = tuple(i for i in found if vocab_size is None or i < vocab_size)
            outside.update({f"{key} {i}, beyond vocab_size {vocab_size}": None for i in found if i not in known})
            if known:
                return known
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

    eos_token_ids, bos_token_id = ids("eos_token_id"), one_id("bos_token_id")
    return GenerationDefaults(
        temperature=generation.non_negative_float("temperature", None),
        top_k=generation.non_negative_int("top_k", None),
        top_p=probability("top_p"),
        min_p=probability("min_p"),
        do_sample=generation.boolean("do_sample", None),
        eos_token_ids=eos_token_ids,
        bos_token_id=bos_token_id,
        pad_token_id=pad_id(),
        max_new_tokens=generation.positive_int("max_new_tokens", None),
        repetition_penalty=generation.positive_float("repetition_penalty", None),
        min_new_tokens=generation.non_negative_int("min_new_tokens", None),
        not_applied=(*(f"{key} {shorten(json.dumps(raw[key]), 60)}" for key, neutral in _NOT_APPLIED.items()
                       if raw.get(key) not in (None, [], {}, *neutral)), *outside),
    )
