"""DeepSeek-V3: keys and values from a cached latent, experts chosen by sigmoid scores inside groups."""

from __future__ import annotations

from tests.tiny_models.checkpoint import ABSENT, Case, Shapes, Tensor, TinyFamily, decoder_shapes, mlp_shapes


def latent_attention_shapes(c: dict) -> Shapes:
    """self_attn of one layer."""
    hidden, heads, bias = c["hidden_size"], c["num_attention_heads"], c["attention_bias"]
    kv_rank, rope, nope, v_dim = (c[name] for name in ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim",
                                                       "v_head_dim"))
    linears = {
        "kv_a_proj_with_mqa": (kv_rank + rope, hidden),
        "kv_b_proj": (heads * (nope + v_dim), kv_rank),
        "o_proj": (hidden, heads * v_dim),
    }
    biased = ["kv_a_proj_with_mqa", "o_proj"]
    norms = {"kv_a_layernorm": (kv_rank,)}
    if c["q_lora_rank"] is None:
        linears["q_proj"] = (heads * (nope + rope), hidden)
    else:
        linears |= {"q_a_proj": (c["q_lora_rank"], hidden), "q_b_proj": (heads * (nope + rope), c["q_lora_rank"])}
        biased.append("q_a_proj")
        norms["q_a_layernorm"] = (c["q_lora_rank"],)
    shapes: Shapes = {f"self_attn.{name}.weight": shape for name, shape in (linears | norms).items()}
    return shapes | {f"self_attn.{name}.bias": linears[name][:1] for name in biased * bias}


def moe_shapes(c: dict) -> Shapes:
    """mlp of a layer with experts."""
    experts, width = c["n_routed_experts"], c["moe_intermediate_size"]
    shapes: Shapes = {
        "mlp.gate.weight": (experts, c["hidden_size"]),
        "mlp.gate.e_score_correction_bias": Tensor((experts,), 0.3),
    }
    for expert in range(experts):
        shapes |= mlp_shapes(c, prefix=f"mlp.experts.{expert}", width=width)
    return shapes | mlp_shapes(c, prefix="mlp.shared_experts", width=width * c.get("n_shared_experts", 1))


def shapes(c: dict) -> Shapes:
    hidden = c["hidden_size"]
    norms: Shapes = {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}

    def layer(index: int) -> Shapes:
        dense = index < c["first_k_dense_replace"]
        return latent_attention_shapes(c) | norms | (mlp_shapes(c) if dense else moe_shapes(c))

    return decoder_shapes(c, layer)


FAMILY = TinyFamily(
    base={
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 20,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 6,
        "v_head_dim": 10,
        "first_k_dense_replace": 1,
        "attention_bias": False,
        "tie_word_embeddings": False,
    },
    shapes=shapes,
    gains={"q_b_proj": 2.0, "kv_b_proj": 1.4, "gate": 2.0},
    cases={
        # As in the released files of V3 and R1, which have fields of their own code.
        "deepseek_v3_released": Case(
            {
                "rope_theta": 10000,
                "rope_scaling": {
                    "beta_fast": 32,
                    "beta_slow": 1,
                    "factor": 40,
                    "mscale": 1.0,
                    "mscale_all_dim": 1.0,
                    "original_max_position_embeddings": 16,
                    "type": "yarn",
                },
                "max_position_embeddings": 640,
                "norm_topk_prob": True,
                "routed_scaling_factor": 2.5,
                "scoring_func": "sigmoid",
                "topk_method": "noaux_tc",
                "moe_layer_freq": 1,
                "ep_size": 1,
                "num_nextn_predict_layers": 1,
            }
        ),
        # As in Moonlight: no latent of the query, one group of experts, two shared experts.
        "deepseek_v3_one_group": Case(
            {
                "num_attention_heads": 3,
                "num_key_value_heads": 3,
                "q_lora_rank": None,
                "n_group": 1,
                "topk_group": 1,
                "n_shared_experts": 2,
                "routed_scaling_factor": 2.446,
                "rope_theta": 500.0,
                "rms_norm_eps": 1e-2,
                "num_nextn_predict_layers": 0,
            }
        ),
        "deepseek_v3_biases": Case(
            {
                "hidden_size": 44,
                "num_attention_heads": 5,
                "num_key_value_heads": None,
                "intermediate_size": 71,
                "moe_intermediate_size": 13,
                "attention_bias": True,
                "rope_interleave": False,
                "norm_topk_prob": False,
                "hidden_act": "gelu",
                "first_k_dense_replace": 0,
                "n_routed_experts": 6,
                "n_group": 2,
                "topk_group": 1,
                "num_experts_per_tok": 2,
                "tie_word_embeddings": True,
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 300.0,
                    "factor": 8.0,
                    "mscale": 0.7,
                    "mscale_all_dim": 1.3,
                    "original_max_position_embeddings": 16,
                },
            }
        ),
        # Left out: what the configuration class has defaults for and a small model can have.
        "deepseek_v3_absent": Case(
            {
                "q_lora_rank": None,
                "kv_lora_rank": 4,
                "num_experts_per_tok": ABSENT,
                "n_routed_experts": 16,
                "n_group": ABSENT,
                "topk_group": ABSENT,
                "n_shared_experts": ABSENT,
                "first_k_dense_replace": 2,
                "rope_scaling": {"type": "dynamic", "factor": 4.0},
                "max_position_embeddings": 24,
            },
            prompt_lengths=(1, 20, 44),
            seed=1,
        ),
    },
)
