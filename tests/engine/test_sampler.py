"""The sampler against plain float64 Python: each parameter by itself and all together, over steps, ranks and slots."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cutp.comm.communicator import Communicator
from cutp.comm.threads import run_threads
from cutp.engine.outputs import TokenLogprobs
from cutp.engine.sampler import Sampler
from cutp.errors import CutpError
from tests.engine.sampling_reference import changed_logits, expected_token, make_request

pytestmark = pytest.mark.filterwarnings("error")

VOCAB = 50
RULES = {
    "none": {},
    "temperature": {"temperature": st.sampled_from([0.0, 0.3, 1.0, 2.5])},
    "top_k": {"top_k": st.sampled_from([0, 1, 2, 7, 100])},
    "top_p": {"top_p": st.sampled_from([1e-6, 0.3, 0.8, 0.97, 1.0])},
    "min_p": {"min_p": st.sampled_from([0.0, 0.02, 0.3, 1.0])},
    "logit_bias": {"logit_bias": st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-100, 100, width=32),
                                                 max_size=6)},
    "min_tokens": {"min_tokens": st.integers(0, 5)},
    "bad_words": {"bad_words": st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=3), max_size=8)},
    "repetition_penalty": {"repetition_penalty": st.sampled_from([0.5, 0.9, 1.0, 1.3, 2.0])},
    "presence_penalty": {"presence_penalty": st.sampled_from([-2.0, -0.3, 0.0, 0.7, 2.0])},
    "frequency_penalty": {"frequency_penalty": st.sampled_from([-2.0, -0.3, 0.0, 0.7, 2.0])},
}
RULES["all"] = {name: rule for rules in RULES.values() for name, rule in rules.items()}


def alone(max_running=8, vocab_size=VOCAB):
    return Sampler(0, vocab_size, max_running, Communicator.single())


def admitted(sampler, *requests):
    for request in requests:
        sampler.admit(request)
    return list(requests)


def logits_of(rng, rows, columns=VOCAB, spread=2.0):
    """Logits that favour the first ids, so that tokens repeat and words of theirs come up."""
    return (rng.standard_normal((rows, columns)) * spread + np.linspace(3, 0, columns)).astype(np.float32)


@st.composite
def sequences(draw, rules):
    params = {name: draw(rule) for name, rule in rules.items()}
    return make_request(slot=draw(st.integers(0, 7)), prompt=draw(st.lists(st.integers(0, VOCAB - 1), min_size=1,
                                                                           max_size=6)),
                        ends=draw(st.sets(st.integers(0, 8), max_size=3)), sample_index=draw(st.integers(0, 3)),
                        seed=draw(st.integers(0, 2**64 - 1)), **{"temperature": 1.0, **params})


@pytest.mark.parametrize("rule", RULES)
def test_every_token_equals_the_reference(rule):
    decided = []

    @settings(max_examples=60 if rule == "all" else 25, derandomize=True, deadline=None, database=None)
    @given(sequences(RULES[rule]), st.integers(0, 2**32))
    def check(request, seed):
        sampler, rng = alone(), np.random.default_rng(seed)
        sampler.admit(request)
        for _ in range(10):
            x = logits_of(rng, 1)
            [token] = sampler.sample(x, [request]).tolist()
            expected = expected_token(x[0].tolist(), request)
            decided.append(expected is not None)
            assert expected in (None, token)
            request.generated.append(token)

    check()
    assert np.mean(decided) > 0.9


def test_rules_that_the_reference_draws_from_matter():
    """Each parameter changes tokens, or the comparison above says nothing about it."""
    rng = np.random.default_rng(0)
    xs = logits_of(rng, 40)
    plain = [expected_token(x.tolist(), make_request(generated=[3, 3, 4], temperature=0.9)) for x in xs]
    for params in ({"temperature": 2.0}, {"top_k": 2}, {"top_p": 0.3}, {"min_p": 0.5}, {"logit_bias": {2: 5.0}},
                   {"min_tokens": 4}, {"bad_words": [[4, 3], [3, 4, 1]]}, {"repetition_penalty": 2.0},
                   {"presence_penalty": 2.0}, {"frequency_penalty": 1.5}):
        request = make_request(generated=[3, 3, 4], ends=(0, 1), **{"temperature": 0.9, **params})
        assert [expected_token(x.tolist(), request) for x in xs] != plain, params


# ---------------------------------------------------------------- each rule, with tokens known beforehand

def greedy(x, **request):
    """The token after one row of logits."""
    request = make_request(temperature=0, vocab_size=len(x), **request)
    sampler = alone(vocab_size=len(x))
    sampler.admit(request)
    return sampler.sample(np.array([x], np.float32), [request]).tolist()[0]


def test_bias():
    assert greedy([0, 1, 2, 3], logit_bias={1: 2.5}) == 1
    assert greedy([0, 1, 2, 3], logit_bias={3: -100, 2: -0.9}) == 2
    # It comes before the repetition penalty, which makes a positive logit smaller.
    assert greedy([0, 1, 2, 3], prompt=[1], logit_bias={1: 6}, repetition_penalty=2.0) == 1
    assert greedy([0, 1, 2, 3.6], prompt=[1], logit_bias={1: 6}, repetition_penalty=2.0) == 3


def test_min_tokens_forbids_what_would_end_the_request():
    row = [9, 8, 1, 5]
    for generated, token in (([], 3), ([3], 3), ([3, 3], 0), ([3, 3, 3], 0)):
        assert greedy(row, ends=(0, 1), min_tokens=2, generated=generated) == token
    assert greedy(row, ends=(), min_tokens=2) == 0
    assert greedy(row, ends=(0, 1), min_tokens=2, logit_bias={0: 100}) == 3  # no bias brings it back


def test_bad_words():
    row = [9, 8, 7, 6]
    assert greedy(row, bad_words=[[0], [1, 2]]) == 1
    words = [[1, 0], [2, 1, 0]]
    assert greedy(row, prompt=[3], bad_words=words) == 0
    assert greedy(row, prompt=[1], bad_words=words) == 1  # also where the word begins in the prompt
    assert greedy(row, prompt=[2], generated=[1], bad_words=[[2, 1, 0]]) == 1
    assert greedy(row, prompt=[3], generated=[1], bad_words=[[2, 1, 0]]) == 0
    assert greedy(row, prompt=[1], bad_words=[[2, 1, 0]]) == 0  # longer than what is there
    assert greedy(row, prompt=[2, 1], bad_words=[[2, 1, 0], [1, 1], [0]]) == 2
    assert greedy(row, prompt=[0], bad_words=[[0, 0]], logit_bias={0: 100}) == 1


def test_penalties():
    assert greedy([3, 2.9, -1, 0], prompt=[0], repetition_penalty=1.1) == 1
    assert greedy([-3, -1, -1.1, -4], prompt=[1], repetition_penalty=1.5) == 2
    assert greedy([3, 2.9, -1, 0], prompt=[0], presence_penalty=2.0, frequency_penalty=2.0) == 0  # prompt only
    assert greedy([3, 2.9, -1, 0], generated=[0], presence_penalty=0.2) == 1
    assert greedy([3, 2, -1, 0], generated=[0, 0, 0], presence_penalty=0.9) == 0  # once
    assert greedy([3, 2, -1, 0], generated=[0, 0, 0], frequency_penalty=0.4) == 1  # three times


def test_the_sampler_counts_what_it_sampled():
    request = make_request(temperature=0, frequency_penalty=1.0)
    sampler = alone()
    [request] = admitted(sampler, request)
    x = np.zeros((1, VOCAB), np.float32)
    x[0, [4, 5]] = [2.5, 1]
    tokens = []
    for _ in range(5):
        tokens += sampler.sample(x, [request]).tolist()
        request.generated.append(tokens[-1])
    assert tokens == [4, 4, 5, 4, 0]  # 2.5, 1.5, then 0.5 against 1, 0.5 against 0, and -0.5 against 0 and 0


# ---------------------------------------------------------------- ranks, batches, slots

def random_requests(rng, count, vocab_size):
    requests = []
    for slot in range(count):
        pick = rng.choice
        params = dict(
            temperature=float(pick([0, 0.7, 1.0, 1.5])), top_k=int(pick([0, 0, 5, 20])),
            top_p=float(pick([1, 1, 0.9, 0.5])), min_p=float(pick([0, 0, 0.05])), seed=int(rng.integers(2**63)),
            min_tokens=int(pick([0, 0, 4])), repetition_penalty=float(pick([1, 1, 1.2])),
            presence_penalty=float(pick([0, 0, 0.5])), frequency_penalty=float(pick([0, 0, 0.25])),
            logprobs=pick([None, 0, 3]),
            logit_bias={int(t): float(pick([-2, 3])) for t in rng.integers(0, vocab_size, rng.integers(4))},
            bad_words=rng.integers(0, 6, (4, 2)).tolist() if rng.random() < 0.4 else [])
        requests.append(make_request(slot=slot, prompt=rng.integers(0, vocab_size, 5).tolist(), ends=(0, 1, 2),
                                     sample_index=int(rng.integers(3)), vocab_size=vocab_size, **params))
    return requests


def generate(comm, borders, vocab_size, count=12, steps=8):
    """Token ids and log-probabilities of a few steps of mixed requests, on one shard of the same logits."""
    rng = np.random.default_rng(5)
    requests = random_requests(rng, count, vocab_size)
    low, high = borders[comm.rank], borders[comm.rank + 1]
    sampler = Sampler(low, high, count, comm)
    admitted(sampler, *requests)
    for _ in range(steps):
        part = np.ascontiguousarray(logits_of(rng, count, vocab_size)[:, low:high])
        before = part.copy()
        tokens = sampler.sample(part, requests)
        assert tokens.dtype == np.int64
        np.testing.assert_array_equal(part, before)
        sampler.record_logprobs(part, requests, tokens.tolist())
        for request, token in zip(requests, tokens.tolist(), strict=True):
            request.generated.append(token)
    return [(request.generated, [(e.token_id, [t for t, _ in e.top]) for e in request.logprobs],
             [[e.logprob, *(v for _, v in e.top)] for e in request.logprobs]) for request in requests]


@pytest.mark.parametrize("borders", [[0, 20, 50], [0, 1, 33, 50], [0, 7, 7, 15, 20, 31, 40, 49, 50]],
                         ids=["2 ranks", "3 ranks", "8 ranks, one with nothing"])
def test_the_number_of_ranks_changes_nothing(borders):
    expected = generate(Communicator.single(), [0, 50], 50)
    results = run_threads(len(borders) - 1, lambda comm: generate(comm, borders, 50))
    assert all(result == results[0] for result in results)
    for (tokens, ids, values), (same_tokens, same_ids, close_values) in zip(expected, results[0], strict=True):
        assert (tokens, ids) == (same_tokens, same_ids)
        for a, b in zip(values, close_values, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)


def test_batch_slot_and_preemption_change_nothing():
    rng = np.random.default_rng(6)
    requests = random_requests(rng, 10, VOCAB)
    steps = logits_of(rng, 80).reshape(8, 10, VOCAB)
    expected = []
    for index, request in enumerate(requests):  # each alone, in slot 0
        one, sampler = dataclasses.replace(request, slot=0, generated=[]), alone(1)
        sampler.admit(one)
        for x in steps:
            one.generated += sampler.sample(x[index : index + 1], [one]).tolist()
        expected.append(one.generated)

    sampler, done = alone(4), set()
    while len(done) < 10:  # four at most at a time, in any slots and order, put out now and then
        running = [int(i) for i in rng.permutation([i for i in range(10) if i not in done])[:4]]
        for slot, i in zip(rng.permutation(4), running, strict=False):
            requests[i].slot = int(slot)
            sampler.admit(requests[i])
        for _ in range(3):
            batch = [i for i in running if len(requests[i].generated) < 8]
            if batch:
                x = np.stack([steps[len(requests[i].generated), i] for i in batch])
                for i, token in zip(batch, sampler.sample(x, [requests[i] for i in batch]).tolist(), strict=True):
                    requests[i].generated.append(token)
        done |= {i for i in running if len(requests[i].generated) == 8}
    assert [request.generated for request in requests] == expected


def test_samples_of_a_prompt_differ_and_equal_requests_do_not():
    sampler = alone()
    requests = admitted(sampler, *(make_request(slot=i, sample_index=i % 4) for i in range(8)))
    tokens = np.array([sampler.sample(np.zeros((8, VOCAB), np.float32), requests)])
    for request in requests:
        request.generated.append(9)
    tokens = np.concatenate([tokens, [sampler.sample(np.zeros((8, VOCAB), np.float32), requests)]])
    np.testing.assert_array_equal(tokens[:, :4], tokens[:, 4:])
    assert len({tuple(column) for column in tokens.T}) == 4 and (tokens[0] != tokens[1]).any()


def test_a_slot_forgets_its_last_request():
    sampler = alone(1)
    strict = make_request(temperature=0, logit_bias={5: -100}, bad_words=[[4]], presence_penalty=2.0, logprobs=2,
                          prompt=[3], repetition_penalty=2.0, generated=[3])
    x = np.array([[0, 0, 0, 3, 5, 6, *[0] * 44]], np.float32)
    for request, token, entries in ((strict, 0, 1), (make_request(temperature=0), 5, 0),
                                    (make_request(temperature=0, presence_penalty=2.0, bad_words=[[5]]), 4, 0),
                                    (make_request(temperature=0, presence_penalty=2.0, bad_words=[[5], [4]]), 3, 0)):
        sampler.admit(request)
        tokens = sampler.sample(x, [request])
        sampler.record_logprobs(x, [request], tokens)
        assert (tokens.tolist(), len(request.logprobs)) == ([token], entries)


# ---------------------------------------------------------------- log-probabilities

def test_logprobs_are_of_the_logits_before_all_changes():
    sampler = alone()
    requests = admitted(sampler, *(
        make_request(slot=i, temperature=t, logprobs=k, repetition_penalty=1.7, logit_bias={2: 50}, top_k=2)
        for i, (t, k) in enumerate([(0, 0), (0.3, 5), (1.5, None), (1.5, 20)])))
    x = logits_of(np.random.default_rng(8), 4)
    tokens = sampler.sample(x, requests).tolist()
    sampler.record_logprobs(x, requests, tokens)
    exact = x.astype(np.float64) - np.log(np.exp(x.astype(np.float64)).sum(axis=1, keepdims=True))
    assert tokens[0] == 2 != x[0].argmax()
    for i, request in enumerate(requests):
        if request.params.logprobs is None:
            assert request.logprobs == []
            continue
        [entry] = request.logprobs
        assert isinstance(entry, TokenLogprobs) and entry.token_id == tokens[i]
        assert entry.logprob == pytest.approx(exact[i, tokens[i]], abs=1e-6)
        order = np.argsort(-exact[i])[: request.params.logprobs]
        assert [token for token, _ in entry.top] == order.tolist()
        np.testing.assert_allclose([value for _, value in entry.top], exact[i, order], atol=1e-6)


def test_logprobs_of_a_vocabulary_smaller_than_k():
    sampler = alone(vocab_size=4)
    [request] = admitted(sampler, make_request(logprobs=9, ends=(), prompt=[1], vocab_size=4))
    sampler.record_logprobs(np.array([[0, 3, 2, 1]], np.float32), [request], [1])
    assert [token for token, _ in request.logprobs[0].top] == [1, 2, 3, 0]


def test_nothing_is_sent_for_logprobs_that_nobody_wants():
    sampler = alone()
    [request] = admitted(sampler, make_request())
    sampler._comm = None
    sampler.record_logprobs(np.zeros((1, VOCAB), np.float32), [request], [1])
    assert request.logprobs == []


# ---------------------------------------------------------------- odd input

def test_a_bad_row_is_an_error_on_every_rank():
    def body(comm):
        sampler = Sampler(25 * comm.rank, 25 * comm.rank + 25, 2, comm)
        requests = admitted(sampler, *(make_request(slot=i, presence_penalty=1.0) for i in range(2)))
        x = np.zeros((2, 25), np.float32)
        x[1, 3] = np.nan if comm.rank else 0
        with pytest.raises(CutpError, match="row 1 of the batch: the logits contain NaN"):
            sampler.sample(x, requests)

    run_threads(2, body)


def test_no_penalties_need_no_counts():
    sampler = alone(max_running=1024, vocab_size=1 << 18)  # a table would be 1 GB
    admitted(sampler, make_request(min_tokens=2, logit_bias={3: 1}))
    assert sampler._counts is None


def test_changed_logits_of_the_reference():
    """The reference itself, once by hand."""
    request = make_request(prompt=[1, 2], generated=[2, 3, 3], ends=(0,), min_tokens=4, bad_words=[[3, 3, 4]],
                           repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25,
                           logit_bias={5: 1.0, 1: 3}, vocab_size=7)
    expected = [-np.inf, 2.0, -2.0 - 0.75, 1.5 - 1.0, -np.inf, 2.0, 1.0]
    assert changed_logits([1, 1, -1, 3, 1, 1, 1], request) == expected
