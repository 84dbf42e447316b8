"""SmolLM3: layers without positions, by interval or listed; windows where positions are missing."""

from __future__ import annotations

from tests.tiny_models.checkpoint import ABSENT, Case, Shapes, TinyFamily, attention_shapes, decoder_shapes, mlp_shapes


def shapes(c: dict) -> Shapes:
    c = {"tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False, **c}
    layer: Shapes = {
        **attention_shapes(c, bias=c["attention_bias"], output_bias=c["attention_bias"]),
        **mlp_shapes(c, bias=c["mlp_bias"]),
        "input_layernorm.weight": (c["hidden_size"],),
        "post_attention_layernorm.weight": (c["hidden_size"],),
    }
    return decoder_shapes(c, lambda _: layer)


FAMILY = TinyFamily(
    base={"architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3", "num_hidden_layers": 4},
    shapes=shapes,
    gains={"embed_tokens": 2.0},  # or a token predicts itself where the head is tied
    cases={
        # The fourth layer has no positions, the head is tied, theta is two million.
        "smollm3_defaults": Case(seed=1),
        "smollm3_listed": Case(
            {
                "num_hidden_layers": 3,
                "num_attention_heads": 6,
                "num_key_value_heads": 3,
                "no_rope_layers": [0, 1, 0, 1],
                "no_rope_layer_interval": 1,
                "layer_types": ["full_attention"] * 3,
                "rope_theta": 5000.0,
                "attention_bias": True,
                "tie_word_embeddings": False,
            }
        ),
        "smollm3_windows": Case(
            {
                "hidden_size": 60,
                "num_attention_heads": 5,
                "num_key_value_heads": 1,
                "intermediate_size": 71,
                "no_rope_layer_interval": 2,
                "use_sliding_window": True,
                "sliding_window": 7,
                "mlp_bias": True,
                "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
            }
        ),
        "smollm3_layer_types": Case(
            {
                "num_hidden_layers": 2,
                "num_key_value_heads": 4,
                "no_rope_layers": [1, 0],
                "use_sliding_window": False,
                "sliding_window": 11,
                "layer_types": ["sliding_attention", "full_attention"],
                "tie_word_embeddings": ABSENT,
                "rope_theta": 1000.0,
                "rope_scaling": {"rope_type": "linear", "factor": 2.0},
            }
        ),
    },
)
