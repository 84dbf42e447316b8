"""Qwen3: a norm of every query and key head; head_dim is not hidden_size / heads."""

from __future__ import annotations

from tests.tiny_models.checkpoint import Case, Shapes, TinyFamily, attention_shapes, decoder_shapes, mlp_shapes


def shapes(c: dict) -> Shapes:
    c = {"head_dim": 128, **c}
    layer: Shapes = {
        **attention_shapes(c, bias=c["attention_bias"], output_bias=c["attention_bias"]),
        **mlp_shapes(c),
        "self_attn.q_norm.weight": (c["head_dim"],),
        "self_attn.k_norm.weight": (c["head_dim"],),
        "input_layernorm.weight": (c["hidden_size"],),
        "post_attention_layernorm.weight": (c["hidden_size"],),
    }
    return decoder_shapes(c, lambda _: layer)


FAMILY = TinyFamily(
    base={
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "head_dim": 16,
        "attention_bias": False,
        "tie_word_embeddings": False,
    },
    shapes=shapes,
    gains={"embed_tokens": 2.0},  # or a token predicts itself where the head is tied
    cases={
        "qwen3_defaults": Case({"rope_theta": 1000000.0, "rope_scaling": None, "sliding_window": None}),
        "qwen3_biases_tied": Case(
            {
                "num_attention_heads": 3,
                "num_key_value_heads": 3,
                "attention_bias": True,
                "tie_word_embeddings": True,
                "rms_norm_eps": 1e-3,
                "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
            }
        ),
        "qwen3_window": Case(
            {
                "num_hidden_layers": 3,
                "hidden_size": 40,
                "num_attention_heads": 6,
                "num_key_value_heads": 2,
                "intermediate_size": 71,
                "use_sliding_window": True,
                "sliding_window": 9,
                "max_window_layers": 2,
            }
        ),
        "qwen3_head_dim_128_yarn": Case(
            {
                "head_dim": 128,
                "num_hidden_layers": 1,
                "num_key_value_heads": 1,
                "rope_theta": 10000.0,
                "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
            }
        ),
    },
)
