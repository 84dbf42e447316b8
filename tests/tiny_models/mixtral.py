"""Mixtral: a mixture of experts in every layer, stored one tensor an expert and matrix under old names."""

from __future__ import annotations

from tests.tiny_models.checkpoint import ABSENT, Case, Shapes, TinyFamily, attention_shapes, decoder_shapes


def shapes(c: dict) -> Shapes:
    hidden, ffn = c["hidden_size"], c["intermediate_size"]
    layer: Shapes = attention_shapes(c) | {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "block_sparse_moe.gate.weight": (c["num_local_experts"], hidden),
    }
    for expert in range(c["num_local_experts"]):
        prefix = f"block_sparse_moe.experts.{expert}"
        layer |= {f"{prefix}.{name}.weight": (ffn, hidden) for name in ("w1", "w3")}
        layer[f"{prefix}.w2.weight"] = (hidden, ffn)
    return decoder_shapes(c, lambda _: layer)


FAMILY = TinyFamily(
    base={
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_act": "silu",
        "intermediate_size": 40,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
    shapes=shapes,
    gains={"w2": 3.0, "gate": 1.5},
    cases={
        # The window, the rotary base and the experts a token are left to their defaults.
        "mixtral_defaults": Case({"num_experts_per_tok": ABSENT, "rms_norm_eps": ABSENT}),
        "mixtral_window": Case(
            {
                "hidden_size": 50,
                "num_attention_heads": 5,
                "num_key_value_heads": 1,
                "intermediate_size": 31,
                "num_local_experts": 7,
                "num_experts_per_tok": 3,
                "sliding_window": 9,
                "rope_theta": 500.0,
            }
        ),
        "mixtral_top_1": Case(
            {
                "num_attention_heads": 3,
                "num_key_value_heads": 3,
                "num_local_experts": 5,
                "num_experts_per_tok": 1,
                "hidden_act": "gelu",
                "tie_word_embeddings": True,
                "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
            }
        ),
        # Fewer experts than ranks, and all of them used.
        "mixtral_2_experts": Case({"num_local_experts": 2, "head_dim": 20, "rms_norm_eps": 1e-3}),
    },
)
