"""GPT-OSS (`GptOssForCausalLM`): sinks, every second layer windowed, experts with biases and a clamped SwiGLU.

The released files hold the experts' matrices as MXFP4; they are dequantized when they are loaded.
"""

from __future__ import annotations

import numpy as np

from cutp.checkpoint.config import ModelConfig
from cutp.comm.device_group import DeviceGroup
from cutp.models.decoder import DecoderBuilder, renamed
from cutp.models.decoder_config import DecoderConfig
from cutp.models.layer_types import layer_windows
from cutp.models.moe_config import expert_counts
from cutp.models.registry import ModelFamily
from cutp.models.weight_source import StackedExpert, WeightSource
from cutp.nn.distributed_transformer import DistributedTransformer
from cutp.nn.moe import Experts, MoE
from cutp.nn.moe_router import TopKSoftmaxRouter
from cutp.nn.norm import RMSNorm

_ROPE_THETA = 150000.0
_ROPE = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
         "original_max_position_embeddings": 4096}


def sizes(config: ModelConfig) -> DecoderConfig:
    if "rope_parameters" not in config and "rope_scaling" not in config:
        rope = _ROPE | {"rope_theta": config.positive_float("rope_theta", _ROPE_THETA)}
        config = ModelConfig({**config.raw, "rope_parameters": rope}, config.path)
    return DecoderConfig.read(config, {"num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 131072,
                                       "rms_norm_eps": 1e-5, "rope_theta": _ROPE_THETA})


def build(config: ModelConfig, devices: DeviceGroup, dtype: np.dtype, page_size: int) -> DistributedTransformer:
    """The model that `config` describes, over `devices`, without weights."""
    c = sizes(config)
    make = DecoderBuilder(c, devices, dtype, page_size, norm=lambda dim: RMSNorm(dim, dtype, c.rms_norm_eps))
    rope, bias = make.rope(), config.boolean("attention_bias", True)
    window = config.positive_int("sliding_window", None if "sliding_window" in config.raw else 128)
    windows = layer_windows(config, c.num_hidden_layers, window, lambda i: i % 2 == 0)
    experts, top_k = expert_counts(config, 128, 4)
    limit, alpha = config.positive_float("swiglu_limit", 7.0), config.positive_float("swiglu_alpha", 1.702)

    def moe() -> MoE:
        return MoE(TopKSoftmaxRouter(c.hidden_size, experts, top_k, dtype, has_bias=True),
                   Experts(experts, c.hidden_size, c.intermediate_size, dtype, has_bias=True, fused=True,
                           swiglu_limit=limit, swiglu_alpha=alpha))

    return make.model(lambda i: make.block(
        make.attention(rope, has_bias=bias, window=windows[i], has_sinks=True), moe()), rope=rope)


_renamed = renamed({"gate": "router"})


def source(name: str) -> str | WeightSource:
    """`layers.0.mlp.experts.3.gate_up_proj.bias` -> expert 3 of `model.layers.0.mlp.experts.gate_up_proj_bias`."""
    parts = _renamed(name).split(".")
    if "experts" not in parts:
        return ".".join(parts)
    *prefix, expert, matrix, kind = parts
    stacked = ".".join([*prefix, matrix if kind == "weight" else f"{matrix}_{kind}"])
    return StackedExpert(stacked, int(expert), interleaved=matrix == "gate_up_proj")


FAMILIES = (ModelFamily("GptOssForCausalLM", "gpt_oss", sizes, build, source, quantizations=("mxfp4",)),)
