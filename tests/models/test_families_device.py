"""Every model family on a GPU: the engine's results are those it has with NumPy.

In the emulation, and with `-m gpu` on a real GPU.
"""

import numpy as np
import pytest

from cutp import LLM, SamplingParams, run_threads
from cutp.comm.communicator import Communicator
from cutp.errors import ConfigError
from cutp.ops import moe_routing_cuda
from tests.device_arrays import DeviceArray
from tests.wide_heads import VOCAB, write_checkpoint

# Three requests that decode are a batch of four with a row of padding.
PROMPTS = [[7], [int(t) for t in np.random.default_rng(5).integers(0, VOCAB, 21)], [3, 4]]
GREEDY = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
# One pass has room for one chunk of the long prompt beside a decoding request.
OPTIONS = {"max_batch_tokens": 16, "max_running": 4, "kv_tokens": 512, "max_len": 128}

LATENT = {"head_dim": 16, "num_key_value_heads": 4, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16,
          "v_head_dim": 16, "q_lora_rank": 24, "num_hidden_layers": 2}
# Name: family, what is peculiar to the checkpoint besides the sizes of tests/wide_heads.py. Windows are shorter than
# the long prompt.
CASES = {
    "mistral": ("mistral", {"sliding_window": 9}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "qwen3_heads_of_32": ("qwen3", {"head_dim": 32}),
    "qwen3_heads_of_112": ("qwen3", {"head_dim": 112, "num_attention_heads": 2, "num_key_value_heads": 1}),
    "gemma2": ("gemma2", {"num_hidden_layers": 2, "sliding_window": 9}),
    "gemma3": ("gemma3", {"num_hidden_layers": 2, "sliding_window": 9,
                          "layer_types": ["sliding_attention", "full_attention"]}),
    "phi3": ("phi3", {}),
    "phi3_su": ("phi3/phi3_su", {"head_dim": 16}),  # frequencies of each request, heads of 16
    "olmo2": ("olmo2", {}),
    "granite": ("granite", {}),
    "cohere2": ("cohere2", {"num_hidden_layers": 2, "sliding_window_pattern": 2, "sliding_window": 9}),
    "glm4": ("glm4", {"intermediate_size": 71}),
    "smollm3": ("smollm3", {"num_hidden_layers": 2, "no_rope_layers": [1, 0]}),
    "mixtral": ("mixtral", {"intermediate_size": 37}),
    "qwen3_moe": ("qwen3_moe", {}),
    "gpt_oss": ("gpt_oss", {"intermediate_size": 31, "num_hidden_layers": 2, "sliding_window": 9}),
    "gpt_oss_mxfp4": ("gpt_oss/gpt_oss_mxfp4", {"num_hidden_layers": 2, "layer_types": [
        "sliding_attention", "full_attention"]}),
    "deepseek_v3": ("deepseek_v3", LATENT),
    "deepseek_v3_one_group": ("deepseek_v3/deepseek_v3_one_group", LATENT | {"q_lora_rank": None}),
    "deepseek_v3_biases": ("deepseek_v3/deepseek_v3_biases", LATENT | {"moe_intermediate_size": 13}),
}
# The latent's size of all released models, for which there is a kernel of its own.
LARGE_LATENT = {"head_dim": 64, "qk_rope_head_dim": 64, "kv_lora_rank": 512, "num_attention_heads": 2,
                "num_key_value_heads": 2, "num_hidden_layers": 1, "first_k_dense_replace": 0}
CASES_16_BIT = CASES | {"deepseek_v3_large_latent": ("deepseek_v3", LATENT | LARGE_LATENT)}
# Of those, the ones that the emulation runs too.
EMULATED_16_BIT = ("olmo2", "cohere2", "gpt_oss", "deepseek_v3", "deepseek_v3_large_latent")


def checkpoint(directory, name):
    family, fields = CASES_16_BIT[name]
    family, _, case = family.partition("/")
    return write_checkpoint(directory, family, case or None, **fields)


def measured(directory, device, dtype, **options):
    """Greedy tokens, and the log-probabilities of the prompts as one array."""
    with LLM(directory, device=device, dtype=dtype, **OPTIONS, **options) as llm:
        outputs, scores = llm.generate(PROMPTS, GREEDY), llm.score(PROMPTS)
    logprobs = np.concatenate([np.array(score.logprobs[1:], float) for score in scores])
    assert np.isfinite(logprobs).all()
    return [list(output.token_ids) for output in outputs], logprobs


@pytest.mark.parametrize("name", CASES)
def test_float32_equals_the_cpus(cuda, tmp_path, name):
    directory = checkpoint(tmp_path, name)
    (tokens, logprobs), (expected_tokens, expected) = (measured(directory, d, "float32") for d in ("cuda", "cpu"))
    assert tokens == expected_tokens
    np.testing.assert_allclose(logprobs, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", CASES_16_BIT)
def test_bfloat16_is_as_close_to_float32_as_the_cpus(cuda, tmp_path, name):
    if cuda == "emulated" and name not in EMULATED_16_BIT:
        pytest.skip("in the emulation some families stand for all")
    directory = checkpoint(tmp_path, name)
    (_, device), (_, host), (_, true) = (measured(directory, *of) for of in (
        ("cuda", "bfloat16"), ("cpu", "bfloat16"), ("cpu", "float32")))
    noise, ours = np.abs(host - true), np.abs(device - true)
    print(f"{name}: mean difference from float32 {ours.mean():.4f}, on the CPU {noise.mean():.4f}")
    assert 0 < ours.mean() <= 2 * noise.mean() and ours.max() <= 3 * noise.max()


def test_clipped_projections(cuda, tmp_path):
    directory, results = checkpoint(tmp_path, "qwen2"), []
    for device in ("cpu", "cuda"):
        with LLM(directory, device=device, dtype="float32", **OPTIONS) as llm:
            plain = llm.score(PROMPTS)[1].logprobs[1:]
            for layer in llm.model.layers:
                layer.self_attn.shards[0].clip_qkv = 0.4
            results.append(llm.score(PROMPTS)[1].logprobs[1:])
        assert np.abs(np.subtract(plain, results[-1])).max() > 1e-2
    np.testing.assert_allclose(*results, rtol=0, atol=1e-4)


TWO_RANKS = {"olmo2": {}, "gpt_oss": {}, "mixtral": {}, "mixtral_whole_experts": {"CUTP_MOE": "expert"},
             "deepseek_v3_one_group": {}, "cohere2": {}}


@pytest.mark.parametrize("name", TWO_RANKS)
def test_two_ranks_equal_one(cuda, tmp_path, monkeypatch, name):
    """With sums by the host's communicator: this is about what each rank computes."""
    if cuda != "emulated":
        pytest.skip("ranks that are threads share no GPU; tests/mpi/test_families_mpi.py runs on two")
    for key, value in TWO_RANKS[name].items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(Communicator, "connect_gpus", lambda _: None)
    monkeypatch.setattr(Communicator, "wait", lambda _, what=None: what and what.synchronize())
    for method in ("all_reduce", "all_gather"):
        monkeypatch.setattr(Communicator, method, over_the_host(getattr(Communicator, method)))
    directory = checkpoint(tmp_path, name.removesuffix("_whole_experts"))
    expected_tokens, expected = measured(directory, "cpu", "float32")
    for tokens, logprobs in run_threads(2, lambda comm: measured(directory, "cuda", "float32", comm=comm,
                                                                 use_graphs=False)):
        assert tokens == expected_tokens
        np.testing.assert_allclose(logprobs, expected, rtol=0, atol=1e-4)


def over_the_host(collective):
    def call(self, x, *arguments, **options):
        if type(x) is not DeviceArray:
            return collective(self, x, *arguments, **options)
        return np.asarray(collective(self, x.host, *arguments, **options)).view(DeviceArray)

    return call


@pytest.mark.parametrize(("family", "fields", "dtype", "message"), [
    ("qwen3", {"head_dim": 260}, "float32", "attention heads of 260 float32 elements do not run on a GPU.*most 256"),
    ("qwen3", {"head_dim": 36}, "bfloat16", "attention heads of 36 bfloat16 elements .* multiple of 8"),
    ("qwen3", {"hidden_size": 60}, "bfloat16", "'embed_tokens.weight' has rows of 60 bfloat16 elements"),
    ("deepseek_v3", LATENT | {"kv_lora_rank": 640}, "float32", "latents of the cache of 656 float32 .* at most 640"),
    ("deepseek_v3", LATENT | {"qk_nope_head_dim": 12}, "bfloat16", "qk_nope_head_dim is 12"),
    ("mixtral", {"num_local_experts": 520, "intermediate_size": 8, "num_hidden_layers": 1}, "float32",
     "2 of 520 experts"),
])
def test_sizes_that_no_kernel_takes_are_refused_before_loading(cuda, tmp_path, family, fields, dtype, message):
    directory = write_checkpoint(tmp_path, family, **fields)
    with pytest.raises(ConfigError, match=message):
        LLM(directory, device="cuda", dtype=dtype, **OPTIONS)
    with LLM(directory, device="cpu", dtype=dtype, **OPTIONS) as llm:
        assert len(llm.generate([[1, 2]], GREEDY)[0].token_ids) == 4


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_routers_are_told_which_rows_are_padding(cuda, tmp_path, monkeypatch, name):
    """Wrong experts of padding would change no result, only time."""
    seen, route = [], moe_routing_cuda._route

    def recorded(op, logits, top_k, slots, *arguments):
        seen.append(slots)
        return route(op, logits, top_k, slots, *arguments)

    monkeypatch.setattr(moe_routing_cuda, "_route", recorded)
    with LLM(checkpoint(tmp_path, name), device="cuda", dtype="float32", **OPTIONS) as llm:
        llm.generate(PROMPTS, GREEDY)
    assert seen and all(slots is not None for slots in seen)
