"""Lines become records: ids, prompts, parameters, seeds, and clear words for what is wrong."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cutp.batch.inputs import Line
from cutp.batch.records import JobDefaults, Record, key_of, make_record, read_identity, record_seed
from cutp.engine.sampling_params import SamplingParams
from cutp.errors import RequestError

DEFAULTS = JobDefaults({"max_tokens": 9, "temperature": 0.5}, False, 42)


def record(content, defaults=DEFAULTS, *, text=False, index=0):
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    line = Line("in.txt" if text else "in.jsonl", 7, data, text)
    return make_record(index, line, *read_identity(line), defaults)


def openai(body, url="/v1/completions", **fields):
    return record({"custom_id": "c", "method": "POST", "url": url, "body": body, **fields})


def chat(body):
    return openai(body, "/v1/chat/completions")


MESSAGES = [{"role": "user", "content": "hello"}]


def test_text_lines():
    found = record(b"one prompt\r\n", text=True)
    assert (found.id, found.kind, found.chat, found.prompt) == ("in.txt:7", "plain", False, "one prompt")
    assert (found.params.max_tokens, found.params.temperature) == (9, 0.5)
    assert found.params.seed == record_seed(42, "in.txt:7")


def test_text_as_user_messages():
    defaults = JobDefaults({}, True, 1)
    for found in (record(b"hello\n", defaults, text=True), record({"id": 1, "prompt": "hello"}, defaults),
                  record({"id": 1, "messages": MESSAGES}, defaults)):
        assert found.chat and found.prompt == MESSAGES
    assert record({"id": 1, "prompt": [1, 2]}, defaults).chat is False


def test_plain_lines():
    found = record({"id": 5, "prompt": "a", "temperature": 0, "stop": "x", "seed": 3, "max_tokens": None,
                    "metadata": {"any": "thing"}, "logit_bias": {"12": 5}})
    assert (found.id, found.prompt, found.chat) == (5, "a", False)
    assert found.params == SamplingParams(max_tokens=9, temperature=0, stop="x", seed=3, logit_bias={12: 5})
    assert record({"id": "5", "messages": MESSAGES}).prompt == MESSAGES
    assert record({"id": "5", "prompt": [4, 5]}).prompt == [4, 5]


def test_openai_lines():
    found = openai({"model": "m", "prompt": "a", "max_tokens": 3, "user": "u", "stream": False, "echo": False,
                    "logprobs": 2, "top_k": 4, "stop": ["a", "b"], "n": 2, "best_of": 1, "suffix": None})
    assert (found.id, found.kind, found.chat, found.prompt) == ("c", "text_completion", False, "a")
    assert found.params == SamplingParams(max_tokens=3, temperature=0.5, logprobs=2, top_k=4, stop=("a", "b"), n=2,
                                          seed=record_seed(42, "c"))
    found = chat({"messages": MESSAGES, "max_completion_tokens": 4, "logprobs": True, "top_logprobs": 3,
                  "response_format": {"type": "text"}, "tools": []})
    assert (found.kind, found.chat, found.prompt) == ("chat.completion", True, MESSAGES)
    assert (found.params.max_tokens, found.params.logprobs) == (4, 3)
    assert chat({"messages": MESSAGES, "logprobs": True}).params.logprobs == 0
    assert chat({"messages": MESSAGES, "logprobs": False, "top_logprobs": 0}).params.logprobs is None
    assert openai({"prompt": ["a"]}).prompt == "a" and openai({"prompt": [[1, 2]]}).prompt == [1, 2]


def test_parts_of_text_are_joined():
    content = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert chat({"messages": [{"role": "user", "content": content}]}).prompt == [{"role": "user", "content": "a\nb"}]


BAD_LINES = [
    (b"\xff{}", "is not UTF-8 at byte 0"), (b"{", "is not JSON"), (b"[1]", "is not a JSON object"),
    (b'{"id": NaN}', "is not JSON: NaN"), (b"[" * 100_000, "is not JSON"), (b'{"prompt": "a"}', "has no id"),
    (b'{"id": null, "prompt": "a"}', "has no id"), (b'{"id": "", "prompt": "a"}', 'has id ""'),
    (b'{"id": true, "prompt": "a"}', "has id true"), (b'{"id": 1.5, "prompt": "a"}', "has id 1.5"),
    (b'{"custom_id": 1, "id": "a"}', "has custom_id 1"), (b'{"id": ' + b"1" * 5000 + b"}", "is not JSON"),
]


@pytest.mark.parametrize(("data", "words"), BAD_LINES)
def test_lines_without_an_id(data, words):
    with pytest.raises(RequestError) as raised:
        record(data)
    assert f"line 7 of in.jsonl {words}" in str(raised.value)


def test_a_line_too_long():
    with pytest.raises(RequestError, match="line 7 of a is longer than"):
        read_identity(Line("a", 7, None, True))


BAD_RECORDS = [
    (lambda: record({"id": 1}), 'it needs either "prompt" or "messages"'),
    (lambda: record({"id": 1, "prompt": "a", "messages": MESSAGES}), "either"),
    (lambda: record({"id": 1, "prompt": ""}), "the prompt is empty"),
    (lambda: record({"id": 1, "prompt": []}), "the prompt is empty"),
    (lambda: record({"id": 1, "prompt": ["a", "b"]}), "one prompt a line"),
    (lambda: record({"id": 1, "prompt": [1, True]}), "neither text nor a list of token ids"),
    (lambda: record({"id": 1, "prompt": 5}), "neither text"),
    (lambda: record({"id": 1, "prompt": "a", "temprature": 1}), "temprature"),
    (lambda: record({"id": 1, "prompt": "a", "temperature": -1}), "temperature"),
    (lambda: record({"id": 1, "prompt": "a", "temperature": "hot"}), "temperature"),
    (lambda: record({"id": 1, "prompt": "a", "stop": 5}), "stop"),
    (lambda: record({"id": 1, "prompt": "a", "n": {}}), "n must be"),
    (lambda: record({"id": 1, "prompt": "a", "seed": -1}), "seed"),
    (lambda: record({"id": 1, "messages": []}), "messages must be a list that is not empty"),
    (lambda: record({"id": 1, "messages": "hello"}), "messages must be a list"),
    (lambda: record({"id": 1, "messages": [{"content": "a"}]}), 'messages[0] must be an object with a string "role"'),
    (lambda: record({"id": 1, "messages": [{"role": "user", "content": 5}]}), '"content" must be'),
    (lambda: chat({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}), "a part that is not text"),
    (lambda: openai({"prompt": "a"}, "/v1/embeddings"), 'url is "/v1/embeddings"'),
    (lambda: openai({"prompt": "a"}, None), "url is null"),
    (lambda: openai({"prompt": "a"}, method="GET"), 'method is "GET"'),
    (lambda: openai({"prompt": "a"}, temperature=1), 'unknown field "temperature"'),
    (lambda: openai(None), "no body that is an object"),
    (lambda: openai({}), "the body has no prompt"),
    (lambda: chat({"prompt": "a"}), "the body has no messages"),
    (lambda: chat({"messages": MESSAGES, "prompt": "a"}), '"prompt", which is not supported'),
    (lambda: openai({"prompt": "a", "stream": True}), "stream is true"),
    (lambda: openai({"prompt": "a", "stream": 0}), "stream is 0"),
    (lambda: openai({"prompt": "a", "echo": True}), "echo is true"),
    (lambda: openai({"prompt": "a", "best_of": 3}), "best_of is 3"),
    (lambda: openai({"prompt": "a", "suffix": "x"}), "suffix"),
    (lambda: chat({"messages": MESSAGES, "tools": [{}]}), "tools is"),
    (lambda: chat({"messages": MESSAGES, "response_format": {"type": "json_object"}}), "response_format"),
    (lambda: chat({"messages": MESSAGES, "reasoning_effort": "low"}), '"reasoning_effort", which is not supported'),
    (lambda: chat({"messages": MESSAGES, "max_tokens": 3, "max_completion_tokens": 4}), "differ"),
    (lambda: chat({"messages": MESSAGES, "logprobs": 3}), "logprobs is 3, not true or false"),
    (lambda: chat({"messages": MESSAGES, "top_logprobs": 3}), "top_logprobs needs logprobs"),
    (lambda: openai({"prompt": "a", "logprobs": True}), "logprobs must be an integer"),
]


@pytest.mark.parametrize(("make", "words"), BAD_RECORDS)
def test_records_that_cannot_be_served(make, words):
    with pytest.raises(RequestError) as raised:
        make()
    assert str(raised.value).startswith("line 7 of in.jsonl: ") and words in str(raised.value)


def test_seeds_depend_on_job_and_id_alone():
    seeds = {record_seed(job, identity) for job in (1, 2) for identity in ("1", 1, "a", "b")}
    assert len(seeds) == 8 and all(0 <= seed < 2**64 for seed in seeds)
    # A value that later versions must keep: results of a resumed job depend on it.
    assert record_seed(42, "a") == 15874446583168402643
    assert record({"id": "a", "prompt": "x"}, index=3).params.seed == record_seed(42, "a")


def test_keys():
    assert len({key_of(identity) for identity in ("1", 1, ["1", 1], "a\0", "a", "\ud800")}) == 6
    assert key_of("a") == key_of("a") and len(key_of("a")) == 16


def test_cost():
    assert record({"id": 1, "prompt": "x" * 40}).cost == 10 + 9
    assert record({"id": 1, "prompt": [1] * 40, "max_tokens": 5, "n": 3}).cost == 40 + 15
    assert record({"id": 1, "messages": [{"role": "user", "content": "x" * 400}]}).cost > 100


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
                        st.sampled_from(["id", "prompt", "messages", "custom_id", "body", "url", "role", "content",
                                         "stop", "logit_bias", "n", "logprobs", "seed", "tools", "stream"]), inner),
                    max_leaves=12))
def test_any_json_is_a_record_or_a_request_error(value):
    line = Line("in.jsonl", 7, json.dumps(value).encode(), False)
    try:
        found = make_record(0, line, *read_identity(line), DEFAULTS)
    except RequestError as error:
        assert "line 7 of in.jsonl" in str(error)
    else:
        assert Record.from_json(json.loads(json.dumps(found.to_json()))) == found
