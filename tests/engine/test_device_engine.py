"""`LLM(device="cuda")` against the CPU: emulated, and on a GPU with `-m gpu`."""

import numpy as np
import pytest

from cutp import LLM, SamplingParams
from cutp.engine.decode_graphs import batch_size
from cutp.errors import CutpError
from cutp.kv_cache.params import PAGE_SIZE
from cutp.nn.module import Weight
from cutp.ops.philox import gumbel_noise
from tests.wide_heads import VOCAB

# Two candidates whose scores differ by less may change places when a sum is formed in another order.
NEAR = 1e-4

_RNG = np.random.default_rng(1)
# Of one token, of some, of a page with and without a token more, of more than two pages.
PROMPTS = [_RNG.integers(0, VOCAB, length).tolist() for length in (1, 3, 20, PAGE_SIZE, PAGE_SIZE + 1, 150)]
STEM = _RNG.integers(0, VOCAB, 2 * PAGE_SIZE).tolist()

# Room for some of them only, in chunks; a batch of captured decoding has padding.
TIGHT = {"max_running": 5, "max_batch_tokens": 48, "kv_tokens": 6 * PAGE_SIZE}

GREEDY = SamplingParams(temperature=0, max_tokens=12, seed=0, ignore_eos=True)
SAMPLED = SamplingParams(temperature=0.9, top_k=40, top_p=0.9, min_p=0.01, max_tokens=12, seed=5)
KINDS = {
    "greedy": GREEDY,
    "temperature": SamplingParams(temperature=1.2, max_tokens=12, seed=3),
    "filters": SAMPLED,
    "samples": SamplingParams(temperature=1.0, top_p=0.8, max_tokens=6, seed=8, n=3),
    "penalties": SamplingParams(temperature=0.7, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.3,
                                max_tokens=12, seed=4),
    "rules": SamplingParams(temperature=0, logit_bias={5: 4.0, 9: -100.0}, bad_words=[[7], [5, 8]], min_tokens=6,
                            stop_token_ids=[5, 11], max_tokens=12, seed=0),
    "logprobs": SamplingParams(temperature=0.8, logprobs=3, prompt_logprobs=2, max_tokens=8, seed=6),
    "everything": SamplingParams(temperature=0.8, top_k=30, top_p=0.95, min_p=0.02, repetition_penalty=1.2, n=2,
                                 presence_penalty=-0.2, frequency_penalty=0.1, logit_bias={3: 2.0}, bad_words=[[4]],
                                 min_tokens=3, stop_token_ids=[6], logprobs=20, prompt_logprobs=20, max_tokens=10,
                                 seed=7),
}


def opened(path, device, dtype="float32", **options):
    return LLM(path, device=device, dtype=dtype, **options)


def assert_equal(got, expected, atol=NEAR):
    """Equal tokens, and log-probabilities as close as float32 sums are."""
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert one.token_ids == other.token_ids and one.finish_reason == other.finish_reason
        assert (one.index, one.sample_index, one.seed) == (other.index, other.sample_index, other.seed)
        assert_close(one.logprobs, other.logprobs, atol)
        assert_close(one.prompt_logprobs, other.prompt_logprobs, atol)


def assert_close(got, expected, atol):
    assert (got is None) == (expected is None)
    for one, other in zip(got or (), expected or (), strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert one.token_id == other.token_id and abs(one.logprob - other.logprob) <= atol
            np.testing.assert_allclose([v for _, v in one.top], [v for _, v in other.top], rtol=0, atol=atol)
            differ = [i for i, (a, b) in enumerate(zip(one.top, other.top, strict=True)) if a[0] != b[0]]
            for i in differ:  # only where a neighbour is as likely
                values = [value for _, value in other.top]
                near = any(abs(values[i] - value) <= 2 * atol for j, value in enumerate(values) if j != i)
                assert near or i + 1 == len(values)


def expected_of(path, prompts, params):
    with opened(path, "cpu") as llm:
        return llm.generate(prompts, params)


def arrays(scores):
    return np.concatenate([score.logprobs[1:] for score in scores if len(score.logprobs) > 1]).astype(np.float64)


# -- everything an engine does, in float32 ------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_equal_the_cpus(cuda, wide, kind):
    with opened(wide(), "cpu") as llm:
        expected = llm.generate(PROMPTS, KINDS[kind])
    with opened(wide(), "cuda", **TIGHT) as llm:
        assert_equal(llm.generate(PROMPTS, KINDS[kind]), expected)
        assert llm.memory()["cache_tokens_in_use"] == 0


@pytest.mark.parametrize("max_batch_tokens", [7, 512])
def test_requests_of_all_kinds_together(cuda, wide, max_batch_tokens):
    """Each in its own batch row, with neighbours of other kinds, in chunks and whole."""
    prompts = [*PROMPTS, [*STEM, 1, 2], [*STEM, 3]]
    params = list(KINDS.values())
    with opened(wide(), "cpu") as llm:
        expected = [output for prompt, each in zip(prompts, params, strict=True)
                    for output in llm.generate([prompt], each)]
    with opened(wide(), "cuda", **TIGHT | {"max_batch_tokens": max_batch_tokens}) as llm:
        got = llm.generate(prompts, params)
    for one, other in zip(got, expected, strict=True):
        assert one.token_ids == other.token_ids and one.finish_reason == other.finish_reason
        assert_close(one.logprobs, other.logprobs, NEAR)
        assert_close(one.prompt_logprobs, other.prompt_logprobs, NEAR)


def test_scores_and_hidden_states_equal_the_cpus(cuda, wide):
    def measured(llm):
        states = [llm.hidden_states(PROMPTS, layers=[0, 1, 2, -1], pool=pool) for pool in (None, "last", "mean")]
        return (llm.score(PROMPTS), llm.score([(PROMPTS[3], PROMPTS[2]), (PROMPTS[0], PROMPTS[5])]),
                [p.logprob for p in llm.perplexity(PROMPTS, window=50)],
                [[s.array for s in each] for each in states], llm.embed(PROMPTS))

    with opened(wide(), "cpu") as llm:
        scores, pairs, perplexities, states, vectors = measured(llm)
    with opened(wide(), "cuda", **TIGHT) as llm:
        got_scores, got_pairs, got_perplexities, got_states, got_vectors = measured(llm)
    for got, expected in ((got_scores, scores), (got_pairs, pairs)):
        for one, other in zip(got, expected, strict=True):
            assert one.is_greedy == other.is_greedy
            np.testing.assert_allclose(*(np.array([v for v in s.logprobs if v is not None]) for s in (one, other)),
                                       rtol=0, atol=NEAR)
    np.testing.assert_allclose(got_perplexities, perplexities, rtol=1e-5)
    for one, other in zip(got_states, states, strict=True):
        for a, b in zip(one, other, strict=True):
            assert a.shape == b.shape and type(a) is np.ndarray and a.dtype == np.float32
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)
    np.testing.assert_allclose(got_vectors, vectors, rtol=0, atol=1e-5)


# -- requests that come and go -------------------------------------------------------------------------


def random_requests(count, seed=0, long_share=0.1):
    """(prompt, params, step of arrival, step of cancellation or None); some prompts share long beginnings, and
    `long_share` of the outputs grow over several pages."""
    rng = np.random.default_rng(seed)
    requests = []
    for index in range(count):
        own = rng.integers(0, VOCAB, int(rng.integers(1, 45))).tolist()
        prompt = STEM[: int(rng.integers(30, len(STEM)))] + own if rng.random() < 0.3 else own
        longest = 310 - len(prompt) if rng.random() < long_share else 14
        params = {"max_tokens": int(rng.integers(1, longest)),
                  "seed": int(rng.integers(2**63)),
                  "temperature": float(rng.choice([0.0, 0.0, 0.7, 1.5])), "ignore_eos": bool(rng.random() < 0.5)}
        if rng.random() < 0.3:
            params |= {"top_k": int(rng.choice([0, 5, 50])), "top_p": float(rng.choice([0.6, 1.0])),
                       "min_p": float(rng.choice([0.0, 0.05]))}
        if rng.random() < 0.2:
            params |= {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": -0.2}
        if rng.random() < 0.2:
            params |= {"logit_bias": {int(rng.integers(VOCAB)): 3.0}, "bad_words": [[int(rng.integers(VOCAB))]],
                       "min_tokens": min(3, params["max_tokens"]), "stop_token_ids": [int(rng.integers(VOCAB))]}
        if rng.random() < 0.1:
            params |= {"logprobs": 2, "prompt_logprobs": 3}
        if rng.random() < 0.1 and params["temperature"]:
            params["n"] = 3
        arrival = index // 8 + int(rng.integers(4))
        requests.append((prompt, SamplingParams(**params), arrival,
                         arrival + int(rng.integers(12)) if rng.random() < 0.1 else None))
    return requests


def run_all(llm, requests):
    """{(index, sample): output}; requests are added and cancelled at their steps."""
    found, step, open_ = {}, 0, set()
    waiting = sorted(range(len(requests)), key=lambda index: -requests[index][2])
    while waiting or llm.has_unfinished:
        while waiting and requests[waiting[-1]][2] <= step:
            index = waiting.pop()
            llm.add_request(requests[index][0], requests[index][1], request_id=index)
            open_.add(index)
        for index in sorted(open_):
            if requests[index][3] is not None and requests[index][3] <= step:
                llm.cancel(index)
                open_.discard(index)
        for event in llm.step():
            if event.output is not None:
                found[event.index, event.sample_index] = event.output
                if all((event.index, i) in found for i in range(requests[event.index][1].n)):
                    open_.discard(event.index)
        step += 1
    assert llm.memory()["cache_tokens_in_use"] == 0
    return found


def count_ties(llm, found, alone, requests):
    """Holds `found` against each request alone; how many differ from the place of a near tie on."""
    ties = 0
    for index, outputs in enumerate(alone):
        for expected in outputs:
            output = found[index, expected.sample_index]
            if output.token_ids == expected.token_ids and output.finish_reason != "cancelled":
                assert output.finish_reason == expected.finish_reason
                assert_close(output.logprobs, expected.logprobs, NEAR)
                assert_close(output.prompt_logprobs, expected.prompt_logprobs, NEAR)
            elif output.token_ids != expected.token_ids[: len(output.token_ids)]:
                assert is_near_tie(llm, output, expected, requests[index][1]), (index, output, expected)
                ties += 1
            else:
                assert output.finish_reason == "cancelled"
    return ties


def is_near_tie(llm, output, expected, params):
    """Whether the first tokens that differ have scores within NEAR of each other, in a request with plain sampling."""
    at = next(i for i, (a, b) in enumerate(zip(output.token_ids, expected.token_ids, strict=False)) if a != b)
    if params.repetition_penalty or params.logit_bias or params.top_p or params.top_k or params.min_p:
        return False
    prefix, scores = [*expected.prompt_token_ids, *expected.token_ids[:at]], []
    for token in (output.token_ids[at], expected.token_ids[at]):
        value = llm.score([(prefix, [token])])[0].logprob
        if params.temperature:
            noise = gumbel_noise(np.uint64(expected.seed), expected.sample_index, len(prefix), [token])[0]
            value = value / params.temperature + noise
        scores.append(value)
    return abs(scores[0] - scores[1]) <= NEAR


def check_random_requests(path, count, seed=0, long_share=0.1, **options):
    requests = random_requests(count, seed, long_share)
    options = {"max_running": 16, "max_batch_tokens": 96, "kv_tokens": 6 * PAGE_SIZE} | options
    with opened(path, "cpu", prefix_cache=False) as llm:
        alone = [llm.generate([prompt], params) for prompt, params, *_ in requests]
        with opened(path, "cuda", **options) as device:
            found = run_all(device, requests)
            stats = device.stats()
        ties = count_ties(llm, found, alone, requests)
    print(f"{ties} of {count} requests differ from a near tie on; {stats}")
    assert ties <= max(1, count // 100)
    for counter in ("cached_tokens", "requests_cancelled", *(["preemptions"] if count >= 100 else [])):
        assert stats[counter] > 0, counter


def test_random_requests_equal_themselves_alone(cuda, wide):
    check_random_requests(wide(), 40, max_running=11)


def test_a_request_that_was_preempted_goes_on(cuda, wide):
    """With penalties, whose counts are made anew, and log-probabilities of its prompt."""
    params = SamplingParams(temperature=0.8, repetition_penalty=1.3, frequency_penalty=0.3, logprobs=1,
                            prompt_logprobs=1, max_tokens=80, seed=2, ignore_eos=True)
    prompts = [STEM[i : i + 60] for i in range(4)]
    with opened(wide(), "cpu") as llm:
        expected = llm.generate(prompts, params)
    with opened(wide(), "cuda", max_running=4, kv_tokens=7 * PAGE_SIZE) as llm:
        assert_equal(llm.generate(prompts, params), expected)
        assert llm.stats()["preemptions"] > 0


# -- graphs ----------------------------------------------------------------------------------------------


def graphs_of(llm):
    return llm._work.core.runner._graphs._graphs


def changing_batches(llm):
    """The results of requests that join and leave, so that steps are of 1 to 7 requests and pages are others'."""
    rng, found = np.random.default_rng(3), {}
    plan = {0: 3, 2: 1, 5: 3, 9: 2, 14: 1}  # step: requests that join
    step, index = 0, 0
    while llm.has_unfinished or step <= max(plan):
        for _ in range(plan.get(step, 0)):
            params = SamplingParams(temperature=(0.0, 0.9)[index % 2], top_k=(0, 20)[index % 3 == 0], seed=index,
                                    max_tokens=5 + 3 * (index % 4), ignore_eos=True)
            llm.add_request(rng.integers(0, VOCAB, 1 + 23 * (index % 3)).tolist(), params, request_id=index)
            index += 1
        for event in llm.step():
            if event.output is not None:
                found[event.index] = event.output.token_ids
        step += 1
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_graphs_give_what_single_launches_give(cuda, wide, dtype):
    options = {"max_running": 7, "max_batch_tokens": 64, "kv_tokens": 12 * PAGE_SIZE}
    with opened(wide(), "cuda", dtype, use_graphs=False, **options) as llm:
        eager = changing_batches(llm), llm.generate(PROMPTS, GREEDY), llm.score(PROMPTS)
        assert not graphs_of(llm)
    with opened(wide(), "cuda", dtype, **options) as llm:
        captured = changing_batches(llm), llm.generate(PROMPTS, GREEDY), llm.score(PROMPTS)
        kinds = set(graphs_of(llm))
        again = changing_batches(llm), llm.generate(PROMPTS, GREEDY), llm.score(PROMPTS)
        assert set(graphs_of(llm)) == kinds  # nothing new: all is replayed
    assert captured == eager and again == eager
    assert {size for size, _ in kinds} >= {1, 2, 4, 8} and len({kind for _, kind in kinds}) > 1
    with opened(wide(), "cpu", dtype, **options) as llm:
        if dtype == "float32":
            assert eager[0] == changing_batches(llm)


def test_batches_of_every_size(cuda, wide):
    """All requests alike get the same tokens in a batch of any size, padded or not."""
    prompts = [[i, i + 1] for i in range(18)]
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    with opened(wide(), "cpu") as llm:
        expected = [output.token_ids for output in llm.generate(prompts, params)]
    with opened(wide(), "cuda", max_running=18) as llm:
        for count in (1, 3, 5, 9, 16, 17, 18):
            assert [o.token_ids for o in llm.generate(prompts[:count], params)] == expected[:count]
        assert {size for size, _ in graphs_of(llm)} == {1, 4, 8, 16, 32}


def test_a_vocabulary_of_many_blocks(cuda, wide):
    """Rows whose logits several blocks of threads share, which leave their counters as they were."""
    path, params = wide(vocab_size=9001), [GREEDY, KINDS["temperature"], SAMPLED, KINDS["logprobs"]]
    expected = expected_of(path, PROMPTS[:4], params)
    with opened(path, "cuda", max_running=4) as llm:
        for _ in range(2):
            assert_equal(llm.generate(PROMPTS[:4], params), expected)
        assert_equal(llm.generate(PROMPTS[:2], params[1:3]), expected_of(path, PROMPTS[:2], params[1:3]))


def test_batch_size():
    assert [batch_size(n) for n in (1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33, 255, 256)] == \
        [1, 2, 4, 4, 8, 8, 16, 16, 32, 32, 48, 256, 256]


def test_what_cannot_be_replayed_is_not(cuda, wide):
    with opened(wide(), "cuda", max_running=2) as llm:
        for kind in ("penalties", "rules", "logprobs"):
            llm.generate(PROMPTS[:2], KINDS[kind])
        graphs = llm._work.core.runner._graphs
        assert graphs is None or not graphs._graphs
        llm.generate(PROMPTS[:2], SamplingParams(temperature=0, prompt_logprobs=1, max_tokens=4))
        assert graphs_of(llm)  # once the prompt is done, nothing is wanted of it


def test_memory_does_not_grow(cuda, wide):
    """What a run takes is taken once: the second takes nothing."""
    def work(llm):
        for kind in ("greedy", "filters", "everything"):
            llm.generate(PROMPTS[1:4], KINDS[kind])
        llm.score(PROMPTS[1:4])
        llm.hidden_states(PROMPTS[1:4], layers=[0, -1])

    with opened(wide(), "cuda", **TIGHT) as llm:
        runner = llm._work.core.runner
        work(llm)
        graphs, blocks = dict(graphs_of(llm)), runner.scratch.nbytes
        free = runner.memory.free_bytes()[0]
        work(llm)
        assert runner.scratch.nbytes == blocks and graphs_of(llm) == graphs
        # A GPU's driver takes some now and then.
        assert cuda == "gpu" or runner.memory.free_bytes()[0] == free


# -- 16 bits ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits_are_as_close_to_float32_as_the_cpus(cuda, wide, dtype):
    prompts = [*PROMPTS[1:], STEM, STEM[::-1]]
    with opened(wide(), "cpu") as llm:
        true = arrays(llm.score(prompts))
    with opened(wide(), "cpu", dtype) as llm:
        host = np.abs(arrays(llm.score(prompts)) - true)
        expected = llm.hidden_states(prompts, layers=[0, 1, 2])
    with opened(wide(), "cuda", dtype, **TIGHT) as llm:
        device = np.abs(arrays(llm.score(prompts)) - true)
        states = llm.hidden_states(prompts, layers=[0, 1, 2])
        tokens = [output.token_ids for output in llm.generate(prompts, GREEDY)]
        assert tokens == [output.token_ids for output in llm.generate(prompts, GREEDY)]
    print(f"{dtype}: mean and max difference from float32 on the device {device.mean():.4f} {device.max():.4f}, "
          f"on the CPU {host.mean():.4f} {host.max():.4f}")
    assert device.mean() <= 1.3 * host.mean() and device.max() <= 2 * host.max()
    for one, other in zip(states, expected, strict=True):
        np.testing.assert_array_equal(one.array[0], other.array[0])  # embeddings
        scale = np.abs(other.array).max()
        assert np.abs(one.array - other.array).mean() <= {"bfloat16": 4e-3, "float16": 5e-4}[dtype] * scale


# -- what layers may have ----------------------------------------------------------------------------------


def check_model(path, change=None, prompts=PROMPTS[1:], **options):
    """Scores, greedy and sampled tokens of a model equal the CPU's; change: called with its attention layers."""
    def measured(device, **options):
        with opened(path, device, **options) as llm:
            if change is not None:
                change(llm)
            return llm.score(prompts), llm.generate(prompts, [GREEDY, SAMPLED] * (len(prompts) // 2) + [GREEDY])

    scores, outputs = measured("cpu")
    got_scores, got_outputs = measured("cuda", **TIGHT | options)
    np.testing.assert_allclose(arrays(got_scores), arrays(scores), rtol=0, atol=3e-4)
    assert_equal(got_outputs, outputs)


ROPES = {
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "longrope": {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 64,
                 "short_factor": np.linspace(1, 1.6, 32).tolist(), "long_factor": np.linspace(1, 4, 32).tolist()},
    "llama3": {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 32},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
}


@pytest.mark.parametrize("kind", ROPES)
def test_rotary_embeddings(cuda, wide, kind):
    """Requests of different final lengths side by side: with some kinds each has a table of its own."""
    limit = {"max_position_embeddings": 64} if kind == "dynamic" else {}
    path = wide(rope_theta=1000.0, rope_scaling=ROPES[kind], **limit)
    check_model(path, max_len=320) if not limit else check_model(path)


def test_windows_sinks_and_caps(cuda, wide):
    def change(llm):
        first, second = (layer.self_attn.shards[0] for layer in llm.model.layers)
        first.window, second.softcap = 70, 3.0
        for layer in (first, second):
            layer.sinks = Weight((layer.n_heads,), np.float32)
            values = np.linspace(-1, 2, layer.n_heads, dtype=np.float32)
            if llm.on_gpu:
                memory = llm._work.core.runner.memory
                layer.sinks.data = memory.empty(values.shape, np.float32)
                memory.upload(layer.sinks.data, values)
                memory.synchronize()
            else:
                layer.sinks.data = values
        llm.model.logit_softcapping = 6.0
        if llm.on_gpu:  # windows are known when the engine is made
            _remake_runner(llm)

    check_model(wide(), change)


def _remake_runner(llm):
    core = llm._work.core
    old = core.runner
    core.runner = type(old)(llm.model, old.cache, old.comm, old.memory, old.stream, max_running=TIGHT["max_running"],
                            max_pages=5, multiprocessors=2)
    old.close()


# -- errors ------------------------------------------------------------------------------------------------


def test_the_engine_goes_on_after_an_error(cuda, wide, monkeypatch):
    with opened(wide(), "cuda", **TIGHT) as llm:
        expected = llm.generate(PROMPTS, GREEDY)
        runner = llm._work.core.runner
        steps = iter(range(1000))
        original = type(runner).run

        def broken(self, *args):
            if next(steps) == 2:
                raise CutpError("broken on purpose")
            return original(self, *args)

        monkeypatch.setattr(type(runner), "run", broken)
        with pytest.raises(CutpError, match="on purpose"):
            llm.generate(PROMPTS, GREEDY)
        assert [o.token_ids for o in llm.generate(PROMPTS, GREEDY)] == [o.token_ids for o in expected]


@pytest.mark.parametrize("kind", ["greedy", "filters", "penalties"])
def test_logits_that_are_no_numbers(cuda, wide, kind):
    with opened(wide(), "cuda", **TIGHT) as llm:
        expected = llm.generate(PROMPTS[:3], KINDS[kind])
        memory, weight = llm._work.core.runner.memory, llm.model.norm[0].weight.data
        good = memory.numpy(weight)
        memory.upload(weight, np.full_like(good, np.nan))
        memory.synchronize()
        for _ in range(2):
            with pytest.raises(CutpError, match="NaN"):
                llm.generate(PROMPTS[:3], KINDS[kind])
        memory.upload(weight, good)
        memory.synchronize()
        assert [o.token_ids for o in llm.generate(PROMPTS[:3], KINDS[kind])] == [o.token_ids for o in expected]
