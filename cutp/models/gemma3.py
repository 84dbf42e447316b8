"""Gemma 3, text only: Gemma 2 with norms of queries and keys and two rotary embeddings.

`Gemma3ForCausalLM`, and the language model of `Gemma3ForConditionalGeneration`, whose vision tower is left out.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cutp.checkpoint.config import ModelConfig
from cutp.comm.device_group import DeviceGroup
from cutp.models.decoder_config import DecoderConfig
from cutp.models.gemma2 import GEMMA_DEFAULTS, checkpoint_name, gemma_activation, gemma_builder, gemma_model
from cutp.models.layer_types import FULL, SLIDING
from cutp.models.registry import ModelFamily
from cutp.models.rope_config import rope_parameters_by_layer_type
from cutp.nn.distributed_transformer import DistributedTransformer
from cutp.nn.rope_parameters import RopeParameters

_DEFAULTS = GEMMA_DEFAULTS | {"vocab_size": 262208, "max_position_embeddings": 131072}


class Gemma3Config(DecoderConfig):
    """Sizes of Gemma 3, whose `max_position_embeddings` is the length that scaling has reached."""

    @property
    def context_length(self) -> int:
        return self.max_position_embeddings


def sizes(config: ModelConfig) -> DecoderConfig:
    return Gemma3Config.read(config, _DEFAULTS, hidden_act=gemma_activation(config), rope=_ropes(config)[FULL])


def build(config: ModelConfig, devices: DeviceGroup, dtype: np.dtype, page_size: int) -> DistributedTransformer:
    """The model that `config` describes, over `devices`, without weights."""
    make = gemma_builder(sizes(config), devices, dtype, page_size)
    ropes = _ropes(config)
    pattern = config.positive_int("sliding_window_pattern", 6)
    # HF's Gemma 3 does not read attn_logit_softcapping, though its configuration has it.
    return gemma_model(config, make, make.rope(ropes[FULL]), make.rope(ropes[SLIDING]), lambda i: (i + 1) % pattern > 0,
                       final_cap=None, qk_norm_eps=make.c.rms_norm_eps, qk_norm_offset=1.0,
                       qk_norm_multiply_before_cast=True)


def _ropes(config: ModelConfig) -> dict[str, RopeParameters]:
    """The rotary parameters of each kind of layer. The older `rope_scaling` is for layers without a window."""
    by_kind, scaling = config.section("rope_parameters", None), config.section("rope_scaling", None)
    if by_kind is not None and by_kind.raw and not {FULL, SLIDING} & by_kind.raw.keys():
        raise config.error("rope_parameters", f"an object with entries {FULL!r} and {SLIDING!r}")

    def entry(kind: str, theta: float) -> dict[str, Any]:
        given = None if by_kind is None else by_kind.section(kind, None)
        return {"rope_theta": theta, **({} if given is None else given.raw)}

    full = entry(FULL, config.positive_float("rope_theta", 1e6))
    sliding = entry(SLIDING, config.positive_float("rope_local_base_freq", 1e4))
    merged = {FULL: full | ({} if scaling is None else scaling.raw), SLIDING: sliding}
    raw = {**config.raw, "rope_scaling": None, "rope_parameters": merged}
    return rope_parameters_by_layer_type(ModelConfig(raw, config.path, config.prefix), (FULL, SLIDING))


def _language_model(config: ModelConfig) -> ModelConfig:
    return config.section("text_config")


FAMILIES = (
    ModelFamily("Gemma3ForCausalLM", "gemma3_text", sizes, build, checkpoint_name),
    ModelFamily("Gemma3ForConditionalGeneration", "gemma3", lambda config: sizes(_language_model(config)),
                lambda config, *rest: build(_language_model(config), *rest),
                lambda name: f"language_model.{checkpoint_name(name)}"),
)
