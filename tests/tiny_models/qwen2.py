"""Qwen2: biases of queries, keys and values; a window in the upper layers, if one is used."""

from __future__ import annotations

from tests.tiny_models.checkpoint import Case, Shapes, TinyFamily, attention_shapes, decoder_shapes, mlp_shapes


def shapes(c: dict) -> Shapes:
    layer: Shapes = {
        **attention_shapes(c, bias=True),
        **mlp_shapes(c),
        "input_layernorm.weight": (c["hidden_size"],),
        "post_attention_layernorm.weight": (c["hidden_size"],),
    }
    return decoder_shapes(c, lambda _: layer)


FAMILY = TinyFamily(
    base={"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "tie_word_embeddings": False},
    shapes=shapes,
    gains={"embed_tokens": 2.0},  # or a token predicts itself where the head is tied
    cases={
        # As in the files of Qwen2.5: a window that is not used.
        "qwen2_defaults": Case(
            {"sliding_window": 8, "use_sliding_window": False, "max_window_layers": 0, "rope_theta": 1000000.0}
        ),
        "qwen2_window_above": Case(
            {
                "num_hidden_layers": 3,
                "hidden_size": 60,
                "num_attention_heads": 5,
                "num_key_value_heads": 5,
                "intermediate_size": 71,
                "use_sliding_window": True,
                "sliding_window": 7,
                "max_window_layers": 1,
                "tie_word_embeddings": True,
            }
        ),
        "qwen2_layer_types": Case(
            {
                "num_attention_heads": 6,
                "num_key_value_heads": 2,
                "head_dim": 12,
                "use_sliding_window": True,
                "sliding_window": 6,
                "max_window_layers": 0,
                "layer_types": ["sliding_attention", "full_attention"],
                "rms_norm_eps": 1e-4,
            }
        ),
        # As the Qwen2.5 model cards tell for long texts.
        "qwen2_yarn": Case(
            {
                "num_key_value_heads": 1,
                "use_sliding_window": True,
                "max_window_layers": 28,
                "rope_theta": 10000.0,
                "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
            }
        ),
    },
)
