"""GPT-OSS: all experts in one tensor, in float or as MXFP4; sinks, biases, every second layer windowed."""

from __future__ import annotations

import math

from tests.tiny_models.checkpoint import (
    ABSENT,
    Bytes,
    Case,
    Shapes,
    Tensor,
    TinyFamily,
    attention_shapes,
    decoder_shapes,
)


def matrices(c: dict, name: str, rows: int, columns: int, gain: float) -> Shapes:
    """The matrices [rows, columns] of all experts."""
    experts = c["num_local_experts"]
    if "quantization_config" not in c:
        # Stored transposed. Uniform values in [-1, 1) have a variance of 1/3.
        return {name: Tensor((experts, columns, rows), gain * math.sqrt(3 / columns))}
    # A random E2M1 number has a size of about 3.
    scale = round(math.log2(gain / math.sqrt(columns) / 3))
    shape = (experts, rows, columns // 32)
    return {f"{name}_blocks": Bytes((*shape, 16)), f"{name}_scales": Bytes(shape, 126 + scale, 128 + scale)}


def shapes(c: dict) -> Shapes:
    hidden, ffn, experts = c["hidden_size"], c["intermediate_size"], c["num_local_experts"]
    bias = c.get("attention_bias", True)
    layer = attention_shapes(c, bias=bias, output_bias=bias)
    layer |= matrices(c, "mlp.experts.gate_up_proj", 2 * ffn, hidden, 2.0)
    layer |= matrices(c, "mlp.experts.down_proj", hidden, ffn, 2.0)
    layer |= {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.sinks": Tensor((c["num_attention_heads"],), 1.5, 0.5),
        "mlp.router.weight": (experts, hidden),
        "mlp.router.bias": (experts,),
        "mlp.experts.gate_up_proj_bias": (experts, 2 * ffn),
        "mlp.experts.down_proj_bias": (experts, hidden),
    }
    return decoder_shapes(c, lambda _: layer)


_YARN = {"rope_type": "yarn", "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}

FAMILY = TinyFamily(
    base={
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "hidden_act": "silu",
        "head_dim": 16,
        "intermediate_size": 40,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "sliding_window": 11,
        "num_hidden_layers": 3,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
    shapes=shapes,
    cases={
        # The rotary parameters, the clamp, the kinds of the layers and the experts a token are left to their defaults.
        "gpt_oss_defaults": Case({"num_experts_per_tok": ABSENT, "rms_norm_eps": ABSENT, "hidden_act": ABSENT}),
        # As in the released files, but for the sizes. Seeds are those of which no token is so close to a tie of two
        # experts that the rounding of bfloat16 decides: the result would be another one.
        "gpt_oss_mxfp4": Case(
            {
                "hidden_size": 64,
                "intermediate_size": 96,
                "attention_bias": True,
                "experts_per_token": 2,
                "initial_context_length": 32,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
                "quantization_config": {
                    "modules_to_not_convert": [
                        "model.layers.*.self_attn",
                        "model.layers.*.mlp.router",
                        "model.embed_tokens",
                        "lm_head",
                    ],
                    "quant_method": "mxfp4",
                },
                "rope_scaling": _YARN | {"factor": 4.0, "original_max_position_embeddings": 32},
                "rope_theta": 150000,
                "swiglu_limit": 7.0,
                "output_router_logits": False,
            },
            seed=4,
        ),
        "gpt_oss_clamped": Case(
            {
                "num_attention_heads": 3,
                "num_key_value_heads": 1,
                "intermediate_size": 31,
                "num_local_experts": 7,
                "num_experts_per_tok": 1,
                "sliding_window": 4,
                "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
                "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
                "swiglu_limit": 1.25,
                "swiglu_alpha": 1.2,
                "attention_bias": False,
                "tie_word_embeddings": True,
            }
        ),
        "gpt_oss_mxfp4_uneven": Case(
            {
                "hidden_size": 32,
                "num_attention_heads": 5,
                "num_key_value_heads": 5,
                "head_dim": 8,
                "intermediate_size": 64,
                "num_local_experts": 2,
                "quantization_config": {"quant_method": "mxfp4"},
                "rope_theta": 1000.0,
            }
        ),
    },
)
