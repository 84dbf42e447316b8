"""Granite: multipliers of embeddings, scores, branches and logits."""

from __future__ import annotations

from tests.tiny_models.checkpoint import Case, Shapes, TinyFamily, attention_shapes, decoder_shapes, mlp_shapes


def shapes(c: dict) -> Shapes:
    c = {"attention_bias": False, "mlp_bias": False, **c}
    layer: Shapes = {
        **attention_shapes(c, bias=c["attention_bias"], output_bias=c["attention_bias"]),
        **mlp_shapes(c, bias=c["mlp_bias"]),
        "input_layernorm.weight": (c["hidden_size"],),
        "post_attention_layernorm.weight": (c["hidden_size"],),
    }
    return decoder_shapes(c, lambda _: layer)


FAMILY = TinyFamily(
    base={"architectures": ["GraniteForCausalLM"], "model_type": "granite", "tie_word_embeddings": False},
    shapes=shapes,
    gains={"embed_tokens": 0.6},  # or a token predicts itself where the head is tied
    cases={
        # All multipliers are 1 by default, also that of the scores.
        "granite_defaults": Case({"rope_theta": 10000.0}),
        # As in the files of Granite 3.
        "granite_multipliers": Case(
            {
                "embedding_multiplier": 12.0,
                "attention_multiplier": 0.0625,
                "residual_multiplier": 0.22,
                "logits_scaling": 1.5,
                "num_attention_heads": 6,
                "num_key_value_heads": 2,
                "rope_theta": 5000000.0,
                "rms_norm_eps": 1e-5,
            }
        ),
        "granite_integers_and_biases": Case(
            {
                "hidden_size": 60,
                "num_attention_heads": 5,
                "num_key_value_heads": 5,
                "intermediate_size": 71,
                "attention_bias": True,
                "mlp_bias": True,
                "embedding_multiplier": 3,
                "attention_multiplier": 1,
                "residual_multiplier": 2,
                "logits_scaling": 2,
                "hidden_act": "gelu_pytorch_tanh",
                "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
            }
        ),
        "granite_head_dim": Case(
            {
                "head_dim": 20,
                "num_attention_heads": 3,
                "num_key_value_heads": 1,
                "attention_multiplier": 0.3,
                "embedding_multiplier": 1.5,
                "logits_scaling": 0.3,
                "tie_word_embeddings": True,
                "residual_multiplier": 0.8,
                "rope_theta": 1000.0,
                "rope_scaling": {"type": "dynamic", "factor": 4.0},
                "max_position_embeddings": 32,
            },
            seed=1,
            prompt_lengths=(9, 32, 44),
        ),
    },
)
