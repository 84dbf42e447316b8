"""Parameters of a request: every one is honoured or refused by name; defaults; bad words as tokens; JSON."""

import dataclasses
import json

import pytest

from cutp.checkpoint.generation_config import GenerationDefaults
from cutp.checkpoint.tokenizer import Tokenizer
from cutp.engine.sampling_params import SamplingParams
from cutp.errors import InvalidTokenError, RequestError
from tests.cli.conftest import TALES

NAMES = [field.name for field in dataclasses.fields(SamplingParams)]

GOOD = [
    {"max_tokens": 1}, {"max_tokens": 2**31}, {"temperature": 0}, {"temperature": 1e30}, {"top_k": 0}, {"top_p": 1},
    {"top_k": 2**31 - 1}, {"top_p": 1e-9}, {"min_p": 0}, {"min_p": 1}, {"seed": 0}, {"seed": 2**64 - 1},
    {"stop": "end"}, {"stop": ["a", "b"]}, {"stop": ()}, {"stop_token_ids": [1, 2]}, {"stop_token_ids": range(3)},
    {"ignore_eos": True},
    {"logprobs": 0}, {"logprobs": 20}, {"prompt_logprobs": 0}, {"prompt_logprobs": 20}, {"n": 1}, {"n": 128},
    {"min_tokens": 0}, {"min_tokens": 5, "max_tokens": 5}, {"repetition_penalty": 0.01}, {"repetition_penalty": 100},
    {"presence_penalty": -2}, {"presence_penalty": 2}, {"frequency_penalty": -2}, {"frequency_penalty": 2.0},
    {"logit_bias": {}}, {"logit_bias": {3: 1, 4: -100.0}}, {"logit_bias": {"3": 100}}, {"logit_bias": [(3, 1.5)]},
    {"bad_words": "word"}, {"bad_words": ["word", [1, 2], "\n"]}, {"bad_words": [[0]]}, {"n": 2, "temperature": 0.1},
]
BAD = [
    ({"max_tokens": 0}, "max_tokens", "0"), ({"max_tokens": 2**31 + 1}, "max_tokens", "2147483649"),
    ({"max_tokens": True}, "max_tokens", "True"), ({"max_tokens": 2.0}, "max_tokens", "2.0"),
    ({"temperature": -0.1}, "temperature", "-0.1"), ({"temperature": float("nan")}, "temperature", "nan"),
    ({"temperature": 1e31}, "temperature", "1e+31"), ({"temperature": 10**400}, "temperature", "1000"),
    ({"temperature": 10**5000}, "temperature", "thousands of digits"), ({"temperature": "1"}, "temperature", "'1'"),
    ({"top_k": -1}, "top_k", "-1"), ({"top_k": 2**31}, "top_k", str(2**31)), ({"top_p": 0}, "top_p", "above 0"),
    ({"top_p": 1.01}, "top_p", "1.01"), ({"min_p": -0.01}, "min_p", "-0.01"), ({"min_p": 1.01}, "min_p", "1.01"),
    ({"seed": -1}, "seed", "-1"), ({"seed": 2**64}, "seed", str(2**64)),
    ({"stop": 5}, "stop", "5"), ({"stop": [""]}, "stop", "''"), ({"stop": [b"a"]}, "stop", "b'a'"),
    ({"stop": b"a"}, "stop", "b'a'"), ({"stop": {"a": 1}}, "stop", "{'a': 1}"), ({"stop": None}, "stop", "None"),
    ({"stop": ["a\ud800"]}, "stop", "ud800"),
    ({"stop_token_ids": 5}, "stop_token_ids", "5"), ({"stop_token_ids": [-1]}, "stop_token_ids", "-1"),
    ({"stop_token_ids": ["1"]}, "stop_token_ids", "'1'"), ({"stop_token_ids": None}, "stop_token_ids", "None"),
    ({"ignore_eos": 1}, "ignore_eos", "1"), ({"ignore_eos": None}, "ignore_eos", "None"),
    ({"logprobs": 21}, "logprobs", "21"), ({"logprobs": True}, "logprobs", "True"),
    ({"prompt_logprobs": -1}, "prompt_logprobs", "-1"), ({"prompt_logprobs": 21}, "prompt_logprobs", "21"),
    ({"n": 0}, "n must", "0"), ({"n": 129}, "n must", "129"), ({"n": None}, "n must", "None"),
    ({"n": 2, "temperature": 0}, "n is 2", "temperature 0"),
    ({"min_tokens": -1}, "min_tokens", "-1"), ({"min_tokens": 6, "max_tokens": 5}, "min_tokens is 6", "max_tokens"),
    ({"repetition_penalty": 0}, "repetition_penalty", "0"), ({"repetition_penalty": 101}, "repetition_penalty", "101"),
    ({"presence_penalty": 2.1}, "presence_penalty", "2.1"), ({"presence_penalty": None}, "presence_penalty", "None"),
    ({"frequency_penalty": -2.1}, "frequency_penalty", "-2.1"),
    ({"frequency_penalty": None}, "frequency_penalty", "None"),
    ({"frequency_penalty": float("inf")}, "frequency_penalty", "inf"),
    ({"logit_bias": {1: 100.5}}, "logit_bias of token 1", "100.5"), ({"logit_bias": {1: None}}, "logit_bias", "None"),
    ({"logit_bias": {1: float("nan")}}, "logit_bias of token 1", "nan"), ({"logit_bias": {-1: 1}}, "logit_bias", "-1"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "'x'"), ({"logit_bias": 5}, "logit_bias", "5"),
    ({"logit_bias": [1, 2]}, "logit_bias", "(1, 2)"),
    ({"logit_bias": {1: 1, "1": 2}}, "logit_bias", "each token id once"),
    ({"logit_bias": None}, "logit_bias", "None"), ({"logit_bias": {True: 1}}, "logit_bias", "True"),
    ({"bad_words": 5}, "bad_words", "5"), ({"bad_words": [""]}, "bad_words", "''"),
    ({"bad_words": ["  "]}, "bad_words", "'  '"),
    ({"bad_words": [[]]}, "bad_words", "()"), ({"bad_words": [[1, -1]]}, "bad_words", "-1"),
    ({"bad_words": [5]}, "bad_words", "5"), ({"bad_words": [["a"]]}, "bad_words", "'a'"),
    ({"bad_words": ["\udfff"]}, "bad_words", "udfff"), ({"bad_words": None}, "bad_words", "None"),
]  # fmt: skip


@pytest.mark.parametrize("params", GOOD, ids=str)
def test_good(params):
    SamplingParams(**params).check()


@pytest.mark.parametrize(("params", "name", "part"), BAD, ids=[f"{b[1]} {b[2]}" for b in BAD])
def test_bad(params, name, part):
    with pytest.raises(RequestError) as info:
        SamplingParams(**params).check()
    message = str(info.value)
    assert name in message and part in message and "\n" not in message and len(message) < 250


def test_every_parameter_has_a_bad_value_here():
    assert {name for params, *_ in BAD for name in params} == set(NAMES)


# ---------------------------------------------------------------- JSON

@pytest.mark.parametrize("params", GOOD, ids=str)
def test_json_round_trip(params):
    params = SamplingParams(**params)
    assert SamplingParams.from_dict(json.loads(json.dumps(params.to_dict()))) == params
    assert hash(params) == hash(SamplingParams.from_dict(params.to_dict()))


def test_equal_however_they_are_written():
    assert SamplingParams(stop="a", logit_bias={"7": 1, 3: 2}, bad_words="x", stop_token_ids=iter([4])) == \
        SamplingParams(stop=["a"], logit_bias=[[3, 2], [7, 1]], bad_words=("x",), stop_token_ids=(4,))
    # The order of a set differs from process to process.
    assert SamplingParams(stop={"b", "a", "c"}).stop == ("a", "b", "c")


@pytest.mark.parametrize(("names", "message"), [(["beam_width"], "parameter beam_width"),
                                                (["top_n", "best_of"], "parameters best_of, top_n")])
def test_unknown_names(names, message):
    with pytest.raises(RequestError, match=f"unknown sampling {message}") as info:
        SamplingParams.from_dict({"top_k": 3, **dict.fromkeys(names, 1)})
    assert info.value.hint == "the known ones are " + ", ".join(NAMES)


# ---------------------------------------------------------------- defaults

def test_defaults_without_a_generation_config():
    params = SamplingParams().with_defaults(GenerationDefaults())
    assert params == SamplingParams(max_tokens=128, min_tokens=0, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0,
                                    repetition_penalty=1.0)
    params.check()


def test_the_checkpoint_s_defaults_fill_in_what_is_not_given():
    defaults = GenerationDefaults(temperature=0.6, top_k=20, top_p=0.9, min_p=0.05, max_new_tokens=64, min_new_tokens=4,
                                  repetition_penalty=1.05, eos_token_ids=(2,))
    filled = SamplingParams().with_defaults(defaults)
    assert filled == SamplingParams(max_tokens=64, min_tokens=4, temperature=0.6, top_k=20, top_p=0.9, min_p=0.05,
                                    repetition_penalty=1.05)
    given = SamplingParams(max_tokens=9, min_tokens=0, temperature=0, top_k=0, top_p=1, min_p=0, repetition_penalty=1)
    assert given.with_defaults(defaults) == given
    assert SamplingParams().with_defaults(GenerationDefaults(do_sample=False, temperature=0.6)).temperature == 0
    assert SamplingParams(temperature=0.5).with_defaults(GenerationDefaults(do_sample=False)).temperature == 0.5
    assert SamplingParams().with_defaults(GenerationDefaults(top_p=0.0)).top_p == 1  # older files write 0 for "off"
    assert SamplingParams(max_tokens=3).with_defaults(defaults).min_tokens == 3  # the default gives way


# ---------------------------------------------------------------- resolved

@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(TALES)


def resolve(tokenizer=None, vocab_size=1000, eos=(2,), defaults=None, **params):
    params = SamplingParams(**params)
    params.check()
    return params.with_defaults(defaults or GenerationDefaults()).resolved(tokenizer, vocab_size, eos)


def test_bad_words_are_forbidden_at_the_start_and_after_a_space(tokenizer):
    for given in ("king", " king"):
        found = resolve(tokenizer, 10**6, bad_words=[given, (5, 6), (5, 6)]).bad_words
        assert found == (tuple(tokenizer.encode("king", add_special_tokens=False)),
                         tuple(tokenizer.encode(" king", add_special_tokens=False)), (5, 6))
    assert resolve(tokenizer, 10**6, bad_words="\n").bad_words[0] == tuple(
        tokenizer.encode("\n", add_special_tokens=False))


def test_text_needs_a_tokenizer(tokenizer):
    for params, hint in (({"stop": "x"}, "stop_token_ids"), ({"bad_words": "x"}, "token ids")):
        with pytest.raises(RequestError, match="no tokenizer.json") as info:
            resolve(**params)
        assert hint in info.value.hint and next(iter(params)).split("_")[0] in info.value.message
        resolve(tokenizer, 10**6, **params)
    resolve(bad_words=[[1]], stop_token_ids=[1])


@pytest.mark.parametrize("params", [{"stop_token_ids": [3, 10]}, {"logit_bias": {10: 1}},
                                    {"bad_words": [[1], [2, 10]]}])
def test_ids_outside_the_vocabulary(params):
    resolve(vocab_size=11, **params)
    with pytest.raises(InvalidTokenError, match=f"{next(iter(params))}: token id 10 is not in 0 .. 9"):
        resolve(vocab_size=10, **params)


def test_defaults_that_contradict():
    with pytest.raises(RequestError, match="min_tokens is 200.*128"):
        resolve(min_tokens=200)
    with pytest.raises(RequestError, match="n is 2.*temperature 0"):
        resolve(n=2, defaults=GenerationDefaults(do_sample=False))
    with pytest.raises(RequestError, match="repetition_penalty"):
        resolve(defaults=GenerationDefaults(repetition_penalty=1e9))


def test_a_token_must_be_left():
    words = [[3, i] for i in range(9)]
    resolve(vocab_size=10, bad_words=words)
    resolve(vocab_size=10, bad_words=words, stop_token_ids=[9], min_tokens=0)
    resolve(vocab_size=10, bad_words=words, eos=(9,), ignore_eos=True, min_tokens=1)
    for params in ({"bad_words": [*words, [9]]}, {"bad_words": words, "stop_token_ids": [9], "min_tokens": 1},
                   {"bad_words": words, "eos": (9,), "min_tokens": 1}):
        with pytest.raises(RequestError, match="leave no token"):
            resolve(vocab_size=10, **params)


def test_end_token_ids():
    assert SamplingParams(stop_token_ids=[5]).end_token_ids((2, 3)) == {2, 3, 5}
    assert SamplingParams(stop_token_ids=[5, 2], ignore_eos=True).end_token_ids((2, 3)) == {2, 5}
