"""config.json of released models: what their fields and the defaults of absent ones add up to.

Weights in the language model (a tied head counts once) as transformers has them on its meta device.
"""

import json

import numpy as np
import pytest

from cutp.checkpoint.config import load_config
from cutp.comm.device_group import DeviceGroup
from cutp.models.registry import find_family

GEMMA = {"attention_bias": False, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-06,
         "query_pre_attn_scalar": 256, "torch_dtype": "bfloat16"}
PHI = {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "attention_bias": False, "hidden_act": "silu",
       "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32, "rms_norm_eps": 1e-05,
       "original_max_position_embeddings": 4096, "rope_theta": 10000.0, "torch_dtype": "bfloat16"}

CONFIGS = {
    "gemma-2-2b": GEMMA | {
        "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 2304,
        "intermediate_size": 9216, "max_position_embeddings": 8192, "num_attention_heads": 8, "num_hidden_layers": 26,
        "num_key_value_heads": 4, "rope_theta": 10000.0, "sliding_window": 4096, "vocab_size": 256000},
    "gemma-3-1b": GEMMA | {
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "attn_logit_softcapping": None,
        "final_logit_softcapping": None, "hidden_size": 1152, "intermediate_size": 6912,
        "max_position_embeddings": 32768, "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1,
        "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512,
        "sliding_window_pattern": 6, "vocab_size": 262144},
    "gemma-3-4b": {
        "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3",
        "text_config": {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text",
                        "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                        "sliding_window": 1024},
        "vision_config": {"hidden_size": 1152, "num_hidden_layers": 27, "model_type": "siglip_vision_model"}},
    "phi-3-mini-4k": PHI | {
        "max_position_embeddings": 4096, "num_attention_heads": 32, "num_key_value_heads": 32, "rope_scaling": None,
        "sliding_window": 2047, "tie_word_embeddings": False, "vocab_size": 32064},
    "phi-4-mini": PHI | {
        "max_position_embeddings": 131072, "num_attention_heads": 24, "num_key_value_heads": 8,
        "partial_rotary_factor": 0.75, "sliding_window": 262144, "tie_word_embeddings": True, "vocab_size": 200064,
        "rope_scaling": {"type": "longrope", "long_factor": [2.0] * 48, "short_factor": [1.0] * 48}},
    "command-r7b": {
        "architectures": ["Cohere2ForCausalLM"], "model_type": "cohere2", "attention_bias": False, "head_dim": 128,
        "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336, "layer_norm_eps": 1e-05,
        "layer_switch": 4, "logit_scale": 0.25, "max_position_embeddings": 8192, "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "order_of_interleaved_layers": "local_attn_first",
        "rope_scaling": None, "rope_theta": 50000, "rotary_pct": 1.0, "sliding_window": 4096,
        "sliding_window_pattern": 4, "use_parallel_block": True, "vocab_size": 256000},
    "glm-4-9b": {
        "architectures": ["Glm4ForCausalLM"], "model_type": "glm4", "attention_bias": False, "head_dim": 128,
        "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 13696, "max_position_embeddings": 32768,
        "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 2, "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "tie_word_embeddings": False, "vocab_size": 151552},
}

# Weights, positions, the windows of the first six layers, and 1 / scale**2 of the attention.
FACTS = {
    "gemma-2-2b": (2614341888, 8192, [4096, None] * 3, 256),
    "gemma-3-1b": (999885952, 32768, [512] * 5 + [None], 256),
    "gemma-3-4b": (3880263168, 131072, [1024] * 5 + [None], 256),
    "phi-3-mini-4k": (3821079552, 4096, [2047] * 6, 96),
    "phi-4-mini": (3836021760, 131072, [262144] * 6, 128),
    "command-r7b": (8028033024, 8192, [4096, 4096, 4096, None, 4096, 4096], 128),
    "glm-4-9b": (9400094720, 32768, [None] * 6, 128),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_released_config(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name]))
    config = load_config(tmp_path)
    family = find_family(config)
    model = family.build(config, DeviceGroup.planned(1, 0), np.dtype(np.float32), 64)
    weights = sum(weight.num_elements for weight in dict(model.named_weights()).values())
    windows = [layer.self_attn.shards[0].window for layer in model.layers[:6]]
    head_dim = round(model.layers[0].self_attn.shards[0].scale ** -2)
    assert (weights, family.sizes(config).context_length, windows, head_dim) == FACTS[name]
