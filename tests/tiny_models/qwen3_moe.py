"""Qwen3-MoE: experts under the names of a plain MLP, some layers without them."""

from __future__ import annotations

from tests.tiny_models.checkpoint import (
    ABSENT,
    Case,
    Shapes,
    TinyFamily,
    attention_shapes,
    decoder_shapes,
    mlp_shapes,
)


def shapes(c: dict) -> Shapes:
    hidden, experts = c["hidden_size"], c.get("num_experts") or c["num_local_experts"]
    head_dim = c.get("head_dim") or hidden // c["num_attention_heads"]

    def layer(index: int) -> Shapes:
        bias = c.get("attention_bias", False)
        found = attention_shapes(c, bias=bias, output_bias=bias) | {
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
            "self_attn.q_norm.weight": (head_dim,),
            "self_attn.k_norm.weight": (head_dim,),
        }
        if index in (c.get("mlp_only_layers") or ()) or (index + 1) % c.get("decoder_sparse_step", 1):
            return found | mlp_shapes(c)
        found["mlp.gate.weight"] = (experts, hidden)
        for expert in range(experts):
            found |= mlp_shapes(c, prefix=f"mlp.experts.{expert}", width=c["moe_intermediate_size"])
        return found

    return decoder_shapes(c, layer)


FAMILY = TinyFamily(
    base={
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_act": "silu",
        "head_dim": 12,
        "moe_intermediate_size": 24,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    },
    shapes=shapes,
    gains={"gate": 1.5, "embed_tokens": 2.0},
    cases={
        # As in the released files, but for the sizes.
        "qwen3_moe_released": Case(
            {
                "decoder_sparse_step": 1,
                "mlp_only_layers": [],
                "max_window_layers": 1,
                "sliding_window": None,
                "use_sliding_window": False,
                "rope_scaling": None,
                "rope_theta": 1000000.0,
                "router_aux_loss_coef": 0.001,
            },
            seed=5,
        ),
        # As transformers 5 spells the number of experts; weights of the chosen are not made to add up to one.
        "qwen3_moe_new_names": Case(
            {
                "num_experts": ABSENT,
                "num_local_experts": 9,
                "num_experts_per_tok": 8,
                "norm_topk_prob": ABSENT,
                "rope_parameters": {"rope_type": "default", "rope_theta": 300.0},
                "use_sliding_window": True,
                "sliding_window": 10,
                "tie_word_embeddings": True,
            },
            seed=1,
        ),
        "qwen3_moe_some_dense": Case(
            {
                "num_hidden_layers": 4,
                "num_attention_heads": 5,
                "num_key_value_heads": 5,
                "head_dim": 10,
                "hidden_size": 40,
                "intermediate_size": 71,
                "moe_intermediate_size": 17,
                "decoder_sparse_step": 2,
                "mlp_only_layers": [3],
                "num_experts": 3,
                "num_experts_per_tok": 1,
                "attention_bias": True,
                "hidden_act": "gelu",
            },
            seed=1,
        ),
        "qwen3_moe_yarn": Case(
            {
                "num_attention_heads": 3,
                "num_key_value_heads": 1,
                "num_experts_per_tok": 6,
                "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
                "rope_theta": 1000.0,
            }
        ),
    },
)
