"""Llama against Hugging Face transformers: log-probabilities and greedy tokens of tiny checkpoints and of tales.

The expected values were made by tests/golden/make_llama_golden.py.
"""

import pathlib

import numpy as np
import pytest

from cutp import LLM, SamplingParams, run_threads
from tests.golden.golden_file import read_golden

GOLDEN = read_golden(pathlib.Path(__file__).parents[1] / "golden" / "llama.npz")
TALES = "bundled_tales"
# Every case has at least 4 heads, so every one runs on 4 ranks.
RANKS = (1, 2, 3, 4)


@pytest.fixture
def directory(tiny):
    return lambda case: None if case == TALES else tiny(case)


def results(directory, prompts, ranks, dtype="float32", greedy=True):
    """(scores, generations) of every rank."""

    def rank_main(comm):
        with LLM(directory, comm=comm, dtype=dtype) as llm:
            params = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
            return llm.score(prompts), llm.generate(prompts, params) if greedy else None

    return run_threads(ranks, rank_main)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("case", GOLDEN)
def test_equals_hugging_face(directory, case, ranks):
    expected = GOLDEN[case].prompts
    for scores, outputs in results(directory(case), [g.prompt.tolist() for g in expected], ranks):
        for golden, score, output in zip(expected, scores, outputs, strict=True):
            assert score.logprobs[0] is None
            np.testing.assert_allclose(score.logprobs[1:], golden.logprobs, rtol=0, atol=1e-4)
            assert list(output.token_ids) == golden.greedy.tolist()


@pytest.mark.parametrize("ranks", (1, 3))
@pytest.mark.parametrize("case", GOLDEN)
def test_bfloat16_differs_from_float32_no_more_than_hugging_face_does(directory, case, ranks):
    golden = GOLDEN[case]
    [(scores, _), *_] = results(directory(case), [g.prompt.tolist() for g in golden.prompts], ranks, "bfloat16", False)
    ours = np.concatenate([np.array(s.logprobs[1:], float) for s in scores])
    float32 = np.concatenate([g.logprobs for g in golden.prompts])
    difference = np.abs(ours - float32).mean()
    assert 0 < difference <= 1.5 * golden.bf16_mean_abs_diff
