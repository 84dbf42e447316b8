"""GLM-4-0414: norms before and after both branches, half of every head rotated, neighbour with neighbour."""

from __future__ import annotations

from tests.tiny_models.checkpoint import Case, Shapes, Tensor, TinyFamily, attention_shapes, decoder_shapes


def shapes(c: dict) -> Shapes:
    hidden, ffn = c["hidden_size"], c["intermediate_size"]
    layer = attention_shapes(c, bias=c.get("attention_bias", True)) | {
        "mlp.gate_up_proj.weight": (2 * ffn, hidden),
        "mlp.down_proj.weight": (hidden, ffn),
        "input_layernorm.weight": (hidden,),
        "post_self_attn_layernorm.weight": Tensor((hidden,), 0.4, 1.5),
        "post_attention_layernorm.weight": (hidden,),
        "post_mlp_layernorm.weight": Tensor((hidden,), 0.4, 2.0),
    }
    return decoder_shapes(c, lambda _: layer)


FAMILY = TinyFamily(
    base={
        "architectures": ["Glm4ForCausalLM"],
        "model_type": "glm4",
        "head_dim": 16,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
    shapes=shapes,
    cases={
        # Biases of q, k and v, the share of a head that is rotated and the number of key-value heads are defaults.
        "glm4_defaults": Case({"rope_theta": 10000.0}),
        "glm4_no_biases": Case(
            {
                "attention_bias": False,
                "num_attention_heads": 6,
                "num_key_value_heads": 2,
                "partial_rotary_factor": 0.5,
                "rope_theta": 500.0,
            }
        ),
        "glm4_whole_heads": Case(
            {
                "hidden_size": 40,
                "num_attention_heads": 5,
                "num_key_value_heads": 5,
                "head_dim": 12,
                "intermediate_size": 71,
                "attention_bias": True,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
                "hidden_act": "gelu",
                "tie_word_embeddings": True,
            }
        ),
        "glm4_yarn": Case(
            {
                "num_attention_heads": 3,
                "num_key_value_heads": 1,
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 10000.0,
                    "factor": 4.0,
                    "original_max_position_embeddings": 32,
                    "partial_rotary_factor": 0.75,
                },
            }
        ),
    },
)
