"""OLMo 2: norms after the branches, and of queries and keys over all heads together."""

from __future__ import annotations

from tests.tiny_models.checkpoint import Case, Shapes, Tensor, TinyFamily, attention_shapes, decoder_shapes, mlp_shapes


def shapes(c: dict) -> Shapes:
    head_dim = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    attention = attention_shapes(c, bias=c["attention_bias"], output_bias=c["attention_bias"])
    kv_heads = c["num_key_value_heads"] or c["num_attention_heads"]
    layer: Shapes = {
        **attention,
        **mlp_shapes(c),
        # Normalised scores are flat unless the weights are above 1.
        "self_attn.q_norm.weight": Tensor((c["num_attention_heads"] * head_dim,), 0.4, 1.4),
        "self_attn.k_norm.weight": Tensor((kv_heads * head_dim,), 0.4, 1.4),
        "post_attention_layernorm.weight": Tensor((c["hidden_size"],), 0.5, 1.5),
        "post_feedforward_layernorm.weight": Tensor((c["hidden_size"],), 0.5, 2.5),
    }
    return decoder_shapes(c, lambda _: layer)


FAMILY = TinyFamily(
    base={
        "architectures": ["Olmo2ForCausalLM"],
        "model_type": "olmo2",
        "num_key_value_heads": None,
        "attention_bias": False,
        "tie_word_embeddings": False,
    },
    shapes=shapes,
    gains={"embed_tokens": 2.0},  # or a token predicts itself where the head is tied
    cases={
        "olmo2_defaults": Case({"rope_theta": 500000.0}),
        # Fewer key-value heads than ranks: their squares must count once.
        "olmo2_one_key_value_head": Case(
            {"num_attention_heads": 5, "num_key_value_heads": 1, "hidden_size": 60, "rms_norm_eps": 1e-6}
        ),
        "olmo2_uneven_heads": Case(
            {
                "num_attention_heads": 10,
                "num_key_value_heads": 5,
                "hidden_size": 60,
                "intermediate_size": 71,
                "tie_word_embeddings": True,
                "rms_norm_eps": 1e-2,
                "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
            }
        ),
        "olmo2_biases_head_dim": Case(
            {
                "num_attention_heads": 6,
                "num_key_value_heads": 2,
                "head_dim": 12,
                "attention_bias": True,
                "rope_theta": 10000.0,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 4.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 32,
                },
            }
        ),
    },
)
