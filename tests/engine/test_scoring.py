"""Scores, rolling perplexity and hidden states."""

import numpy as np
import pytest

from cutp import LLM, run_threads
from cutp.engine.windows import rolling_windows
from cutp.errors import RequestError

TEXT = "Once upon a time there was a king who had three daughters, and the youngest was the fairest of them all. "


@pytest.fixture(scope="module")
def llm():
    with LLM() as llm:
        yield llm


@pytest.mark.parametrize("window", (1, 2, 7, 64, 1000))
@pytest.mark.parametrize("prefix", (None, 99))
@pytest.mark.parametrize("length", (0, 1, 2, 63, 64, 65, 130))
def test_windows_predict_every_token_once_with_all_the_context_there_is(length, prefix, window):
    ids = list(range(1000, 1000 + length))
    whole = ids if prefix is None else [prefix, *ids]
    predicted = []
    for piece, first in rolling_windows(ids, prefix, window):
        assert 1 <= first < len(piece) <= window + 1
        end = whole.index(piece[-1]) + 1
        assert piece == whole[end - len(piece) : end]  # a run of the text
        assert len(piece) == window + 1 or piece[0] == whole[0]
        predicted += piece[first:]
    assert predicted == whole[1:]


def test_perplexity_of_a_short_text_is_its_score(llm):
    ids = llm.tokenize(TEXT, special_tokens=False)
    [rolled] = llm.perplexity([TEXT])
    [score] = llm.score([[llm.tokenizer.bos_token_id, *ids]])
    assert rolled.num_tokens == len(ids) and rolled.num_bytes == len(TEXT)
    np.testing.assert_allclose(rolled.logprob, score.logprob, rtol=1e-6)
    np.testing.assert_allclose(rolled.bits_per_byte, -score.logprob / np.log(2) / len(TEXT))
    np.testing.assert_allclose(rolled.perplexity, np.exp(-score.logprob / len(ids)))


@pytest.mark.parametrize("window", (5, 16, 40))
def test_rolling_windows_equal_scoring_each_window(llm, window):
    ids = llm.tokenize(TEXT * 4, special_tokens=False)
    [rolled] = llm.perplexity([ids], window=window)
    expected = 0.0
    for piece, first in rolling_windows(ids, llm.tokenizer.bos_token_id, window):
        [score] = llm.score([(piece[:first], piece[first:])])
        expected += score.logprob
    np.testing.assert_allclose(rolled.logprob, expected, rtol=1e-6)
    assert rolled.num_tokens == len(ids) and rolled.num_bytes is None and rolled.bits_per_byte is None


def test_text_longer_than_the_context(llm):
    [rolled] = llm.perplexity([TEXT * 60])
    assert rolled.num_tokens > llm.max_len and 1 < rolled.perplexity < 100


def test_empty_text(llm):
    [empty, other] = llm.perplexity(["", "a"])
    assert empty.num_tokens == 0 and empty.perplexity is None and empty.bits_per_byte is None
    assert other.num_tokens > 0


@pytest.mark.parametrize("window", (0, 1025, 1.5, True, "all"))
def test_bad_window(llm, window):
    with pytest.raises(RequestError, match="window must be a number of tokens from 1 to 1024"):
        llm.perplexity(["a"], window=window)


def test_pairs_score_the_continuation(llm):
    context, continuation = [1, 340, 497], [293, 263, 577]
    whole, pair, text = llm.score([context + continuation, (context, continuation), ("The king", " of the")])
    assert pair.token_ids == (293, 263, 577) and pair.context_token_ids == (1, 340, 497)
    np.testing.assert_allclose(pair.logprobs, whole.logprobs[3:], atol=1e-5)
    assert text.token_ids == (293, 263) and text.context_token_ids == (1, 340, 497)
    assert text.is_greedy and text.greedy == (True, True)
    np.testing.assert_allclose(text.logprobs, whole.logprobs[3:5], atol=1e-5)


def test_spaces_between_context_and_continuation_belong_to_the_continuation(llm):
    one, other = llm.score([("The king ", "of the"), ("The king", " of the")])
    assert one.token_ids == other.token_ids and one.context_token_ids == other.context_token_ids


def test_an_empty_context_is_the_prefix_token(llm):
    bos = llm.tokenizer.bos_token_id
    text, ids = llm.score([("", "The king"), ([], llm.tokenize("The king", special_tokens=False))])
    assert text.context_token_ids == ids.context_token_ids == (bos,) and text.token_ids == ids.token_ids
    [expected] = llm.score([[bos, *ids.token_ids]])
    np.testing.assert_allclose(text.logprob, expected.logprob, rtol=1e-6)


def test_a_continuation_that_is_not_greedy(llm):
    [score] = llm.score([("The king", " of elephants")])
    assert not score.is_greedy and score.greedy[0]


@pytest.mark.parametrize("pair", [("a", ""), ([1], []), ("a", [1]), ([1], [-1]), ([1], [4096])])
def test_bad_pairs(llm, pair):
    with pytest.raises(RequestError, match="prompt 1"):
        llm.score(["a", pair])


def test_shared_contexts_are_computed_once(llm):
    context = list(np.random.default_rng(3).integers(4, 4000, 200))
    before = llm.stats()
    outputs = llm.score([(context, [choice]) for choice in range(10, 14)])
    after = llm.stats()
    assert after["cached_tokens"] - before["cached_tokens"] == 3 * 192
    with LLM(prefix_cache=False) as other:
        expected = other.score([(context, [choice]) for choice in range(10, 14)])
    np.testing.assert_allclose([o.logprob for o in outputs], [e.logprob for e in expected], atol=1e-5)


def test_prompt_logprobs_equal_scores(llm):
    from cutp import SamplingParams

    ids = llm.tokenize(TEXT)
    [output] = llm.generate([ids], SamplingParams(max_tokens=2, temperature=0, prompt_logprobs=4))
    [score] = llm.score([ids])
    np.testing.assert_allclose([e.logprob for e in output.prompt_logprobs[1:]], score.logprobs[1:], atol=1e-5)
    for entry, token, greedy in zip(output.prompt_logprobs[1:], ids[1:], score.greedy[1:], strict=True):
        assert entry.token_id == token and len(entry.top) == 4
        assert (entry.top[0][0] == token) == greedy
    [plain] = llm.generate([ids], SamplingParams(max_tokens=2, temperature=0, prompt_logprobs=0))
    assert all(entry.top == () for entry in plain.prompt_logprobs[1:])


def test_hidden_states_in_chunks_and_pooled():
    prompts = [TEXT, "The king", [5]]
    with LLM() as llm, LLM(max_batch_tokens=7) as chunked:
        for one, other in zip(llm.hidden_states(prompts, layers=[0, 2, -1]),
                              chunked.hidden_states(prompts, layers=[0, 2, -1]), strict=True):
            assert one.layers == (0, 2, len(llm.model.layers))
            assert one.array.shape == (3, len(one.token_ids), 256) and one.array.dtype == np.float32
            np.testing.assert_allclose(one.array, other.array, atol=2e-4)
        whole = llm.hidden_states(prompts, layers=[1])
        for pool, reduce in (("last", lambda a: a[:, -1]), ("mean", lambda a: a.mean(axis=1))):
            for engine in (llm, chunked):
                for full, pooled in zip(whole, engine.hidden_states(prompts, layers=[1], pool=pool), strict=True):
                    np.testing.assert_allclose(pooled.array, reduce(full.array), atol=2e-4)


def test_layer_0_is_the_embedding(llm):
    [output] = llm.hidden_states([[7, 9]], layers=[0])
    table = llm.model.embed_tokens.shards[0].weight.value
    np.testing.assert_array_equal(output.array[0], table[[7, 9]])


def test_exported_by_dlpack(llm):
    [output] = llm.hidden_states(["The king"])
    np.testing.assert_array_equal(np.from_dlpack(output), output.numpy())


@pytest.mark.parametrize("pool", ("last", "mean"))
def test_embeddings(llm, pool):
    vectors = llm.embed(["The king", "The queen", "rain"], pool=pool)
    assert vectors.shape == (3, 256) and vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    raw = llm.embed(["The king", "The queen", "rain"], pool=pool, normalize=False)
    np.testing.assert_allclose(raw / np.linalg.norm(raw, axis=1, keepdims=True), vectors, rtol=1e-5)
    assert llm.embed([]).shape == (0, 256)


@pytest.mark.parametrize("options,message", [
    ({"layers": [9]}, r"layer 9 is not in 0 \.\. 4"), ({"layers": [-6]}, "layer -6"),
    ({"layers": []}, "layers is empty"), ({"layers": ["a"]}, "layer 'a'"),
    ({"pool": "max"}, "pool must be"), ({"gather": "some"}, "gather must be"),
])
def test_bad_hidden_state_options(llm, options, message):
    with pytest.raises(RequestError, match=message):
        llm.hidden_states(["a"], **options)


def test_token_ids_from_arrays_of_other_libraries(llm):
    import array

    ids = [1, 340, 497]

    class Exporter:
        def __init__(self, values):
            self._values = np.array(values)

        def __dlpack__(self, **options):
            return self._values.__dlpack__(**options)

        def __dlpack_device__(self):
            return self._values.__dlpack_device__()

    expected = llm.score([ids])[0].logprob
    for given in (Exporter(ids), array.array("i", ids), memoryview(np.array(ids, np.int16)), np.array(ids)):
        assert llm.score(given)[0].logprob == pytest.approx(expected, abs=1e-5)
        assert llm.score([given, given])[1].logprob == pytest.approx(expected, abs=1e-5)


def test_scores_on_ranks_and_replicas():
    pairs = [("The king", " of the"), TEXT, ("", "rain"), [1, 2, 3]]

    def rank_main(comm, tp):
        with LLM(comm=comm, tp=tp) as llm:
            return llm.score(pairs if comm.rank == 0 else None), llm.perplexity(pairs[1], window=30)

    [(expected, rolled)] = run_threads(1, rank_main, 1)
    for ranks, tp in ((2, 2), (3, 1)):
        results = run_threads(ranks, rank_main, tp, timeout=60)
        assert all(result == results[0] for result in results)
        for one, other in zip(results[0][0], expected, strict=True):
            assert one.token_ids == other.token_ids and one.greedy == other.greedy
            np.testing.assert_allclose(one.logprob, other.logprob, rtol=1e-5)
        np.testing.assert_allclose(results[0][1][0].logprob, rolled[0].logprob, rtol=1e-5)


def test_names_in_errors(llm):
    """Every method that takes several texts calls them by the names it is given."""
    for call in (llm.score, llm.perplexity, llm.hidden_states, llm.embed):
        with pytest.raises(RequestError, match="^line 7: token id 4096"):
            call([[5], [4096]], names=["line 6", "line 7"])
        with pytest.raises(RequestError, match="2 prompts were given 1 names"):
            call([[5], [6]], names=["line 6"])


def test_a_continuation_may_reach_one_token_beyond_the_context():
    ids = list(range(4, 70))
    with LLM(max_len=64, kv_tokens=64) as small, LLM() as whole:
        [score] = small.score([(ids[:2], ids[2:65])])
        [expected] = whole.score([(ids[:2], ids[2:65])])
        np.testing.assert_allclose(score.logprobs, expected.logprobs, atol=1e-5)
        with pytest.raises(RequestError, match="66 tokens, more than the 65"):
            small.score([(ids[:2], ids[2:])])
        with pytest.raises(RequestError, match="65 tokens, more than the 64"):
            small.score([ids[:65]])
