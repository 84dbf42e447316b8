"""Families with mixtures of experts: whole experts on each rank, quantized files, spellings of config.json."""

import json
from math import ldexp

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cutp import LLM, SamplingParams, run_threads
from cutp.checkpoint.checkpoint import Checkpoint
from cutp.checkpoint.config import ModelConfig, load_config
from cutp.comm.device_group import DeviceGroup
from cutp.errors import CheckpointError, ConfigError, MissingTensorError, ModelConfigError, UnsupportedModelError
from cutp.models.load import check_weights, load_weights
from cutp.models.registry import find_family
from cutp.nn.moe import MoE
from tests import tiny_models
from tests.models.test_families_golden import GREEDY, assert_equals_hugging_face, prompts

CASES = [case for case, family in tiny_models.CASES.items() if family in ("mixtral", "qwen3_moe", "gpt_oss")]
ABSENT = object()


def build(raw, ranks=1, rank=0):
    config = ModelConfig(raw)
    return find_family(config).build(config, DeviceGroup.planned(ranks, rank), np.dtype(np.float32), 64)


def changed(case, **fields):
    raw = tiny_models.config(case) | fields
    return {key: value for key, value in raw.items() if value is not ABSENT}


@pytest.mark.parametrize(("case", "ranks"), [*((case, 3) for case in CASES), ("gpt_oss_mxfp4", 2)])
def test_whole_experts_equal_hugging_face(tiny, case, ranks, monkeypatch):
    monkeypatch.setenv("CUTP_MOE", "expert")
    directory = tiny(case)

    def rank_main(comm):
        with LLM(directory, comm=comm) as llm:
            return llm.score(prompts(case)), llm.generate(prompts(case), GREEDY)

    for scores, outputs in run_threads(ranks, rank_main):
        assert_equals_hugging_face(case, scores, outputs)


def loaded(directory, ranks, rank):
    """(model, bytes read) of one rank."""
    config = load_config(directory)
    family = find_family(config)
    model = family.build(config, DeviceGroup.planned(ranks, rank), np.dtype(np.float32), 64)
    with Checkpoint(directory) as checkpoint:
        check_weights(model, checkpoint, family)
        load_weights(model, checkpoint, family)
        return model, checkpoint.bytes_read


@pytest.mark.parametrize("case", ["mixtral_window", "qwen3_moe_released", "gpt_oss_mxfp4", "gpt_oss_defaults"])
def test_a_rank_of_whole_experts_reads_no_others(tiny, case, monkeypatch):
    monkeypatch.setenv("CUTP_MOE", "expert")
    # float32 on disk, or four bits and a share of a scale.
    stored = 17 / 128 if "mxfp4" in case else 1
    # A rank that read all experts would be at 3. Rows of gate and up that lie in turn may be read twice.
    most = 2.8 if "gpt_oss" in case else 1.5
    for rank in range(3):
        model, read = loaded(tiny(case), 3, rank)
        held = {name: weight.local_bytes for name, weight in model.named_weights()}
        matrices = sum(held[name] for name in held if ".experts." in name and name.endswith(".weight"))
        others = sum(held.values()) - matrices
        # Of a matrix divided by columns the rows are read from the first to the last wanted byte.
        assert 0.9 < (read - others) / (matrices * stored) < most


def dequantized(blocks, scales):
    """[experts, rows, columns / 32, 16] bytes -> [experts, columns, rows], number by number."""
    numbers = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    out = np.zeros((*blocks.shape[:2], blocks.shape[2] * 32), np.float32)
    for index in np.ndindex(blocks.shape):
        byte, scale = int(blocks[index]), int(scales[index[:3]]) - 127
        for half, code in enumerate((byte % 16, byte // 16)):
            size = ldexp(numbers[code % 8], scale)
            out[(*index[:2], 32 * index[2] + 2 * index[3] + half)] = -size if code >= 8 else size
    return np.ascontiguousarray(out.swapaxes(1, 2))


@pytest.mark.parametrize("setting", ["tensor", "expert"])
def test_mxfp4_is_the_file_it_stands_for(tiny, tmp_path, setting, monkeypatch):
    monkeypatch.setenv("CUTP_MOE", setting)
    case = "gpt_oss_mxfp4_uneven"
    tensors = load_file(tiny(case) / "model.safetensors")
    for name in [name.removesuffix("_blocks") for name in tensors if name.endswith("_blocks")]:
        tensors[name] = dequantized(tensors.pop(f"{name}_blocks"), tensors.pop(f"{name}_scales"))
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(changed(case, quantization_config=ABSENT)))

    def rank_main(comm, directory):
        with LLM(directory, comm=comm) as llm:
            return [score.logprobs for score in llm.score(prompts(case))]

    assert run_threads(3, rank_main, tiny(case)) == run_threads(3, rank_main, tmp_path)


@pytest.mark.parametrize("case, fields, error, message", [
    ("mixtral_defaults", {"num_experts": 3}, ModelConfigError, "num_experts 3 contradicts num_local_experts 4"),
    ("mixtral_defaults", {"num_experts_per_tok": 5}, ModelConfigError, "num_experts_per_tok.*at most 4"),
    ("mixtral_defaults", {"num_local_experts": 10**8}, ModelConfigError, "num_local_experts.*at most"),
    ("mixtral_defaults", {"num_local_experts": 0}, ModelConfigError, "num_local_experts"),
    ("mixtral_defaults", {"sliding_window": 0}, ModelConfigError, "sliding_window"),
    ("mixtral_defaults", {"quantization_config": {"quant_method": "mxfp4"}}, UnsupportedModelError, "mxfp4"),
    ("gpt_oss_mxfp4", {"quantization_config": {"quant_method": "gptq"}}, UnsupportedModelError, "gptq"),
    ("gpt_oss_defaults", {"sliding_window": None}, ModelConfigError, "sliding_window"),
    ("gpt_oss_defaults", {"layer_types": ["full_attention"]}, ModelConfigError, "3 entries"),
    ("gpt_oss_defaults", {"swiglu_limit": -1.0}, ModelConfigError, "swiglu_limit"),
    ("qwen3_moe_released", {"mlp_only_layers": [0, "1"]}, ModelConfigError, "mlp_only_layers.*integers"),
    ("qwen3_moe_released", {"mlp_only_layers": 1}, ModelConfigError, "mlp_only_layers.*list"),
    ("qwen3_moe_released", {"decoder_sparse_step": 0}, ModelConfigError, "decoder_sparse_step"),
    ("qwen3_moe_released", {"moe_intermediate_size": 0}, ModelConfigError, "moe_intermediate_size"),
    ("qwen3_moe_released", {"hidden_act": "mish"}, UnsupportedModelError, "mish"),
])
def test_refused(case, fields, error, message):
    with pytest.raises(error, match=message):
        build(changed(case, **fields))


YARN = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
        "original_max_position_embeddings": 4096}


@pytest.mark.parametrize("case, fields", [
    ("gpt_oss_defaults", {"rope_scaling": YARN, "rope_theta": 150000.0}),
    ("gpt_oss_defaults", {"rope_parameters": YARN | {"rope_theta": 150000.0}}),
    ("gpt_oss_defaults", {"swiglu_limit": 7.0, "swiglu_alpha": 1.702, "attention_bias": True, "hidden_act": "relu"}),
    ("gpt_oss_defaults", {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
                          "num_experts": 5, "num_experts_per_tok": 4, "rms_norm_eps": 1e-5}),
    ("mixtral_defaults", {"num_experts": 4, "num_local_experts": ABSENT, "num_experts_per_tok": 2}),
    ("mixtral_defaults", {"rope_theta": 1e6, "rms_norm_eps": 1e-5, "sliding_window": None, "head_dim": None}),
    ("qwen3_moe_released", {"num_local_experts": 6, "num_experts": ABSENT, "sliding_window": 4}),
    ("qwen3_moe_released", {"mlp_only_layers": None, "decoder_sparse_step": ABSENT}),
    ("qwen3_moe_yarn", {"attention_bias": False, "use_sliding_window": None}),
])
def test_means_the_same(case, fields):
    assert facts(build(changed(case, **fields))) == facts(build(changed(case)))


def facts(model):
    return [layer.signature() for layer in model.layers], model.signature()["norm.weight"]


@pytest.mark.parametrize("case, fields", [
    ("gpt_oss_defaults", {"rope_theta": 10000.0}),
    ("gpt_oss_defaults", {"swiglu_alpha": 1.0}),
    ("gpt_oss_defaults", {"attention_bias": False}),
    ("mixtral_defaults", {"sliding_window": 7}),
    ("mixtral_defaults", {"hidden_act": "gelu"}),
    ("qwen3_moe_released", {"norm_topk_prob": False}),
    ("qwen3_moe_released", {"norm_topk_prob": ABSENT}),
    ("qwen3_moe_released", {"use_sliding_window": True, "sliding_window": 5}),
    ("qwen3_moe_released", {"mlp_only_layers": [1]}),
])
def test_does_not_mean_the_same(case, fields):
    assert facts(build(changed(case, **fields))) != facts(build(changed(case)))


@pytest.mark.parametrize("step, dense, mixtures", [(1, [], [0, 1, 2, 3]), (2, [], [1, 3]), (1, [0, 2], [1, 3]),
                                                   (2, [1], [3]), (3, [7], [2]), (5, [], [])])
def test_the_layers_of_qwen3_moe_that_are_mixtures(step, dense, mixtures):
    model = build(changed("qwen3_moe_released", num_hidden_layers=4, decoder_sparse_step=step, mlp_only_layers=dense))
    assert [i for i, layer in enumerate(model.layers) if isinstance(layer.mlp[0], MoE)] == mixtures


# Parameters in billions, as the models' cards have them.
RELEASED = {
    "mixtral-8x7b": ({
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": 4096, "vocab_size": 32000,
        "intermediate_size": 14336, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "num_local_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 32768, "rope_theta": 1e6,
        "sliding_window": None, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }, 46.703, 32768),
    "qwen3-30b-a3b": ({
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "attention_bias": False, "head_dim": 128,
        "decoder_sparse_step": 1, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 6144,
        "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [], "moe_intermediate_size": 768,
        "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
        "num_hidden_layers": 48, "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "rope_scaling": None,
        "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False, "use_sliding_window": False,
        "vocab_size": 151936,
    }, 30.532, 40960),
    "gpt-oss-20b": ({
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "attention_bias": True, "head_dim": 64,
        "experts_per_token": 4, "hidden_act": "silu", "hidden_size": 2880, "initial_context_length": 4096,
        "intermediate_size": 2880, "layer_types": ["sliding_attention", "full_attention"] * 12,
        "max_position_embeddings": 131072, "num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": 24,
        "num_key_value_heads": 8, "num_local_experts": 32, "quantization_config": {"quant_method": "mxfp4"},
        "rms_norm_eps": 1e-5, "rope_scaling": YARN, "rope_theta": 150000, "sliding_window": 128, "swiglu_limit": 7.0,
        "tie_word_embeddings": False, "vocab_size": 201088,
    }, 20.915, 131072),
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_models(name):
    raw, billions, context = RELEASED[name]
    model = build(raw)
    assert sum(weight.num_elements for _, weight in model.named_weights()) / 1e9 == pytest.approx(billions, abs=5e-4)
    assert find_family(ModelConfig(raw)).sizes(ModelConfig(raw)).context_length == context


def test_more_ranks_than_channels_of_an_expert():
    sizes = find_family(ModelConfig({"model_type": "qwen3_moe"})).sizes
    few = sizes(ModelConfig(changed("qwen3_moe_released", moe_intermediate_size=2)))
    with pytest.raises(ConfigError, match="2 channels of an expert"):
        few.check_tensor_parallel(3)
    few.check_tensor_parallel(2)


@pytest.mark.parametrize("case, change, error, message", [
    ("mixtral_defaults", lambda t: t.pop("model.layers.1.block_sparse_moe.experts.3.w2.weight"), MissingTensorError,
     "experts.3.w2.weight"),
    ("gpt_oss_defaults", lambda t: t.pop("model.layers.1.mlp.experts.down_proj_bias"), MissingTensorError,
     "down_proj_bias"),
    ("gpt_oss_mxfp4", lambda t: t.pop("model.layers.1.mlp.experts.down_proj_scales"), MissingTensorError,
     "down_proj_scales"),
    ("gpt_oss_mxfp4", lambda t: t.update({"model.layers.0.mlp.experts.down_proj": np.zeros(3, np.float32)}),
     CheckpointError, "layers.0.mlp.experts.down_proj'.*without it"),
])
def test_files_that_do_not_fit(tiny, tmp_path, case, change, error, message):
    tensors = load_file(tiny(case) / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(tiny_models.config(case)))
    with pytest.raises(error, match=message), LLM(tmp_path) as llm:
        llm.generate([[1]], SamplingParams(max_tokens=1))
