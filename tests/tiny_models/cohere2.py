"""Command R7B: attention and MLP side by side after one norm; windowed layers rotate neighbours, the others nothing."""

from __future__ import annotations

from tests.tiny_models.checkpoint import (
    Case,
    Shapes,
    TinyFamily,
    attention_shapes,
    decoder_shapes,
    mlp_shapes,
)


def shapes(c: dict) -> Shapes:
    bias = c["attention_bias"]
    layer = attention_shapes(c, bias=bias, output_bias=bias) | mlp_shapes(c)
    return decoder_shapes(c, lambda _: layer | {"input_layernorm.weight": (c["hidden_size"],)})


FAMILY = TinyFamily(
    base={
        "architectures": ["Cohere2ForCausalLM"],
        "model_type": "cohere2",
        "num_hidden_layers": 4,
        "hidden_act": "silu",
        "layer_norm_eps": 1e-5,
        "logit_scale": 0.25,
        "sliding_window": 11,
        "attention_bias": False,
        "tie_word_embeddings": True,
    },
    shapes=shapes,
    gains={"embed_tokens": 6.0, "o_proj": 4.0, "down_proj": 8.0},
    cases={
        # As in the released file; every fourth layer has neither a window nor positions.
        "cohere2_defaults": Case(
            {
                "head_dim": 12,
                "sliding_window_pattern": 4,
                "rope_theta": 50000.0,
                "rotary_pct": 1.0,
                "rope_scaling": None,
            }
        ),
        "cohere2_pattern": Case(
            {
                "num_attention_heads": 6,
                "num_key_value_heads": 3,
                "num_hidden_layers": 3,
                "intermediate_size": 71,
                "sliding_window_pattern": 2,
                "attention_bias": True,
                "layer_norm_eps": 1e-2,
                "rope_scaling": {"rope_type": "linear", "factor": 2.0},
            }
        ),
        "cohere2_layer_types": Case(
            {
                "hidden_size": 50,
                "num_attention_heads": 5,
                "num_key_value_heads": None,
                "num_hidden_layers": 3,
                "layer_types": ["full_attention", "sliding_attention", "full_attention"],
                "sliding_window": 3,
                "rope_parameters": {"rope_type": "default", "rope_theta": 200.0},
                "logit_scale": 1.0,
                "hidden_act": "gelu",
                "tie_word_embeddings": False,
            }
        ),
    },
)
