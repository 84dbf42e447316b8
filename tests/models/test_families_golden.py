"""Every model family against Hugging Face transformers, on the checkpoints of tests/tiny_models.

The expected values were made by tests/golden/make_models_golden.py.
"""

import functools
import pathlib

import numpy as np
import pytest

from cutp import LLM, SamplingParams, run_threads
from tests import tiny_models
from tests.golden.golden_file import read_golden

DIRECTORY = pathlib.Path(__file__).parents[1] / "golden"
GREEDY = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
CHUNK = 7  # neither a divisor of a prompt nor of a page


@functools.cache
def goldens(family):
    return read_golden(DIRECTORY / f"{family}.npz")


def golden(case):
    return goldens(tiny_models.CASES[case])[case]


def prompts(case):
    return [one.prompt.tolist() for one in golden(case).prompts]


def assert_equals_hugging_face(case, scores, outputs):
    for expected, score, output in zip(golden(case).prompts, scores, outputs, strict=True):
        assert score.logprobs[0] is None
        np.testing.assert_allclose(score.logprobs[1:], expected.logprobs, rtol=0, atol=1e-4)
        assert list(output.token_ids) == expected.greedy.tolist()


@pytest.mark.parametrize("ranks", (1, 2, 3))
@pytest.mark.parametrize("case", tiny_models.CASES)
def test_equals_hugging_face(tiny, case, ranks):
    def rank_main(comm):
        with LLM(tiny(case), comm=comm) as llm:
            return llm.score(prompts(case)), llm.generate(prompts(case), GREEDY)

    for scores, outputs in run_threads(ranks, rank_main):
        assert_equals_hugging_face(case, scores, outputs)


@pytest.mark.parametrize("case", tiny_models.CASES)
def test_prompts_in_chunks_equal_hugging_face(tiny, case):
    """Tokens see those of earlier chunks in the cache as they see those of their own."""

    def rank_main(comm):
        with LLM(tiny(case), comm=comm, max_batch_tokens=CHUNK) as llm:
            return llm.score(prompts(case)), llm.generate(prompts(case), GREEDY)

    assert_equals_hugging_face(case, *run_threads(2, rank_main)[0])


@pytest.mark.parametrize("ranks", (1, 3))
@pytest.mark.parametrize("case", tiny_models.CASES)
def test_bfloat16_differs_from_float32_no_more_than_hugging_face_does(tiny, case, ranks):
    def rank_main(comm):
        with LLM(tiny(case), comm=comm, dtype="bfloat16") as llm:
            return llm.score(prompts(case))

    ours = np.concatenate([np.array(score.logprobs[1:], float) for score in run_threads(ranks, rank_main)[0]])
    float32 = np.concatenate([one.logprobs for one in golden(case).prompts])
    assert 0 < np.abs(ours - float32).mean() <= 1.5 * golden(case).bf16_mean_abs_diff


def test_every_golden_file_is_of_its_cases():
    for name, family in tiny_models.FAMILIES.items():
        assert goldens(name).keys() == family.cases.keys()
        assert (DIRECTORY / f"{name}.npz").stat().st_size < 100_000
        for case in family.cases:
            assert case.startswith(name)
            assert prompts(case) == tiny_models.prompts(case)
