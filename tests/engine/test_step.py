"""Requests that are added, stepped, cancelled; ranks that follow; replicas; and what ranks may disagree on."""

import time

import numpy as np
import pytest

from cutp import LLM, SamplingParams, run_threads
from cutp.engine.outputs import GenerationOutput
from cutp.engine.replicas import Assignment, split_replicas
from cutp.errors import ClosedError, ConfigError, InputMismatchError, PeerFailedError, RequestError

GREEDY = SamplingParams(temperature=0, max_tokens=8, seed=0)
GOOD = [[1, 2, 3], [4, 5], [500], [7] * 70]


@pytest.fixture
def llm(tiny):
    with LLM(tiny("mha")) as llm:
        yield llm


def run_steps(llm):
    """{(id, sample): (joined text of the events, output)} once nothing is unfinished."""
    texts, found = {}, {}
    while llm.has_unfinished:
        for index, text, output, sample in llm.step():
            texts[index, sample] = texts.get((index, sample), "") + text
            if output is not None:
                found[index, sample] = output
    return {place: (texts[place], output) for place, output in found.items()}


def test_added_requests_equal_generate(llm):
    expected = llm.generate(GOOD, GREEDY)
    ids = [llm.add_request(prompt, GREEDY) for prompt in GOOD]
    assert len(set(ids)) == len(GOOD) and llm.has_unfinished
    found = run_steps(llm)
    assert [found[i, 0][1].token_ids for i in ids] == [output.token_ids for output in expected]
    assert not llm.has_unfinished and llm.step() == []


def test_events_join_to_the_text():
    with LLM() as llm:
        llm.add_request("The king", SamplingParams(max_tokens=30, temperature=0.9, n=3, seed=1), request_id="a")
        found = run_steps(llm)
        assert sorted(found) == [("a", 0), ("a", 1), ("a", 2)]
        for text, output in found.values():
            assert text == output.text and output.index == "a"
        assert len({output.token_ids for _, output in found.values()}) == 3


def test_ids(llm):
    assert llm.add_request([1], GREEDY) == 0
    assert llm.add_request([1], GREEDY, request_id=1) == 1
    assert llm.add_request([1], GREEDY) == 2
    for bad, message in (("a", None), ("a", "an unfinished request has the id 'a'"), (1.5, "integer or a string"),
                         (True, "integer or a string")):
        if message is None:
            llm.add_request([1], GREEDY, request_id=bad)
        else:
            with pytest.raises(RequestError, match=message):
                llm.add_request([1], GREEDY, request_id=bad)
    run_steps(llm)
    llm.add_request([1], GREEDY, request_id="a")  # free again
    run_steps(llm)


def test_cancel(llm):
    long = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)
    expected = llm.generate([[1, 2]], long)[0].token_ids
    llm.add_request([1, 2], long, request_id="x")
    llm.add_request([3], long, request_id="y")
    for _ in range(5):
        llm.step()
    llm.cancel("x")
    with pytest.raises(RequestError, match="no unfinished request has the id 'z'"):
        llm.cancel("z")
    found = run_steps(llm)
    assert found["x", 0][1].finish_reason == "cancelled" and found["x", 0][1].token_ids == expected[:5]
    assert found["y", 0][1].finish_reason == "length" and len(found["y", 0][1].token_ids) == 50
    with pytest.raises(RequestError, match="no unfinished"):
        llm.cancel("x")
    llm.add_request([1, 2], long, request_id="x")
    llm.cancel("x")  # before its first step
    assert run_steps(llm)["x", 0][1].token_ids == ()
    assert llm.memory()["cache_tokens_in_use"] == 0


def test_cancel_gives_the_text_that_was_held_back():
    with LLM() as llm:
        params = SamplingParams(temperature=0, max_tokens=50, stop="zzzzzzzzzzzzzzz", ignore_eos=True)
        llm.add_request("Once upon a time", params, request_id=1)
        for _ in range(6):
            llm.step()
        llm.cancel(1)
        [event] = llm.step()
        assert event.text and event.output.text.endswith(event.text)


def test_other_calls_between_steps_do_not_disturb(llm):
    expected = llm.generate(GOOD, GREEDY)
    for key, prompt in enumerate(GOOD):
        llm.add_request(prompt, GREEDY, request_id=key)
    llm.step()
    assert llm.generate([[9]], GREEDY)[0].token_ids == llm.generate([[9]], GREEDY)[0].token_ids
    streamed = {event.index: event.output for event in llm.stream(GOOD, GREEDY) if event.output is not None}
    assert [streamed[i].token_ids for i in range(len(GOOD))] == [output.token_ids for output in expected]
    llm.score(GOOD)
    found = run_steps(llm)
    assert [found[i, 0][1].token_ids for i in range(len(GOOD))] == [output.token_ids for output in expected]


def test_samples_of_a_prompt_compute_it_once(tiny):
    prompt = list(np.random.default_rng(0).integers(0, 512, 100))
    with LLM(tiny("mha")) as llm:
        llm.generate([prompt], SamplingParams(n=8, max_tokens=4, seed=1))
        stats = llm.stats()
    # One whole page is shared; what follows it is each sample's own.
    assert stats["prompt_tokens"] == 100 + 7 * 36 and stats["cached_tokens"] == 7 * 64


def test_salts_keep_requests_apart(tiny):
    prompt = [3] * 100
    with LLM(tiny("mha")) as llm:
        for salt in ("a", "b", "a"):
            llm.add_request(prompt, GREEDY, cache_salt=salt)
            run_steps(llm)
            cached = llm.stats()["cached_tokens"]
        assert cached == 64
        with pytest.raises(RequestError, match="cache_salt must be a string"):
            llm.add_request(prompt, GREEDY, cache_salt=3)


def test_requests_without_a_seed_differ(llm):
    params = SamplingParams(temperature=1.0, max_tokens=16, ignore_eos=True)
    outputs = llm.generate([[1, 2]] * 4, params)
    assert len({output.token_ids for output in outputs}) == 4 and len({output.seed for output in outputs}) == 4


def test_output_survives_json(llm):
    import json

    params = SamplingParams(max_tokens=3, logprobs=2, prompt_logprobs=1, seed=2)
    for output in llm.generate([[1, 2, 3]], [params]):
        assert GenerationOutput.from_dict(json.loads(json.dumps(output.to_dict()))) == output
        assert output.prompt_logprobs[0] is None and len(output.prompt_logprobs) == 3


@pytest.mark.parametrize("ranks,tp", [(2, 2), (2, 1), (4, 2), (6, 2)])
def test_followers_do_what_rank_0_calls(tiny, ranks, tp):
    def everything(llm):
        found = [llm.generate(GOOD, GREEDY), llm.score(GOOD), llm.perplexity([[5] * 300], window=50)]
        with pytest.raises(RequestError):
            llm.generate([[99999]])
        for key in range(7):
            llm.add_request(GOOD[key % 4], GREEDY, request_id=key)
        llm.step()
        llm.cancel(6)
        found.append({place: output.token_ids for place, (_, output) in run_steps(llm).items()})
        stream = llm.stream(GOOD, GREEDY)
        found.append(next(stream).index)  # and left
        found.append([event for event in llm.stream(GOOD, GREEDY) if event.output])
        with pytest.raises(RequestError):
            llm.add_request([], GREEDY)
        found.append([output.array.tolist() for output in llm.hidden_states(GOOD, pool="mean")])
        return found

    def rank_main(comm):
        llm = LLM(tiny("mha"), comm=comm, tp=tp)
        if comm.rank == 0:
            with llm:
                return everything(llm)
        llm.follow()
        with pytest.raises(ClosedError):
            llm.generate(GOOD)
        llm.close()

    with LLM(tiny("mha")) as llm:
        expected = everything(llm)
    got = run_threads(ranks, rank_main, timeout=30)[0]
    assert got[0] == expected[0] and got[3] == expected[3] and got[5] == expected[5]
    for ours, theirs in zip(got[1], expected[1], strict=True):
        np.testing.assert_allclose(ours.logprobs[1:], theirs.logprobs[1:], atol=1e-5)
    np.testing.assert_allclose(got[2][0].logprob, expected[2][0].logprob, rtol=1e-5)
    np.testing.assert_allclose(got[6], expected[6], atol=1e-4)


def test_followers_wait_longer_than_the_deadline(tiny):
    def rank_main(comm):
        with LLM(tiny("mha"), comm=comm) as llm:
            wait = llm._calls.wait

            def wait_with_a_deadline():
                comm.timeout = 1.0  # of the one that waits for a call, and only there
                try:
                    return wait()
                finally:
                    comm.timeout = 30

            if comm.rank:
                llm._calls.wait = wait_with_a_deadline
                return llm.follow()
            time.sleep(1.5)
            return len(llm.generate(GOOD, GREEDY))

    assert run_threads(2, rank_main, timeout=30) == [4, None]


def test_followers_hear_of_a_failure(tiny):
    def rank_main(comm):
        with LLM(tiny("mha"), comm=comm) as llm:
            if comm.rank == 0:
                llm.generate(GOOD, GREEDY)
                raise ZeroDivisionError
            with pytest.raises(PeerFailedError, match="ZeroDivisionError"):
                llm.follow()
            raise PeerFailedError("seen")

    with pytest.raises(ZeroDivisionError):
        run_threads(2, rank_main, timeout=30)


def test_followers_are_released_when_rank_0_leaves_with_a_request_error(tiny):
    def rank_main(comm):
        with LLM(tiny("mha"), comm=comm) as llm:
            if comm.rank:
                return llm.follow()
            try:
                with llm:
                    llm.generate(GOOD, GREEDY)
                    llm.generate([[99999]])
            except RequestError:
                return "left"

    assert run_threads(3, rank_main, timeout=30) == ["left", None, None]


def test_different_methods_are_refused_on_all_ranks(tiny):
    def rank_main(comm):
        with LLM(tiny("mha"), comm=comm) as llm:
            with pytest.raises(InputMismatchError, match="rank 1 called score, rank 0 called generate"):
                llm.score(GOOD) if comm.rank == 1 else llm.generate(GOOD, GREEDY)
            return llm.generate(GOOD, GREEDY)

    first, *others = run_threads(3, rank_main, timeout=30)
    assert others == [first, first]


def test_rank_0_cannot_follow(tiny):
    def rank_main(comm):
        with LLM(tiny("mha"), comm=comm) as llm:
            if comm.rank == 0:
                with pytest.raises(InputMismatchError, match="rank 0 follows"):
                    llm._calls.wait()
                return llm.generate(GOOD, GREEDY)[0].token_ids
            return llm.follow()

    assert run_threads(2, rank_main, timeout=30)[0]


@pytest.mark.parametrize("ranks,tp", [(2, 1), (4, 2), (3, 1)])
@pytest.mark.parametrize("gather", ("all", "root", "none"))
def test_arrays_of_replicas(tiny, ranks, tp, gather):
    prompts = [[1, 2, 3], [4] * 50, [5], [6, 7], [8] * 9]

    def rank_main(comm):
        with LLM(tiny("mha"), comm=comm, tp=tp) as llm:
            return [output.array for output in llm.hidden_states(prompts, layers=[0, -1], gather=gather)]

    with LLM(tiny("mha")) as llm:
        expected = [output.array for output in llm.hidden_states(prompts, layers=[0, -1])]
    results = run_threads(ranks, rank_main, timeout=30)
    for rank, arrays in enumerate(results):
        for array, wanted in zip(arrays, expected, strict=True):
            if gather == "all" or (gather == "root" and rank == 0):
                np.testing.assert_allclose(array, wanted, atol=1e-4)
            elif gather == "root":
                assert array is None
    if gather == "none":
        for index, wanted in enumerate(expected):
            holders = [arrays[index] for arrays in results if arrays[index] is not None]
            assert len(holders) == tp
            np.testing.assert_allclose(holders[0], wanted, atol=1e-4)


def test_tensor_parallel_sizes_that_do_not_divide(tiny):
    def rank_main(comm):
        for bad in (2, 4, 0, True):
            with pytest.raises(ConfigError, match="there are 3 ranks"):
                LLM(tiny("mha"), comm=comm, tp=bad)
        return True

    assert run_threads(3, rank_main, timeout=30) == [True] * 3


def test_groups_stay_on_a_host():
    class Hosts:
        def __init__(self, comm, hosts):
            self._comm, self.hosts = comm, hosts

        def __getattr__(self, name):
            return getattr(self._comm, name)

    def rank_main(comm, hosts):
        replicas = split_replicas(Hosts(comm, hosts), 2)
        return replicas.index, replicas.group.rank, replicas.first_ranks

    found = run_threads(4, rank_main, ("a", "b", "a", "b"))
    assert found == [(0, 0, (0, 1)), (1, 0, (0, 1)), (0, 1, (0, 1)), (1, 1, (0, 1))]


def test_assignment_balances_and_forgets():
    deal = Assignment(3)
    assert [deal.place(i, work) for i, work in enumerate((5, 1, 1, 1, 1, 1))] == [0, 1, 2, 1, 2, 1]
    deal.done([0, 77])
    assert deal.place("x", 1) == 0


@pytest.mark.parametrize("option", [{"max_running": 0}, {"kv_tokens": -1}, {"max_batch_tokens": 1.5},
                                    {"prefix_cache": 1}, {"max_runing": 3}])
def test_bad_options(tiny, option):
    with pytest.raises(ConfigError, match=next(iter(option))):
        LLM(tiny("mha"), **option)
