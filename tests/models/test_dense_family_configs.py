"""How Mistral, Qwen2, Qwen3, SmolLM3, Granite and OLMo 2 read config.json: what layers get, and what is refused."""

import numpy as np
import pytest

from cutp.checkpoint import ModelConfig
from cutp.comm.device_group import DeviceGroup
from cutp.errors import ModelConfigError, UnsupportedModelError
from cutp.models.registry import families

LEAST = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 64,
         "num_key_value_heads": 2, "head_dim": 12}
SLIDING, FULL = "sliding_attention", "full_attention"
ABSENT = object()


def build(name, **raw):
    raw = {key: value for key, value in {**LEAST, **raw}.items() if value is not ABSENT}
    family = next(family for family in families().values() if family.model_type == name)
    return family.build(ModelConfig(raw), DeviceGroup.planned(1, 0), np.dtype(np.float32), 64)


def attentions(name, **raw):
    return [layer.self_attn.shards[0] for layer in build(name, **raw).layers]


def windows(name, **raw):
    return [attention.window for attention in attentions(name, **raw)]


@pytest.mark.parametrize("raw, window", [({}, 4096), (dict(sliding_window=None), None), (dict(sliding_window=7), 7)])
def test_mistral_has_one_window(raw, window):
    assert windows("mistral", **raw) == [window] * 4


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
@pytest.mark.parametrize("raw, expected", [
    ({}, [None] * 4),
    (dict(sliding_window=7, max_window_layers=0), [None] * 4),
    (dict(use_sliding_window=True), [None] * 4),  # from layer 28 on
    (dict(use_sliding_window=True, max_window_layers=1), [None, 4096, 4096, 4096]),
    (dict(use_sliding_window=True, max_window_layers=3, sliding_window=7), [None, None, None, 7]),
    (dict(use_sliding_window=True, max_window_layers=0, sliding_window=None), [None] * 4),
    (dict(use_sliding_window=True, sliding_window=7, layer_types=[SLIDING, FULL, FULL, SLIDING]), [7, None, None, 7]),
    (dict(layer_types=[FULL] * 4), [None] * 4),
])
def test_qwen_has_windows_in_upper_layers(name, raw, expected):
    assert windows(name, **raw) == expected


@pytest.mark.parametrize("raw, rotates", [
    ({}, "1110"), (dict(no_rope_layer_interval=2), "1010"), (dict(no_rope_layer_interval=1), "0000"),
    (dict(no_rope_layers=[0, 1, 1, 0]), "0110"), (dict(no_rope_layers=[0, 0, 1, 1, 0, 0]), "0011"),
    (dict(no_rope_layers=None, no_rope_layer_interval=3), "1101"),
])
def test_smollm3_has_layers_without_positions(raw, rotates):
    found = attentions("smollm3", **raw)
    assert "".join(str(int(attention.rope is not None)) for attention in found) == rotates
    assert [attention.window for attention in found] == [None] * 4


@pytest.mark.parametrize("raw, expected", [
    (dict(sliding_window=7), [None] * 4),
    (dict(use_sliding_window=True), [None] * 4),
    (dict(use_sliding_window=True, sliding_window=7), [None, None, None, 7]),  # where there are no positions
    (dict(use_sliding_window=True, sliding_window=7, layer_types=[SLIDING, FULL, FULL, FULL]), [7, None, None, None]),
    (dict(use_sliding_window=False, sliding_window=7, layer_types=[SLIDING] * 4), [7] * 4),
])
def test_smollm3_windows(raw, expected):
    assert windows("smollm3", **raw) == expected


@pytest.mark.parametrize("name, kv_heads, head_dim, positions, theta, tied, eps", [
    ("mistral", 8, 4, 131072, 1e4, False, 1e-6), ("qwen2", 32, 4, 32768, 1e4, False, 1e-6),
    ("qwen3", 32, 128, 32768, 1e4, False, 1e-6), ("smollm3", 4, 4, 32768, 2e6, True, 1e-6),
    ("granite", 32, 4, 2048, 1e4, False, 1e-6), ("olmo2", 32, 4, 2048, 1e4, False, 1e-5),
])
def test_defaults_of_absent_keys(name, kv_heads, head_dim, positions, theta, tied, eps):
    model = build(name, hidden_size=128, num_attention_heads=32, num_key_value_heads=ABSENT, head_dim=ABSENT)
    attention = model.layers[0].self_attn.shards[0]
    assert (attention.n_kv_heads, attention.head_dim) == (kv_heads, head_dim)
    assert (model.rope.max_seq_len, model.rope.parameters.theta) == (positions, theta)
    assert (model.lm_head.shards[0].weight is model.embed_tokens.shards[0].weight) is tied
    assert model.norm[0].eps == eps


@pytest.mark.parametrize("name, biased", [
    ("mistral", ""), ("qwen2", "qkv"), ("qwen3", "qkvo"), ("smollm3", "qkvogud"), ("granite", "qkvogud"),
    ("olmo2", "qkvo")])
def test_biases(name, biased):
    """The flags have an effect in the families that know them, and in no other."""
    known = {"mistral": {}, "qwen2": {}}.get(name, dict(attention_bias=True, mlp_bias=True))
    model = build(name, **known)
    found = {weight.split(".")[-2][0] for weight, _ in model.named_weights() if weight.endswith("bias")}
    assert found == set(biased)
    if known:
        assert not any(weight.endswith("bias") for weight, _ in build(name).named_weights())


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "olmo2"])
@pytest.mark.parametrize("raw", [dict(partial_rotary_factor=0.5),
                                 dict(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5})], ids=str)
def test_whole_heads_are_rotated(name, raw):
    """The default rotary embedding of these families does not read partial_rotary_factor."""
    assert build(name, **raw).rope.rotary_dim == 12


@pytest.mark.parametrize("value, overlap", [("0", False), ("1", True)])
def test_sums_overlap_where_that_is_asked_for(value, overlap, monkeypatch):
    monkeypatch.setenv("CUTP_MATMUL_ALLREDUCE", value)
    for layer in build("olmo2").layers:
        assert layer.overlap_down_proj is layer.self_attn.overlap_o_proj is overlap
    for layer in build("mixtral", num_local_experts=2, num_experts_per_tok=1).layers:
        assert layer.overlap_down_proj is False and layer.self_attn.overlap_o_proj is overlap


def test_multipliers_of_granite():
    model = build("granite", embedding_multiplier=12, attention_multiplier=0.25, residual_multiplier=0.5,
                  logits_scaling=8)
    assert (model.embedding_multiplier, model.logits_scaling) == (12, 8)
    assert all(layer.residual_multiplier == 0.5 and layer.self_attn.shards[0].scale == 0.25 for layer in model.layers)
    plain = build("granite")
    assert plain.layers[0].self_attn.shards[0].scale == 1.0  # not 1 / sqrt(head_dim)


def test_norms_of_olmo2_are_after_the_branches():
    family = families()["Olmo2ForCausalLM"]
    names = [family.checkpoint_name(name) for name, _ in build("olmo2").named_weights() if "norm" in name]
    assert names[:4] == [f"model.layers.0.{name}.weight" for name in (
        "self_attn.q_norm", "self_attn.k_norm", "post_attention_layernorm", "post_feedforward_layernorm")]
    assert names[-1] == "model.norm.weight" and len(names) == 4 * 4 + 1
    [attention, *_] = attentions("olmo2")  # 4 query and 2 key-value heads of 12, normalised together
    assert (attention.q_norm.weight.shape, attention.k_norm.weight.shape) == ((48,), (24,))


@pytest.mark.parametrize("name, raw, message", [
    ("mistral", dict(sliding_window=0), "sliding_window"),
    ("mistral", dict(sliding_window="all"), "sliding_window"),
    ("qwen2", dict(use_sliding_window=1), "use_sliding_window"),
    ("qwen2", dict(max_window_layers=-1), "max_window_layers"),
    ("qwen2", dict(layer_types=[SLIDING] * 4, sliding_window=7), "no sliding_window is in use"),
    ("qwen3", dict(layer_types=[FULL] * 3), "layer_types .* a list of 4 entries"),
    ("qwen3", dict(attention_bias="no"), "attention_bias"),
    ("smollm3", dict(layer_types=[SLIDING] * 4), "no sliding_window is in use"),
    ("smollm3", dict(no_rope_layers=[1, 0]), "no_rope_layers .* for each of the 4 layers"),
    ("smollm3", dict(no_rope_layers=[1, 2, 0, 0]), "no_rope_layers"),
    ("smollm3", dict(no_rope_layers="1110"), "no_rope_layers"),
    ("smollm3", dict(no_rope_layer_interval=0), "no_rope_layer_interval"),
    ("granite", dict(logits_scaling=0), "logits_scaling"),
    ("granite", dict(residual_multiplier="small"), "residual_multiplier"),
    ("olmo2", dict(attention_bias=0), "attention_bias"),
])
def test_bad_values(name, raw, message):
    with pytest.raises(ModelConfigError, match=message):
        build(name, **raw)


@pytest.mark.parametrize("name", ["mistral", "qwen2", "qwen3", "smollm3", "granite", "olmo2"])
@pytest.mark.parametrize("raw, message", [
    (dict(is_causal=False), "is_causal"), (dict(hidden_act="softmax"), "'softmax'"),
    (dict(rope_scaling={"type": "mrope"}), "'mrope'"),
])
def test_what_is_not_computed_is_refused(name, raw, message):
    with pytest.raises(UnsupportedModelError, match=message):
        build(name, **raw)
