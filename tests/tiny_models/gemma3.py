"""Gemma 3 (text): Gemma 2 with norms of queries and keys, and other rotary parameters in windowed layers."""

from __future__ import annotations

from tests.tiny_models.checkpoint import Case, TinyFamily
from tests.tiny_models.gemma2 import GAINS, gemma_shapes

FAMILY = TinyFamily(
    base={
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "num_hidden_layers": 3,
        "head_dim": 16,
        "sliding_window": 11,
        "query_pre_attn_scalar": 16,
        "attention_bias": False,
        "tie_word_embeddings": True,
    },
    shapes=lambda c: gemma_shapes(c, qk_norm=True),
    gains=GAINS,
    cases={
        # Six layers in a row for the default pattern: five with windows, one without. No rotary parameter is named.
        "gemma3_defaults": Case({"num_hidden_layers": 6}),
        # As in the files of the released models.
        "gemma3_old_names": Case(
            {
                "num_attention_heads": 4,
                "num_key_value_heads": 1,
                "sliding_window_pattern": 2,
                "rope_local_base_freq": 100.0,
                "rope_theta": 2000.0,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
                "attn_logit_softcapping": None,
                "final_logit_softcapping": None,
            }
        ),
        "gemma3_new_names": Case(
            {
                "num_attention_heads": 3,
                "num_key_value_heads": 3,
                "intermediate_size": 71,
                "sliding_window": 4,
                "layer_types": ["full_attention", "sliding_attention", "full_attention"],
                "rope_parameters": {
                    "full_attention": {
                        "rope_type": "yarn",
                        "rope_theta": 10000.0,
                        "factor": 4.0,
                        "original_max_position_embeddings": 32,
                    },
                    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
                },
                "tie_word_embeddings": False,
            },
            seed=1,
        ),
        "gemma3_caps": Case(
            {
                "hidden_size": 40,
                "num_attention_heads": 5,
                "num_key_value_heads": 1,
                "head_dim": 12,
                "sliding_window_pattern": 3,
                "attention_bias": True,
                "attn_logit_softcapping": 2.0,
                "final_logit_softcapping": 5.0,
                "query_pre_attn_scalar": 4,
                "hidden_activation": "silu",
            }
        ),
    },
)
