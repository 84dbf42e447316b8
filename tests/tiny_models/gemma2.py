"""Gemma 2: norms of weight 1 + w around each branch, capped scores and logits, every second layer windowed."""

from __future__ import annotations

from tests.tiny_models.checkpoint import (
    Case,
    Shapes,
    Tensor,
    TinyFamily,
    attention_shapes,
    decoder_shapes,
    mlp_shapes,
)

# The embedding is multiplied by sqrt(hidden_size), and a tied head uses the same rows: with a smaller gain and larger
# norms a token does not simply predict itself.
GAINS = {"embed_tokens": 2.0, "q_proj": 2.0, "k_proj": 2.0}


def gemma_shapes(c: dict, *, qk_norm: bool) -> Shapes:
    """The tensors of Gemma 2 and, with norms of queries and keys, Gemma 3."""
    hidden = (c["hidden_size"],)
    norms: Shapes = {
        "input_layernorm.weight": Tensor(hidden, 0.3),
        "post_attention_layernorm.weight": Tensor(hidden, 0.5, 1.5),
        "pre_feedforward_layernorm.weight": Tensor(hidden, 0.3),
        "post_feedforward_layernorm.weight": Tensor(hidden, 0.5, 2.5),
    }
    if qk_norm:
        norms |= {f"self_attn.{name}.weight": Tensor((c["head_dim"],), 0.3, 0.3) for name in ("q_norm", "k_norm")}
    bias = c["attention_bias"]
    layer = attention_shapes(c, bias=bias, output_bias=bias) | mlp_shapes(c) | norms
    return decoder_shapes(c, lambda _: layer, norm=Tensor(hidden, 0.3, 1.0))


FAMILY = TinyFamily(
    base={
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "num_hidden_layers": 3,
        "head_dim": 16,
        "sliding_window": 11,
        "query_pre_attn_scalar": 16,
        "attention_bias": False,
        "tie_word_embeddings": True,
    },
    shapes=lambda c: gemma_shapes(c, qk_norm=False),
    gains=GAINS,
    cases={
        # Caps, activation and layer types are left to their defaults.
        "gemma2_defaults": Case({"query_pre_attn_scalar": 24, "rope_theta": 10000.0}),
        "gemma2_low_caps": Case(
            {
                "num_attention_heads": 3,
                "num_key_value_heads": 1,
                "intermediate_size": 71,
                "attn_logit_softcapping": 2.5,
                "final_logit_softcapping": 6.0,
                "rms_norm_eps": 1e-3,
            },
            seed=1,
        ),
        "gemma2_no_caps": Case(
            {
                "attn_logit_softcapping": None,
                "final_logit_softcapping": None,
                "attention_bias": True,
                "tie_word_embeddings": False,
                "hidden_activation": "gelu",
                "rope_scaling": {"rope_type": "linear", "factor": 4.0},
                "rope_theta": 500.0,
            }
        ),
        "gemma2_layer_types": Case(
            {
                "hidden_size": 40,
                "num_attention_heads": 5,
                "num_key_value_heads": 5,
                "head_dim": 12,
                "sliding_window": 5,
                "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
                "hidden_act": "silu",
                "hidden_activation": "relu",
            }
        ),
    },
)
