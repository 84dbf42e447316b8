"""Fields of config.json that a family must refuse, and older spellings that must mean the same as newer ones."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cutp import LLM
from cutp.array.dtypes import bfloat16
from cutp.checkpoint.config import ModelConfig
from cutp.comm.device_group import DeviceGroup
from cutp.errors import ModelConfigError, UnsupportedModelError
from cutp.models.registry import find_family
from tests import tiny_models

ABSENT = object()


def changed(case, **fields):
    raw = tiny_models.config(case) | fields
    return {key: value for key, value in raw.items() if value is not ABSENT}


def build(raw, dtype=np.float32):
    config = ModelConfig(raw)
    return find_family(config).build(config, DeviceGroup.planned(1, 0), np.dtype(dtype), 64)


REFUSED = [
    ("gemma2_defaults", {"use_bidirectional_attention": True}, UnsupportedModelError, "causal models only"),
    ("gemma3_defaults", {"use_bidirectional_attention": True}, UnsupportedModelError, "causal models only"),
    ("gemma2_defaults", {"sliding_window": None}, ModelConfigError, "sliding_window"),
    ("gemma3_defaults", {"sliding_window": None}, ModelConfigError, "sliding_window"),
    ("cohere2_defaults", {"sliding_window": None}, ModelConfigError, "sliding_window"),
    ("gemma2_defaults", {"attn_logit_softcapping": 0}, ModelConfigError, "attn_logit_softcapping"),
    ("gemma2_defaults", {"hidden_activation": "mish"}, UnsupportedModelError, "mish"),
    ("gemma2_layer_types", {"layer_types": ["full_attention"]}, ModelConfigError, "3 entries"),
    ("cohere2_layer_types", {"layer_types": ["chunked_attention"] * 3}, UnsupportedModelError, "chunked_attention"),
    ("gemma3_defaults", {"sliding_window_pattern": 0}, ModelConfigError, "sliding_window_pattern"),
    ("gemma3_defaults", {"rope_parameters": {"rope_type": "default"}}, ModelConfigError, "full_attention"),
    ("phi3_su", {"rope_scaling": {"type": "linear", "factor": 2.0}}, UnsupportedModelError, "linear"),
    ("phi3_su", {"rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [1.0]}}, ModelConfigError,
     "8 positive numbers"),
    ("cohere2_defaults", {"logit_scale": 0}, ModelConfigError, "logit_scale"),
    ("cohere2_defaults", {"layer_norm_eps": -1.0}, ModelConfigError, "layer_norm_eps"),
    ("glm4_defaults", {"partial_rotary_factor": 1.5}, ModelConfigError, "partial_rotary_factor"),
]


@pytest.mark.parametrize(("case", "fields", "error", "said"), REFUSED)
def test_refused(case, fields, error, said):
    with pytest.raises(error, match=said):
        build(changed(case, **fields))


SAME = [
    # Gemma 3: what an older file says with three fields.
    ("gemma3_old_names",
     {"rope_theta": ABSENT, "rope_scaling": ABSENT, "rope_local_base_freq": ABSENT, "rope_parameters": {
         "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2000.0},
         "sliding_attention": {"rope_type": "default", "rope_theta": 100.0}}}),
    # The theta of each kind of layer has its own default; one of the two entries may be missing.
    ("gemma3_defaults", {"rope_theta": 1e6, "rope_local_base_freq": 1e4}),
    ("gemma3_defaults", {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}}),
    ("gemma3_defaults", {"layer_types": ["sliding_attention"] * 5 + ["full_attention"]}),
    ("gemma3_defaults", {"sliding_window_pattern": 6, "attn_logit_softcapping": 3.0}),
    ("gemma2_defaults", {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    ("gemma2_defaults", {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}),
    # Phi-3: the top-level original length counts, and is 4096 if absent.
    ("phi3_su", {"rope_scaling": tiny_models.config("phi3_su")["rope_scaling"]
                 | {"type": "yarn", "original_max_position_embeddings": 77}}),
    ("glm4_defaults", {"partial_rotary_factor": 0.5, "attention_bias": True}),
    ("cohere2_defaults", {"sliding_window_pattern": ABSENT, "head_dim": ABSENT}),
]


@pytest.mark.parametrize(("case", "fields"), SAME)
def test_means_the_same(case, fields):
    def facts(model):
        return [(layer.signature(), layer.self_attn.shards[0].scale) for layer in model.layers], model.signature()

    assert facts(build(changed(case, **fields))) == facts(build(tiny_models.config(case)))


@pytest.mark.parametrize("case", ("gemma2_defaults", "gemma3_defaults", "cohere2_defaults"))
def test_the_window_of_a_file_that_names_none(case):
    layers = build(changed(case, sliding_window=ABSENT)).layers
    assert {layer.self_attn.shards[0].window for layer in layers} == {4096, None}


@pytest.mark.parametrize(("case", "key", "eps"), [
    ("gemma2_defaults", "rms_norm_eps", 1e-6), ("phi3_defaults", "rms_norm_eps", 1e-5),
    ("cohere2_defaults", "layer_norm_eps", 1e-5), ("glm4_defaults", "rms_norm_eps", 1.5625e-7),
])
def test_the_epsilon_of_a_file_that_names_none(case, key, eps):
    model = build(changed(case, **{key: ABSENT}))
    assert {model.norm[0].eps, model.layers[0].input_layernorm[0].eps} == {eps}


def test_the_heads_of_a_glm_file_that_names_none():
    params = build(changed("glm4_defaults", num_key_value_heads=ABSENT, head_dim=ABSENT)).kv_params
    assert (params.n_kv_heads, params.head_dim) == (2, 128)


def test_the_logit_scale_of_a_file_that_names_none():
    assert build(changed("cohere2_defaults", logit_scale=ABSENT)).logits_scaling == 16.0


def test_gemma_rounds_where_hugging_face_does():
    """The embedding multiplier before it is used, a norm only after the product with its weight."""
    raw = tiny_models.config("gemma3_defaults")
    model = build(raw, bfloat16)
    assert model.embedding_multiplier == 6.9375
    assert build(raw).embedding_multiplier == float(np.float32(48**0.5))
    layer = model.layers[0]
    for norm in (layer.self_attn.shards[0].q_norm, layer.self_attn.shards[0].k_norm, layer.input_layernorm[0]):
        assert norm.multiply_before_cast


def test_the_original_length_of_phi3_is_4096_if_absent():
    model = build(changed("phi3_su", original_max_position_embeddings=ABSENT))
    assert model.rope.parameters.original_max_position_embeddings == 4096


def test_gemma3_with_a_vision_tower_runs_as_its_language_model(tiny, tmp_path, caplog):
    text = tiny("gemma3_old_names")
    raw = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "vision_config": {},
           "text_config": tiny_models.config("gemma3_old_names")}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    tensors = {f"language_model.{name}": value for name, value in load_file(text / "model.safetensors").items()}
    save_file(tensors | {"vision_tower.head.probe": np.ones(3, np.float32)}, tmp_path / "model.safetensors")
    prompts = tiny_models.prompts("gemma3_old_names")
    with LLM(text) as one, LLM(tmp_path) as other:
        assert [s.logprobs for s in one.score(prompts)] == [s.logprobs for s in other.score(prompts)]
    assert "vision_tower.head.probe" in caplog.text
