"""Sampling parameters in a whole engine: several samples, all rules at once, ranks, preemption, and refusals."""

import numpy as np
import pytest

from cutp import LLM, SamplingParams, run_threads
from cutp.errors import InvalidTokenError, RequestError
from cutp.kv_cache.params import PAGE_SIZE

ONCE = "Once upon a time"


@pytest.fixture(scope="module")
def llm():
    with LLM() as llm:
        yield llm


def generated(llm, prompt=ONCE, **params):
    [output] = llm.generate(prompt, SamplingParams(**{"temperature": 0, "max_tokens": 20, **params}))
    return output


def all_rules(count=8):
    """Prompts with every parameter in use somewhere."""
    rng = np.random.default_rng(3)
    prompts = [rng.integers(4, 4096, int(rng.integers(1, 40))).tolist() for _ in range(count)]
    params = [SamplingParams(
        max_tokens=int(rng.integers(8, 20)), min_tokens=int(rng.choice([0, 5, 8])),
        temperature=float(rng.choice([0.5, 1.0, 1.7])), top_k=int(rng.choice([0, 20])),
        top_p=float(rng.choice([0.9, 1])), min_p=float(rng.choice([0, 0.02])), seed=int(rng.integers(2**63)),
        n=int(rng.integers(1, 4)), repetition_penalty=float(rng.choice([1, 1.2])),
        presence_penalty=float(rng.choice([0, 0.6])), frequency_penalty=float(rng.choice([0, 0.3])),
        logit_bias={int(t): 4.0 for t in rng.integers(4, 4096, 3)}, bad_words=["the", " and", [15]],
        stop=["king", "."], stop_token_ids=[262], logprobs=2) for _ in range(count)]
    return prompts, params


def plain(outputs):
    return [(o.index, o.sample_index, o.token_ids, o.text, o.finish_reason,
             [[token for token, _ in entry.top] for entry in o.logprobs]) for o in outputs]


@pytest.fixture(scope="module")
def alone(llm):
    """Every prompt of `all_rules` by itself."""
    found = []
    for index, (prompt, params) in enumerate(zip(*all_rules(), strict=True)):
        found += [(index, *rest) for _, *rest in plain(llm.generate([prompt], params))]
    return found


def test_batch_equals_alone(llm, alone):
    assert plain(llm.generate(*all_rules())) == alone
    # Each of these says nothing where it never came up.
    assert {reason for *_, reason, _ in alone} == {"stop", "length"}
    assert len({tokens for _, _, tokens, *_ in alone}) == len(alone) > 12


def test_preemption_changes_nothing(llm):
    """Requests are put out in the middle of their output, and come back in other slots."""
    prompts = [list(range(10 * i, 10 * i + 60)) for i in range(1, 3)]
    params = [SamplingParams(temperature=1.0, max_tokens=84, min_tokens=80, seed=i, repetition_penalty=1.1,
                             presence_penalty=0.2, frequency_penalty=0.3, bad_words=[[15, 301], [5]], top_k=50,
                             logit_bias={15: 3, 17: 5}, stop=["a"], stop_token_ids=[17], logprobs=1) for i in range(2)]
    with LLM(max_batch_tokens=100, max_running=4, kv_tokens=4 * PAGE_SIZE) as small:
        assert plain(small.generate(prompts, params)) == plain(llm.generate(prompts, params))
        assert small.stats()["preemptions"] > 0


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_equal_alone(alone, ranks):
    def rank_main(comm):
        with LLM(comm=comm) as llm:
            return plain(llm.generate(*all_rules()))

    assert run_threads(ranks, rank_main) == [alone] * ranks


def test_samples(llm):
    outputs = llm.generate([ONCE, "The king"], SamplingParams(n=4, temperature=1.0, max_tokens=10, seed=3))
    assert [(o.index, o.sample_index) for o in outputs] == [(i, j) for i in range(2) for j in range(4)]
    assert len({o.token_ids for o in outputs}) == 8 and {o.seed for o in outputs} == {3}
    assert llm.generate(ONCE, SamplingParams(n=2, temperature=1.0, max_tokens=10, seed=3)) == outputs[:2]


def test_equal_prompts_without_a_seed_differ(llm):
    outputs = llm.generate([ONCE] * 4, SamplingParams(temperature=1.0, max_tokens=10))
    assert len({o.token_ids for o in outputs}) == len({o.seed for o in outputs}) == 4
    again = llm.generate(ONCE, SamplingParams(temperature=1.0, max_tokens=10, seed=outputs[2].seed))
    assert again[0].token_ids == outputs[2].token_ids


def test_min_tokens_and_stop_tokens(llm):
    plain = generated(llm)
    third = plain.token_ids[2]
    assert generated(llm, stop_token_ids=[third]).token_ids == plain.token_ids[:3]
    for least in (1, 2):
        assert generated(llm, stop_token_ids=[third], min_tokens=least).token_ids == plain.token_ids[:3]
    later = generated(llm, stop_token_ids=[third], min_tokens=3)
    assert later.token_ids[:2] == plain.token_ids[:2] and third not in later.token_ids[:3]


def test_min_tokens_and_stop_strings(llm):
    plain = generated(llm)
    ends = {at: generated(llm, max_tokens=at).text for at in range(1, 8)}
    stop = ends[3][-2:]
    assert ends[3].find(stop) == len(ends[3]) - 2
    assert generated(llm, stop=stop).text == generated(llm, stop=stop, min_tokens=3).text == ends[3][:-2]
    passed = generated(llm, stop=stop, min_tokens=4)
    assert passed.text.startswith(ends[4]) and len(passed.token_ids) > 3
    assert passed.token_ids == plain.token_ids[: len(passed.token_ids)]


def test_bad_words_do_not_come_up(llm):
    word = generated(llm).text.split()[1]
    output = generated(llm, bad_words=[word], max_tokens=60)
    assert word in generated(llm).text.split() and word not in output.text.split()


def test_repetition_penalty(llm):
    def distinct(**params):
        tokens = generated(llm, max_tokens=60, ignore_eos=True, **params).token_ids
        return len(set(tokens)) / len(tokens)

    assert distinct(repetition_penalty=2.0) == distinct(presence_penalty=2.0, repetition_penalty=1.5) == 1.0
    assert distinct() < distinct(frequency_penalty=1.0)


def test_prompt_logprobs(llm):
    prompts = [ONCE, list(range(5, 90)), [7]]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=3, prompt_logprobs=4, logprobs=1))
    for output, scored in zip(outputs, llm.score(prompts), strict=True):
        first, *entries = output.prompt_logprobs
        assert first is None and [entry.token_id for entry in entries] == list(output.prompt_token_ids[1:])
        assert [entry.logprob for entry in entries] == pytest.approx(list(scored.logprobs[1:]), abs=1e-4)
        for entry in entries:
            assert len(entry.top) == 4 and sorted(entry.top, key=lambda pair: -pair[1]) == list(entry.top)
            assert all(token != entry.token_id or value == entry.logprob for token, value in entry.top)
    # Cached pages do not keep a prompt's log-probabilities from being computed, nor does generation change.
    again = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=3, prompt_logprobs=0))
    assert [o.token_ids for o in again] == [o.token_ids for o in outputs]
    assert [len(o.prompt_logprobs) for o in again] == [len(o.prompt_token_ids) for o in outputs]
    assert all(entry.top == () for o in again for entry in o.prompt_logprobs[1:])


@pytest.mark.parametrize("error, params", [
    (RequestError, {"min_tokens": 2000, "max_tokens": 3000}), (RequestError, {"n": 3}),
    (RequestError, {"min_tokens": 21}), (InvalidTokenError, {"logit_bias": {4096: 1}}),
    (InvalidTokenError, {"stop_token_ids": [10**6]}), (InvalidTokenError, {"bad_words": [[4096]]}),
    (RequestError, {"bad_words": [[i] for i in range(4096)]}), (RequestError, {"stop": 3}),
    (RequestError, {"logit_bias": "abc"}), (RequestError, {"frequency_penalty": "1"}),
])
def test_refused_without_harm(llm, error, params):
    before = generated(llm).token_ids
    with pytest.raises(error):
        generated(llm, **params)
    assert generated(llm).token_ids == before
