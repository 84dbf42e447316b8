"""Every model family on a GPU: the engine's results are those it has with NumPy.

In the emulation, and with `-m gpu` on a real GPU.
"""

import numpy as np
import pytest

from cutp import LLM, SamplingParams
from tests.wide_heads import VOCAB, write_checkpoint

PROMPTS = [[7], [int(t) for t in np.random.default_rng(5).integers(0, VOCAB, 21)]]
GREEDY = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
# One pass has room for one chunk of the long prompt beside a decoding request.
OPTIONS = {"max_batch_tokens": 16, "max_running": 4, "kv_tokens": 512, "max_len": 256}

CASES = {
    "mistral": {}, "qwen2": {}, "qwen3": {}, "gemma2": {}, "gemma3": {}, "phi3": {}, "olmo2": {}, "granite": {},
    "cohere2": {}, "glm4": {}, "smollm3": {}, "mixtral": {}, "qwen3_moe": {}, "gpt_oss": {},
    "deepseek_v3": {"head_dim": 16, "num_key_value_heads": 4, "kv_lora_rank": 32, "qk_rope_head_dim": 16,
                    "qk_nope_head_dim": 16, "v_head_dim": 16},
}


@pytest.mark.parametrize("name", CASES)
def test_float32(cuda, tmp_path, name):
    family, _, _ = name.partition("/")
    directory = write_checkpoint(tmp_path, family, **CASES[name])
    results = {}
    for device in ("cpu", "cuda"):
        with LLM(directory, device=device, dtype="float32", **OPTIONS) as llm:
            results[device] = llm.generate(PROMPTS, GREEDY), llm.score(PROMPTS)
    (outputs, scores), (device_outputs, device_scores) = results["cpu"], results["cuda"]
    assert [list(one.token_ids) for one in device_outputs] == [list(one.token_ids) for one in outputs]
    for ours, theirs in zip(device_scores, scores, strict=True):
        np.testing.assert_allclose(np.array(ours.logprobs[1:], float), np.array(theirs.logprobs[1:], float), rtol=0,
                                   atol=1e-4)
