"""Phi-3 and Phi-4: query, key and value in one matrix, gate and up in another, LongRoPE, partial rotation."""

from __future__ import annotations

from tests.tiny_models.checkpoint import Case, Shapes, TinyFamily, decoder_shapes


def shapes(c: dict) -> Shapes:
    hidden, ffn, heads = c["hidden_size"], c["intermediate_size"], c["num_attention_heads"]
    head_dim, kv_heads = c.get("head_dim", hidden // heads), c["num_key_value_heads"] or heads
    layer: Shapes = {
        "self_attn.qkv_proj.weight": ((heads + 2 * kv_heads) * head_dim, hidden),
        "self_attn.o_proj.weight": (hidden, heads * head_dim),
        "mlp.gate_up_proj.weight": (2 * ffn, hidden),
        "mlp.down_proj.weight": (hidden, ffn),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    return decoder_shapes(c, lambda _: layer)


def longrope(pairs: int) -> dict:
    return {
        "short_factor": [round(1.0 + 0.1 * i, 2) for i in range(pairs)],
        "long_factor": [round(1.0 + 0.5 * i, 2) for i in range(pairs)],
    }


FAMILY = TinyFamily(
    base={
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "hidden_size": 64,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
        "tie_word_embeddings": False,
    },
    shapes=shapes,
    cases={
        "phi3_defaults": Case({"rope_theta": 10000.0, "num_key_value_heads": None}),
        "phi3_window": Case(
            {
                "hidden_size": 60,
                "num_attention_heads": 5,
                "num_key_value_heads": 1,
                "intermediate_size": 71,
                "sliding_window": 9,
                "partial_rotary_factor": 0.5,
                "rope_theta": 500.0,
                "rope_scaling": None,
                "hidden_act": "gelu",
            }
        ),
        # As in the files of Phi-3-mini-128k: "su" is an older name of LongRoPE. Prompts below, at and beyond 32 tokens.
        "phi3_su": Case(
            {
                "original_max_position_embeddings": 32,
                "rope_theta": 10000.0,
                "rope_scaling": {"type": "su", "original_max_position_embeddings": 32} | longrope(8),
            },
            prompt_lengths=(9, 32, 50),
        ),
        # As in Phi-4-mini: rotates three quarters of a head, tied head.
        "phi3_partial": Case(
            {
                "num_attention_heads": 8,
                "num_key_value_heads": 4,
                "head_dim": 16,
                "partial_rotary_factor": 0.75,
                "sliding_window": 40,
                "original_max_position_embeddings": 32,
                "hidden_size": 128,
                "rope_scaling": {"type": "longrope"} | longrope(6),
                "tie_word_embeddings": True,
            },
            prompt_lengths=(9, 45),
        ),
        "phi3_new_names": Case(
            {
                "num_attention_heads": 3,
                "num_key_value_heads": 3,
                "hidden_size": 48,
                "original_max_position_embeddings": 24,
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 300.0,
                    "partial_rotary_factor": 0.5,
                    "factor": 2.0,
                }
                | longrope(4),
            },
            prompt_lengths=(24, 25),
        ),
    },
)
