"""Bad requests, abandoned streams and closed objects: each has its error, and the engine goes on unharmed."""

import numpy as np
import pytest

from cutp import LLM, SamplingParams, run_threads
from cutp.errors import ClosedError, InputMismatchError, InvalidTokenError, PromptTooLongError, RequestError

GREEDY = SamplingParams(temperature=0, max_tokens=8)
GOOD = [[1, 2, 3], [4, 5], [500]]

# name -> (prompts, params, error)
BAD = {
    "token id": ([[1, 2], [512]], GREEDY, InvalidTokenError),
    "negative token id": ([[-1]], GREEDY, InvalidTokenError),
    "too long": ([[1], [5] * 129], GREEDY, PromptTooLongError),
    "empty": ([[1], []], GREEDY, RequestError),
    "no array of ids": ([[1, "a"]], GREEDY, RequestError),
    "floats": ([[1.0, 2.0]], GREEDY, RequestError),
    "booleans": ([True, False], GREEDY, RequestError),
    "a number": (5, GREEDY, RequestError),
    "two dimensions": (np.zeros((2, 2, 2), int), GREEDY, RequestError),
    "beyond 64 bits": ([[2**70]], GREEDY, RequestError),
    "text without a tokenizer": ("text", GREEDY, RequestError),
    "bytes": (b"text", GREEDY, RequestError),
    "temperature": (GOOD, SamplingParams(temperature=-1), RequestError),
    "temperature NaN": (GOOD, SamplingParams(temperature=float("nan")), RequestError),
    "temperature beyond floats": (GOOD, SamplingParams(temperature=10**400), RequestError),
    "temperature a string": (GOOD, SamplingParams(temperature="1"), RequestError),
    "top_p": (GOOD, SamplingParams(top_p=0), RequestError),
    "top_k": (GOOD, SamplingParams(top_k=-1), RequestError),
    "top_k a float": (GOOD, SamplingParams(top_k=1.0), RequestError),
    "seed": (GOOD, SamplingParams(seed=2**64), RequestError),
    "seed of NumPy": (GOOD, SamplingParams(seed=np.int64(3)), RequestError),
    "max_tokens": (GOOD, SamplingParams(max_tokens=0), RequestError),
    "logprobs": (GOOD, SamplingParams(logprobs=21), RequestError),
    "stop without a tokenizer": (GOOD, SamplingParams(stop="a"), RequestError),
    "stop of bytes": (GOOD, SamplingParams(stop=(b"a",)), RequestError),
    "number of params": (GOOD, [GREEDY] * 2, RequestError),
    "params a dict": (GOOD, {"temperature": 0}, RequestError),
    "one bad of many": (GOOD, [GREEDY, GREEDY, SamplingParams(top_p=2)], RequestError),
}


def fails(error, call, *args):
    """The message of the error, which must be of exactly that kind."""
    with pytest.raises(RequestError) as caught:
        call(*args)
    assert type(caught.value) is error, repr(caught.value)
    return str(caught.value)


@pytest.fixture
def llm(tiny):
    with LLM(tiny("mha")) as llm:
        yield llm


def tokens(outputs):
    return [output.token_ids for output in outputs]


def test_bad_requests_leave_results_unchanged(llm):
    expected, scores = tokens(llm.generate(GOOD, GREEDY)), llm.score(GOOD)
    names = list(BAD)
    for i in range(50):
        prompts, params, error = BAD[names[i % len(names)]]
        fails(error, llm.generate, prompts, params)
        if params is GREEDY:
            fails(error, llm.score, prompts)
        fails(RequestError, llm.chat, [{"role": "user", "content": "a"}])
        assert tokens(llm.generate(GOOD, GREEDY)) == expected
        assert llm.memory()["cache_tokens_in_use"] == 0 and not llm.stats()["running"]
    assert llm.score(GOOD) == scores


def test_a_thousand_bad_requests_between_good_ones(llm):
    """Added requests go on step by step while bad ones are refused around them."""
    expected = tokens(llm.generate(GOOD, GREEDY))
    bad = [(prompts, params) for prompts, params, _ in BAD.values()]
    refused, found = 0, {}
    while refused < 1000:
        for key, prompt in enumerate(GOOD):
            llm.add_request(prompt, GREEDY, request_id=key)
        while llm.has_unfinished:
            prompts, params = bad[refused % len(bad)]
            for call in (llm.generate, llm.stream):
                with pytest.raises(RequestError):
                    call(prompts, params)
                refused += 1
            found.update({event.index: event.output.token_ids for event in llm.step() if event.output})
        assert [found.pop(key) for key in range(len(GOOD))] == expected
    assert llm.memory()["cache_tokens_in_use"] == 0


@pytest.mark.parametrize("n", [2, 3])
def test_bad_requests_are_refused_on_every_rank(tiny, n):
    def rank_main(comm):
        said = []
        with LLM(tiny("mha"), comm=comm) as llm:
            expected = tokens(llm.generate(GOOD, GREEDY))
            for prompts, params, error in BAD.values():
                said.append(fails(error, llm.generate, prompts, params))
                said.append(fails(error, llm.generate, *((prompts, params) if comm.rank == 0 else ())))
                given = GOOD if comm.rank == 0 else None
                assert tokens(llm.generate(given, GREEDY)) == expected
            return said

    results = run_threads(n, rank_main, timeout=60)
    assert all(said == results[0] for said in results)


def test_none_on_other_ranks(tiny):
    def rank_main(comm):
        with LLM(tiny("mha"), comm=comm) as llm:
            args = (GOOD, SamplingParams(temperature=1.3, max_tokens=8)) if comm.rank == 0 else ()
            return llm.generate(*args), llm.score(GOOD if comm.rank == 0 else None)

    first, *others = run_threads(3, rank_main, timeout=60)
    assert others == [first, first] and len(first[0]) == 3


@pytest.mark.parametrize("culprit", [0, 1, 2])
def test_inputs_that_differ(tiny, culprit):
    def rank_main(comm):
        odd = comm.rank == culprit
        with LLM(tiny("mha"), comm=comm) as llm:
            expected = tokens(llm.generate(GOOD, GREEDY))
            said = [
                fails(InputMismatchError, llm.generate, [[1, 2, 4]] if odd else [[1, 2, 3]], GREEDY),
                fails(InputMismatchError, llm.generate, GOOD, SamplingParams(seed=1 if odd else 2)),
                fails(InputMismatchError, llm.score, [[1]] if odd else [[1], [2]]),
            ]
            if culprit == 0:
                said.append(fails(InputMismatchError, llm.generate, None if odd else GOOD))
            assert tokens(llm.generate(GOOD, GREEDY)) == expected
            return said

    results = run_threads(3, rank_main, timeout=60)
    assert all(said == results[0] for said in results)
    assert f"rank {culprit or 1} passed another input than rank 0" in results[0][0]


def test_closed(tiny):
    with LLM(tiny("mha")) as llm:
        stream = llm.stream(GOOD, GREEDY)
        next(stream)
    for call in (llm.generate, llm.score, llm.chat, llm.stream):
        with pytest.raises(ClosedError):
            call(GOOD)
    assert list(stream) == []
    llm.close()


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("keep", [True, False])
def test_stream_left_half_way(tiny, n, keep):
    def rank_main(comm):
        with LLM(tiny("mha"), comm=comm) as llm:
            expected = llm.generate(GOOD, GREEDY)
            for steps in (0, 1, 5):
                stream = llm.stream([[9, 8, 7], [6]], SamplingParams(temperature=0, max_tokens=20))
                for _ in range(steps):
                    next(stream)
                if not keep:
                    del stream
                assert tokens(llm.generate(GOOD, GREEDY)) == tokens(expected)
                assert llm.memory()["cache_tokens_in_use"] == 0
                if keep:
                    # Its requests are gone; it does not mix with others.
                    assert list(stream) == []
            return True

    assert run_threads(n, rank_main, timeout=60) == [True] * n


def test_exception_inside_a_stream_loop(llm):
    expected = tokens(llm.generate(GOOD, GREEDY))
    with pytest.raises(ZeroDivisionError):
        for _ in llm.stream(GOOD, GREEDY):
            raise ZeroDivisionError
    assert tokens(llm.generate(GOOD, GREEDY)) == expected


def test_no_prompts(llm):
    assert llm.generate([]) == [] and llm.score([]) == []
