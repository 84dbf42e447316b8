"""Phi-3 and Phi-4 (`Phi3ForCausalLM`): fused projections, LongRoPE, partial rotation."""

from __future__ import annotations

import numpy as np

from cutp.checkpoint.config import ModelConfig
from cutp.comm.device_group import DeviceGroup
from cutp.errors import UnsupportedModelError
from cutp.models.decoder import DecoderBuilder
from cutp.models.decoder_config import DecoderConfig
from cutp.models.registry import ModelFamily
from cutp.models.rope_config import rope_parameters
from cutp.nn.distributed_transformer import DistributedTransformer
from cutp.nn.rope_parameters import RopeParameters

_DEFAULTS = {"vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
             "num_attention_heads": 32, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}


def sizes(config: ModelConfig) -> DecoderConfig:
    return DecoderConfig.read(config, _DEFAULTS, rope=_rope(config))


def _rope(config: ModelConfig) -> RopeParameters:
    """Plain or LongRoPE, which is also written "su" and, in this family only, "yarn"."""
    raw = {"original_max_position_embeddings": 4096, **config.raw}
    for key in ("rope_scaling", "rope_parameters"):
        rope = config.section(key, None)
        if rope is not None and "yarn" in (rope.raw.get("rope_type"), rope.raw.get("type")):
            raw[key] = {**rope.raw, "rope_type": "longrope"}
    parameters = rope_parameters(ModelConfig(raw, config.path))
    if parameters.rope_type not in ("default", "longrope"):
        raise UnsupportedModelError(f"{config.path} asks for the rope type {parameters.rope_type!r}, which Phi-3 does "
                                    "not have", hint="known types: default, longrope")
    return parameters


def build(config: ModelConfig, devices: DeviceGroup, dtype: np.dtype, page_size: int) -> DistributedTransformer:
    """The model that `config` describes, over `devices`, without weights."""
    make = DecoderBuilder(sizes(config), devices, dtype, page_size)
    rope = make.rope(partial=True)
    window = config.positive_int("sliding_window", None)
    return make.model(lambda i: make.block(make.attention(rope, fused_qkv=True, window=window), make.mlp(fused=True)),
                      rope=rope)


FAMILIES = (ModelFamily("Phi3ForCausalLM", "phi3", sizes, build),)
