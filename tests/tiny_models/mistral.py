"""Mistral: one window for all layers, absent, null or shorter than the prompts."""

from __future__ import annotations

from tests.tiny_models.checkpoint import ABSENT, Case, Shapes, TinyFamily, attention_shapes, decoder_shapes, mlp_shapes


def shapes(c: dict) -> Shapes:
    c = {"num_key_value_heads": 8, **c}
    layer: Shapes = {
        **attention_shapes(c),
        **mlp_shapes(c),
        "input_layernorm.weight": (c["hidden_size"],),
        "post_attention_layernorm.weight": (c["hidden_size"],),
    }
    return decoder_shapes(c, lambda _: layer)


FAMILY = TinyFamily(
    base={"architectures": ["MistralForCausalLM"], "model_type": "mistral", "tie_word_embeddings": False},
    shapes=shapes,
    gains={"embed_tokens": 2.0},  # or a token predicts itself where the head is tied
    cases={
        # Eight key-value heads when the file does not say; the default window is longer than any prompt.
        "mistral_defaults": Case({"num_attention_heads": 16, "num_key_value_heads": ABSENT, "hidden_size": 64}),
        "mistral_window": Case({"sliding_window": 9, "rope_theta": 1000.0, "rms_norm_eps": 1e-5, "head_dim": None}),
        # As in the files of Mistral Nemo and Small: a head_dim of its own, no window.
        "mistral_head_dim": Case(
            {
                "hidden_size": 50,
                "num_attention_heads": 5,
                "num_key_value_heads": 1,
                "head_dim": 16,
                "intermediate_size": 71,
                "sliding_window": None,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
            }
        ),
        "mistral_tied_yarn": Case(
            {
                "num_attention_heads": 6,
                "num_key_value_heads": 6,
                "sliding_window": 5,
                "tie_word_embeddings": True,
                "hidden_act": "gelu",
                "rope_theta": 500.0,
                "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
            },
            seed=1,
        ),
    },
)
