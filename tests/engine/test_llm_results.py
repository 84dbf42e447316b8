"""A result depends on its own request only: not on the batch, the chunks, the cache or the number of ranks."""

import dataclasses
import shutil

import numpy as np
import pytest

from cutp import LLM, SamplingParams, run_threads
from cutp.errors import CapacityError
from cutp.kv_cache.params import PAGE_SIZE

PROMPTS = ["Once upon a time", "The king", "A wolf and a fox met in the wood, and", "Why", "There was a miller"]


def many_requests(seed=0, count=24):
    rng = np.random.default_rng(seed)
    prompts = [PROMPTS[i] if i < len(PROMPTS) else rng.integers(4, 4096, int(rng.integers(1, 90))).tolist()
               for i in rng.integers(0, 2 * len(PROMPTS), count)]
    params = [SamplingParams(max_tokens=int(rng.integers(1, 24)), temperature=float(rng.choice([0.0, 0.5, 1.0, 1.7])),
                             top_k=int(rng.choice([0, 1, 20])), top_p=float(rng.choice([0.5, 0.9, 1.0])),
                             min_p=float(rng.choice([0.0, 0.1])), seed=int(rng.integers(0, 2**63)))
              for _ in range(count)]
    return prompts, params


def tokens(outputs):
    return [output.token_ids for output in outputs]


@pytest.fixture(scope="module")
def alone():
    """The result of every request when it runs by itself."""
    prompts, params = many_requests()
    with LLM() as llm:
        return [llm.generate(prompt, one)[0].token_ids for prompt, one in zip(prompts, params, strict=True)]


def test_batch_equals_alone(alone):
    with LLM() as llm:
        assert tokens(llm.generate(*many_requests())) == alone


@pytest.mark.parametrize("ranks", (2, 3))
def test_ranks_equal_alone(alone, ranks):
    def rank_main(comm):
        with LLM(comm=comm) as llm:
            return tokens(llm.generate(*many_requests()))

    assert run_threads(ranks, rank_main) == [alone] * ranks


@pytest.mark.parametrize("batch_tokens,running,pages", [(7, 64, 64), (512, 2, 64), (16, 3, 4)])
def test_chunks_and_a_small_cache_change_nothing(alone, batch_tokens, running, pages):
    with LLM(max_batch_tokens=batch_tokens, max_running=running, kv_tokens=pages * PAGE_SIZE) as llm:
        assert tokens(llm.generate(*many_requests())) == alone
        assert llm.memory()["cache_tokens"] == pages * PAGE_SIZE and llm.memory()["cache_tokens_in_use"] == 0


def test_a_request_that_no_cache_could_hold_is_refused():
    with LLM(kv_tokens=PAGE_SIZE) as llm:
        with pytest.raises(CapacityError, match="prompt 0 may reach 104 tokens; the cache holds 64"):
            llm.generate([[5] * 4], SamplingParams(max_tokens=100))
        assert len(llm.generate([[5] * 4], SamplingParams(max_tokens=60, ignore_eos=True))[0].token_ids) == 60


@pytest.mark.parametrize("case", ("rope_dynamic", "rope_longrope"))
def test_length_dependent_rotary_tables_belong_to_the_request(tiny, case):
    """Short and long requests in one batch keep their own tables, also through chunks and while they grow."""
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 512, n).tolist() for n in (5, 31, 33, 60, 90)]
    params = SamplingParams(max_tokens=20, temperature=0.0)
    with LLM(tiny(case)) as llm:
        scores = [llm.score([prompt])[0].logprobs for prompt in prompts]
        outputs = [llm.generate([prompt], params)[0].token_ids for prompt in prompts]
        batch = llm.score(prompts)
        for expected, got in zip(scores, batch, strict=True):
            np.testing.assert_allclose(np.array(got.logprobs[1:], float), np.array(expected[1:], float), atol=2e-5)
        assert tokens(llm.generate(prompts, params)) == outputs


def test_samples_differ_by_seed_and_position():
    with LLM() as llm:
        params = [SamplingParams(max_tokens=12, temperature=1.0, seed=seed, ignore_eos=True) for seed in range(20)]
        assert len(set(tokens(llm.generate(["Once upon a time"] * 20, params)))) > 15


def test_logprobs_of_generated_tokens_equal_scoring_them():
    with LLM() as llm:
        [output] = llm.generate("The king", SamplingParams(max_tokens=12, temperature=1.3, seed=5, logprobs=3))
        [score] = llm.score([output.prompt_token_ids + output.token_ids])
        got = [entry.logprob for entry in output.logprobs]
        np.testing.assert_allclose(got, score.logprobs[len(output.prompt_token_ids):], atol=2e-5)
        for entry, token in zip(output.logprobs, output.token_ids, strict=True):
            assert entry.token_id == token and len(entry.top) == 3
            assert sorted((p for _, p in entry.top), reverse=True) == [p for _, p in entry.top]
            assert entry.top[0][1] >= entry.logprob


def test_greedy_takes_the_likeliest_token():
    with LLM() as llm:
        [output] = llm.generate("The king", SamplingParams(max_tokens=12, temperature=0.0, logprobs=1))
        assert [entry.top[0][0] for entry in output.logprobs] == list(output.token_ids)


def test_generation_ends_at_the_context():
    with LLM(max_len=20) as llm:
        [output] = llm.generate([list(range(5, 20))], SamplingParams(max_tokens=50, ignore_eos=True))
        assert len(output.token_ids) == 5 and output.finish_reason == "length"


def test_an_end_token_ends_the_request():
    with LLM() as llm:
        params = SamplingParams(max_tokens=20, temperature=0.0)
        [free] = llm.generate("The king", params)
        stop = free.token_ids[6]
        [stopped] = llm.generate("The king", dataclasses.replace(params, stop_token_ids=(stop,)))
        first = free.token_ids.index(stop)
        assert stopped.token_ids == free.token_ids[: first + 1] and stopped.finish_reason == "stop"
        assert free.text.startswith(stopped.text)


def test_numpy_prompts_and_params_for_each():
    with LLM() as llm:
        ids = np.array([1, 340, 497], np.int32)
        greedy = [SamplingParams(max_tokens=n, temperature=0.0) for n in (3, 5)]
        first, second = llm.generate([ids, ids.tolist()], greedy)
        assert second.token_ids[:3] == first.token_ids and len(second.token_ids) == 5
        assert llm.generate(ids, greedy[0])[0].token_ids == first.token_ids


def test_a_default_that_is_not_applied_is_said(tiny, tmp_path, caplog):
    shutil.copytree(tiny("mha"), tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text('{"num_beams": 4, "repetition_penalty": 1.1}')
    with LLM(tmp_path / "model"):
        assert "num_beams 4, which is not applied" in caplog.text and "repetition_penalty" not in caplog.text
    caplog.clear()
    with LLM():
        assert caplog.text == ""
