"""DeepSeek-V3 beyond the golden results: released checkpoints' forms, and what is refused."""

import json
import logging
import shutil

import ml_dtypes
import numpy as np
import pytest

from cutp import LLM, run_threads
from cutp.checkpoint import Checkpoint, ModelConfig, load_config, write_safetensors
from cutp.comm.device_group import DeviceGroup
from cutp.errors import ConfigError, CutpError, ModelConfigError, UnsafeCheckpointError, UnsupportedModelError
from cutp.models.block_scaled_tensor import BLOCK_SIZE, BlockScaledTensor
from cutp.models.deepseek_v3 import DeepseekV3Config, build
from cutp.models.describe import describe_model
from cutp.models.registry import find_family
from cutp.nn.module import Weight
from cutp.nn.sharding import ShardingStrategy
from tests import tiny_models

CASE = "deepseek_v3_released"
PROMPT = [tiny_models.prompts(CASE)[1]]
bfloat16 = np.dtype(ml_dtypes.bfloat16)
float8 = np.dtype(ml_dtypes.float8_e4m3fn)
FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
AUTO_MAP = {
    "AutoConfig": "configuration_deepseek.DeepseekV3Config",
    "AutoModel": "modeling_deepseek.DeepseekV3Model",
    "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
}
# config.json of deepseek-ai/DeepSeek-V3, without what no code reads.
RELEASED = {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "auto_map": AUTO_MAP, "ep_size": 1,
    "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168, "intermediate_size": 18432,
    "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v3", "moe_intermediate_size": 2048,
    "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True,
    "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "quantization_config": FP8, "rms_norm_eps": 1e-06, "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn"},
    "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": False,
    "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "v_head_dim": 128, "vocab_size": 129280,
}  # fmt: skip


def tensors_of(directory):
    with Checkpoint(directory) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.names()}


def changed(source, target, fields=None, tensors=None):
    """A copy of the checkpoint `source` with other config fields and tensors (None for those as they are)."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text()) | (fields or {})
    (target / "config.json").write_text(json.dumps(config))
    if tensors is not None:
        write_safetensors(target / "model.safetensors", tensors)
    return target


def scores(directory, ranks=1):
    def rank_main(comm):
        with LLM(directory, comm=comm) as llm:
            return llm.score(PROMPT)[0].logprobs[1:]

    return np.array(run_threads(ranks, rank_main)[0])


def test_sizes_of_the_released_model():
    config = ModelConfig(RELEASED)
    c = DeepseekV3Config.of(config)
    assert c.context_length == 163840 and c.max_tensor_parallel == 128
    model = build(config, DeviceGroup.planned(8, 3), bfloat16, 64)
    assert sum(weight.num_elements for _, weight in model.named_weights()) == 671_026_419_200
    assert [model.kv_params.bytes_per_token(8, rank) for rank in range(8)] == [70272] * 8
    attention = model.layers[5].self_attn.shards[0]
    assert attention.scale == pytest.approx(192**-0.5 * 1.3688879454113936**2)
    assert attention.q_a_layernorm.eps == 1e-6 and attention.n_heads == 16
    assert attention.rope.frequencies(0).attention_scaling == 1.0


def test_valid_sizes():
    def divided(**fields):
        return DeepseekV3Config.of(ModelConfig(RELEASED | fields)).divided

    assert divided() == {"attention heads": 128, "feed-forward channels": 18432, "tokens": 129280,
                         "channels of an expert": 2048}
    assert "feed-forward channels" not in divided(first_k_dense_replace=0)
    assert "channels of an expert" not in divided(first_k_dense_replace=61)
    assert DeepseekV3Config.of(ModelConfig(RELEASED | {"moe_intermediate_size": 5})).max_tensor_parallel == 5


def test_info(tiny):
    facts = describe_model(tiny("deepseek_v3_one_group"), 3)
    assert facts["latent_dim"] == 16 + 6
    assert facts["kv_bytes_per_token_per_rank"] == [3 * 22 * 4] * 3
    assert facts["valid_tp"] == [1, 2, 3]
    with pytest.raises(ConfigError, match="3 attention heads, 80 feed-forward channels, 256 tokens and 20 channels of"):
        describe_model(tiny("deepseek_v3_one_group"), 4)


@pytest.mark.parametrize("case", ["deepseek_v3_released", "deepseek_v3_biases"])
def test_whole_experts_on_each_rank_change_nothing(tiny, monkeypatch, case):
    expected = scores(tiny(case))
    monkeypatch.setenv("CUTP_MOE", "expert")
    for ranks in (2, 3):
        np.testing.assert_allclose(scores(tiny(case), ranks), expected, rtol=0, atol=1e-4)


def test_layers_for_multi_token_prediction_are_left_out(tiny, tmp_path, caplog):
    tensors = tensors_of(tiny(CASE))
    inside = {name.replace("layers.2.", "layers.3."): value for name, value in tensors.items() if "layers.2." in name}
    own = {f"model.layers.3.{name}.weight": np.ones((48,), np.float32)
           for name in ("embed_tokens", "enorm", "hnorm", "eh_proj", "shared_head.norm", "shared_head.head")}
    directory = changed(tiny(CASE), tmp_path / "more", tensors=tensors | inside | own)
    with caplog.at_level(logging.INFO, "cutp"):
        np.testing.assert_array_equal(scores(directory), scores(tiny(CASE)))
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
        assert "multi-token prediction (model.layers.3) are not used" in caplog.text
        del own["model.layers.3.eh_proj.weight"]  # then it is a layer that config.json forgot
        describe_model(changed(tiny(CASE), tmp_path / "forgotten", tensors=tensors | inside | own))
    [warning] = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "are not part of the model" in warning.getMessage()


@pytest.mark.parametrize("count", [0, None])
def test_no_shared_experts(tiny, tmp_path, count):
    tensors = tensors_of(tiny(CASE))
    zero = {name: np.zeros_like(value) if "shared_experts.down" in name else value for name, value in tensors.items()}
    without = {name: value for name, value in tensors.items() if "shared_experts" not in name}
    expected = scores(changed(tiny(CASE), tmp_path / "zero", tensors=zero))
    assert not np.array_equal(expected, scores(tiny(CASE)))
    directory = changed(tiny(CASE), tmp_path / "none", {"n_shared_experts": count}, without)
    np.testing.assert_array_equal(scores(directory, 2), scores(tmp_path / "zero", 2))


def quantized(tensor):
    """(E4M3 numbers, float32 scales, what they stand for) of a matrix, a scale a block."""
    rows, columns = (np.arange(n) // BLOCK_SIZE for n in tensor.shape)
    peaks = np.array([[np.abs(tensor[np.ix_(rows == i, columns == j)]).max() for j in range(columns[-1] + 1)]
                      for i in range(rows[-1] + 1)], np.float32)
    scales = peaks / np.float32(448)
    values = (tensor / scales[np.ix_(rows, columns)]).astype(float8)
    return values, scales, values.astype(np.float32) * scales[np.ix_(rows, columns)]


@pytest.mark.parametrize("axis, ranges", [(None, None), (0, [(0, 100), (120, 300)]), (0, [(130, 131)]), (1, [(3, 257)]),
                                          (1, [(127, 129), (255, 270)])], ids=str)
def test_blocks_and_their_scales(tmp_path, axis, ranges):
    tensor = np.random.default_rng(0).standard_normal((300, 270)).astype(np.float32)
    tensor *= np.repeat(np.array([1, 50, 0.01], np.float32), 100)[:, None]
    values, scales, expected = quantized(tensor)
    write_safetensors(tmp_path / "model.safetensors", {"w.weight": values, "w.weight_scale_inv": scales})
    weight = Weight(tensor.shape, np.dtype(np.float32))
    if ranges is not None:
        class Given(ShardingStrategy):
            def ranges(self, shape, rank):
                return ranges

        weight = Weight(tensor.shape, np.dtype(np.float32), strategy=Given("given", 2, axis))
        expected = np.concatenate([expected.take(range(*part), axis=axis) for part in ranges], axis=axis)
    with Checkpoint(tmp_path) as checkpoint:
        source = BlockScaledTensor("w.weight")
        assert list(source.check(checkpoint, (300, 270))) == ["w.weight", "w.weight_scale_inv"]
        np.testing.assert_array_equal(source.read(checkpoint, weight), expected)
        rows = len(expected) // 3, len(expected)
        np.testing.assert_array_equal(source.read(checkpoint, weight, rows), expected[slice(*rows)])
        with pytest.raises(CutpError, match=r"w\.weight' .* has shape \[300, 270\]"):
            source.check(checkpoint, (300, 271))


@pytest.mark.parametrize("ranks", (1, 3))
def test_released_quantized_weights(tiny, tmp_path, ranks):
    """They give the results of a checkpoint that holds the numbers they stand for."""
    stored, meant = {}, {}
    for name, value in tensors_of(tiny(CASE)).items():
        if "_proj" in name and name.endswith(".weight"):
            stored[name], stored[f"{name}_scale_inv"], meant[name] = quantized(value)
        else:
            stored[name] = meant[name] = value
    fields = {"quantization_config": FP8, "auto_map": AUTO_MAP}
    directory = changed(tiny(CASE), tmp_path / "fp8", fields, stored)
    expected = scores(changed(tiny(CASE), tmp_path / "meant", tensors=meant), ranks)
    np.testing.assert_array_equal(scores(directory, ranks), expected)
    assert describe_model(directory)["parameters"] == describe_model(tiny(CASE))["parameters"]


def test_faulty_scales_are_named(tiny, tmp_path):
    name = "model.layers.0.self_attn.o_proj.weight"
    tensors = tensors_of(tiny(CASE))
    values, scales, _ = quantized(tensors[name])
    faulty = {"shape": {f"{name}_scale_inv": scales[0]}, "integers": {f"{name}_scale_inv": scales.astype(np.int32)},
              "not quantized": {name: tensors[name]}, "missing": {}}
    for kind, change in faulty.items():
        given = tensors | {name: values} | ({f"{name}_scale_inv": scales} if kind == "not quantized" else {}) | change
        directory = changed(tiny(CASE), tmp_path / kind, {"quantization_config": FP8}, given)
        with pytest.raises(CutpError, match=r"layers\.0\.self_attn\.o_proj\.weight"):
            describe_model(directory)


def test_its_own_code_is_not_needed_and_not_run(tiny, tmp_path):
    directory = changed(tiny(CASE), tmp_path / "with code", {"auto_map": AUTO_MAP})
    (directory / "modeling_deepseek.py").write_text("raise SystemExit('this ran')")
    np.testing.assert_array_equal(scores(directory), scores(tiny(CASE)))
    other = changed(tiny(CASE), tmp_path / "other", {"auto_map": {"AutoModelForCausalLM": "modeling_x.AnotherModel"}})
    with pytest.raises(UnsafeCheckpointError, match=r"modeling_x\.AnotherModel"):
        load_config(other)


@pytest.mark.parametrize("fields, error, words", [
    ({"scoring_func": "softmax"}, UnsupportedModelError, "scoring_func 'softmax' is not implemented.*only 'sigmoid'"),
    ({"topk_method": "greedy"}, UnsupportedModelError, "topk_method 'greedy'"),
    ({"moe_layer_freq": 2}, UnsupportedModelError, "moe_layer_freq 2"),
    ({"num_key_value_heads": 8}, ModelConfigError, "num_key_value_heads .* 8, but must be one of 128"),
    ({"head_dim": 128}, ModelConfigError, "head_dim .* 128, but must be one of 64"),
    ({"qk_rope_head_dim": 0}, ModelConfigError, "qk_rope_head_dim"),
    ({"qk_rope_head_dim": 3}, ModelConfigError, "even number"),
    ({"kv_lora_rank": None, "q_lora_rank": -1}, ModelConfigError, "q_lora_rank"),
    ({"n_shared_experts": -1}, ModelConfigError, "n_shared_experts"),
    ({"first_k_dense_replace": True}, ModelConfigError, "first_k_dense_replace"),
    ({"n_routed_experts": 2**30}, ModelConfigError, "n_routed_experts .* at most 100000"),
    ({"num_local_experts": 8}, ModelConfigError, "num_local_experts 8 contradicts n_routed_experts 256"),
    ({"num_experts_per_tok": 257}, ModelConfigError, "num_experts_per_tok .* at most 256"),
    ({"n_group": 7}, ConfigError, "256 experts cannot be routed to 4 of 7 equal groups"),
    ({"topk_group": 9}, ConfigError, "9 of 8"),
    ({"num_experts_per_tok": 129}, ConfigError, "129 experts a token cannot be chosen among 128"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}}, ConfigError,
     "turns 32 channels, .* 64 with"),
    ({"quantization_config": FP8 | {"weight_block_size": [64, 128]}}, UnsupportedModelError, r"\[64, 128\]"),
    ({"quantization_config": {"quant_method": "fp8"}}, UnsupportedModelError, "blocks of None"),
    ({"quantization_config": {"quant_method": "awq"}}, UnsupportedModelError, "quant_method 'awq'"),
], ids=str)
def test_what_cannot_be_is_refused(fields, error, words):
    config = ModelConfig(RELEASED | {"num_hidden_layers": 4} | fields)
    with pytest.raises(error, match=words):
        find_family(config).build(config, DeviceGroup.planned(1, 0), bfloat16, 64)


@pytest.mark.parametrize("key, value", [("qk_rope_head_dim", 64), ("q_lora_rank", 1536), ("kv_lora_rank", 512),
                                        ("qk_nope_head_dim", 128), ("v_head_dim", 128), ("n_routed_experts", 256),
                                        ("moe_intermediate_size", 2048), ("n_shared_experts", 1),
                                        ("num_experts_per_tok", 8), ("first_k_dense_replace", 3)])
def test_defaults_are_those_of_the_configuration_class(key, value):
    given = RELEASED | {key: value + 64}
    name = "head_dim" if key == "qk_rope_head_dim" else key
    assert getattr(DeepseekV3Config.of(ModelConfig(given)), name) == value + 64
    del given[key]
    assert getattr(DeepseekV3Config.of(ModelConfig(given)), name) == value


def test_nulls_and_defaults_of_the_layers():
    def parts(**fields):
        given = {**RELEASED, "num_hidden_layers": 1, "first_k_dense_replace": 0, "n_routed_experts": 16, **fields}
        given = {key: value for key, value in given.items() if value is not ...}
        [layer] = build(ModelConfig(given), DeviceGroup.planned(1, 0), bfloat16, 64).layers
        gate = layer.mlp[0].gate
        return (layer.self_attn.shards[0].rope.interleaved, gate.renormalize, gate.num_groups, gate.top_groups,
                gate.scaling, layer.self_attn.shards[0].q_lora_rank)

    absent = dict.fromkeys(("rope_interleave", "norm_topk_prob", "n_group", "topk_group", "routed_scaling_factor"), ...)
    assert parts(**absent) == (True, True, 8, 4, 2.5, 1536)
    assert parts(rope_interleave=None, norm_topk_prob=None, q_lora_rank=None) == (False, False, 8, 4, 2.5, None)
    assert parts(rope_interleave=False, norm_topk_prob=False, n_group=4, topk_group=3, routed_scaling_factor=1.0) == (
        False, False, 4, 3, 1.0, 1536)
