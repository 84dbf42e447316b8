"""Result lines: OpenAI's for OpenAI lines, plain ones else."""

import json
import math

from cutp.batch.inputs import Line
from cutp.batch.records import Record, key_of
from cutp.batch.results import ResultWriter, error_line
from cutp.engine.outputs import GenerationOutput, TokenLogprobs
from cutp.engine.sampling_params import SamplingParams
from cutp.errors import PromptTooLongError, RequestError

WRITER = ResultWriter("the model", 1700000000, lambda token: f"<{token}>")
LOGPROBS = (TokenLogprobs(5, -0.5, ((5, -0.5), (6, -1.0))), TokenLogprobs(77, -math.inf, ((1, -2.0),)))


def record(kind, identity="r1"):
    return Record(0, identity, kind, kind == "chat.completion", "p", SamplingParams(), "line 1 of a")


def output(sample=0, text="hi", logprobs=None, prompt_logprobs=None):
    return GenerationOutput(0, "p", (1, 2, 3), (5, 77), text, "stop", 12, logprobs, sample, prompt_logprobs)


def test_plain():
    assert WRITER.line(record("plain", 7), [output()]) == {
        "id": 7, "text": "hi", "finish_reason": "stop", "seed": 12,
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}}
    line = WRITER.line(record("plain"), [output(text=None, logprobs=LOGPROBS, prompt_logprobs=(None, LOGPROBS[0]))])
    assert line["token_ids"] == [5, 77] and line["text"] is None
    assert line["logprobs"][1] == {"token_id": 77, "logprob": -9999.0, "top": [[1, -2.0]]}
    assert line["prompt_logprobs"] == [None, {"token_id": 5, "logprob": -0.5, "top": [[5, -0.5], [6, -1.0]]}]
    line = WRITER.line(record("plain"), [output(0, "a"), output(1, "b")])
    assert [choice["text"] for choice in line["choices"]] == ["a", "b"] and "text" not in line
    assert line["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}


def test_completion():
    line = WRITER.line(record("text_completion"), [output(0, "a", LOGPROBS), output(1, "b", ())])
    name = key_of("r1").hex()
    assert {k: v for k, v in line.items() if k != "response"} == {
        "id": f"batch_req_{name}", "custom_id": "r1", "error": None}
    assert line["response"]["status_code"] == 200 and line["response"]["request_id"] == name
    body = line["response"]["body"]
    assert {k: v for k, v in body.items() if k != "choices"} == {
        "id": f"cmpl-{name}", "object": "text_completion", "created": 1700000000, "model": "the model",
        "usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}}
    assert body["choices"][0] == {
        "index": 0, "text": "a", "finish_reason": "stop", "seed": 12,
        "logprobs": {"tokens": ["<5>", "<77>"], "token_logprobs": [-0.5, -9999.0], "text_offset": [0, 3],
                     "top_logprobs": [{"<5>": -0.5, "<6>": -1.0}, {"<1>": -2.0}]}}
    assert body["choices"][1]["index"] == 1 and body["choices"][1]["logprobs"]["text_offset"] == []


def test_chat():
    body = WRITER.line(record("chat.completion"), [output(0, "ä", LOGPROBS)])["response"]["body"]
    assert body["object"] == "chat.completion" and body["id"].startswith("chatcmpl-")
    [choice] = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "ä"} and choice["finish_reason"] == "stop"
    assert choice["logprobs"]["content"][0] == {
        "token": "<5>", "logprob": -0.5, "bytes": [60, 53, 62],
        "top_logprobs": [{"token": "<5>", "logprob": -0.5, "bytes": [60, 53, 62]},
                         {"token": "<6>", "logprob": -1.0, "bytes": [60, 54, 62]}]}
    assert WRITER.line(record("chat.completion"), [output()])["response"]["body"]["choices"][0]["logprobs"] is None


def test_without_a_tokenizer():
    line = ResultWriter("m", 0, None).line(record("text_completion"), [output(0, None, LOGPROBS)])
    [choice] = line["response"]["body"]["choices"]
    assert choice["token_ids"] == [5, 77] and choice["logprobs"]["tokens"] == ["token_id:5", "token_id:77"]
    json.dumps(line, allow_nan=False)


def test_errors():
    error = PromptTooLongError("too long", hint="cut it")
    cause = {"code": "prompt_too_long", "message": "too long (cut it)"}
    assert error_line(3, False, None, error) == {"id": 3, "error": cause}
    assert error_line("r1", True, None, error) == {
        "id": f"batch_req_{key_of('r1').hex()}", "custom_id": "r1", "response": None, "error": cause}
    line = error_line(None, False, Line("a.jsonl", 9, b"", False), RequestError("no"))
    assert line == {"id": None, "file": "a.jsonl", "line": 9, "error": {"code": "request", "message": "no"}}
