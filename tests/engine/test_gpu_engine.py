"""The engine on a real GPU against the CPU, on the bundled model and over many requests."""

import pathlib

import numpy as np
import pytest

from cutp import LLM, SamplingParams
from tests.engine.test_device_engine import changing_batches, check_random_requests, graphs_of
from tests.golden.golden_file import read_golden

pytestmark = pytest.mark.gpu

TEXTS = ["Once upon a time", "The king", [5], [7] * 200, "A wolf and a fox met in the wood, and"]
GREEDY = SamplingParams(temperature=0, max_tokens=60, seed=0, ignore_eos=True)
DRAWS = {
    "greedy": GREEDY,
    "temperature": SamplingParams(temperature=0.8, top_p=0.9, top_k=50, max_tokens=60, seed=3),
    "samples": SamplingParams(temperature=1.0, min_p=0.02, max_tokens=30, n=4, seed=4),
    "penalties": SamplingParams(temperature=0.8, repetition_penalty=1.2, logprobs=2, prompt_logprobs=1, max_tokens=40,
                                seed=3, logit_bias={5: 2.0}),
    "stop": SamplingParams(temperature=0, stop=[" the"], max_tokens=40, seed=0),
}


@pytest.fixture(autouse=True)
def _on_a_gpu():
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    if not cupy.cuda.is_available():
        pytest.skip("there is no GPU")


def logprobs(scores):
    return np.concatenate([score.logprobs[1:] for score in scores]).astype(np.float64)


@pytest.mark.parametrize("kind", DRAWS)
def test_tales_in_float32_equals_the_cpu(kind):
    with LLM(device="cpu", dtype="float32") as llm:
        expected, scores = llm.generate(TEXTS, DRAWS[kind]), llm.score(TEXTS)
    for use_graphs in (True, False):
        with LLM(device="cuda", dtype="float32", use_graphs=use_graphs) as llm:
            got = llm.generate(TEXTS, DRAWS[kind])
            assert [(o.token_ids, o.text, o.finish_reason) for o in got] == \
                [(o.token_ids, o.text, o.finish_reason) for o in expected]
            if DRAWS[kind].logprobs is not None:
                for one, other in zip(got, expected, strict=True):
                    np.testing.assert_allclose([x.logprob for x in one.logprobs], [x.logprob for x in other.logprobs],
                                               rtol=0, atol=1e-4)
            np.testing.assert_allclose(logprobs(llm.score(TEXTS)), logprobs(scores), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_graphs_are_bit_for_bit_what_single_launches_are(dtype):
    found = []
    for use_graphs in (False, True):
        with LLM(device="cuda", dtype=dtype, use_graphs=use_graphs, max_running=7, kv_tokens=4096) as llm:
            found += [(changing_batches(llm), [o.token_ids for o in llm.generate(TEXTS, GREEDY)],
                       [o.token_ids for o in llm.generate(TEXTS, DRAWS["temperature"])], llm.score(TEXTS))
                      for _ in range(2)]
            assert bool(graphs_of(llm)) == use_graphs
    assert all(each == found[0] for each in found)


def test_tales_in_bfloat16_is_as_close_as_hugging_face():
    golden = read_golden(pathlib.Path(__file__).parents[1] / "golden" / "llama.npz")["bundled_tales"]
    with LLM(device="cuda", dtype="bfloat16") as llm:
        scores = llm.score([prompt.prompt.tolist() for prompt in golden.prompts])
    difference = np.abs(logprobs(scores) - np.concatenate([prompt.logprobs for prompt in golden.prompts]))
    print(f"mean difference from float32 {difference.mean():.4f}, Hugging Face's {golden.bf16_mean_abs_diff:.4f}")
    assert difference.mean() <= 1.5 * golden.bf16_mean_abs_diff


@pytest.mark.parametrize("count,use_graphs", [(200, True), (60, False)])
def test_random_requests_equal_themselves_alone(wide, count, use_graphs):
    check_random_requests(wide(), count, long_share=0.5, use_graphs=use_graphs)


def test_hundreds_of_requests_at_once():
    """More than a captured batch of one size: the batch shrinks as they end, one by one."""
    params = [SamplingParams(temperature=(0.0, 0.8)[i % 2], max_tokens=4 + i % 60, seed=i, ignore_eos=True)
              for i in range(300)]
    prompts = [[3 + i % 200, 5, 3 + i % 7] for i in range(300)]
    with LLM(device="cpu", dtype="float32") as llm:
        expected = [o.token_ids for o in llm.generate(prompts, params)]
    with LLM(device="cuda", dtype="float32", max_running=200) as llm:
        got = [o.token_ids for o in llm.generate(prompts, params)]
        assert len(graphs_of(llm)) >= 10
    # A near tie may be decided otherwise.
    assert sum(a != b for a, b in zip(got, expected, strict=True)) <= 3
