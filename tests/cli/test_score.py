"""`cutp score`: the lines it writes, and the lines it refuses."""

import gzip
import json
import os
import threading

import numpy as np
import pytest

from cutp import LLM, run_threads
from cutp.cli.json_lines import JsonLines
from cutp.errors import RequestError
from tests.cli.conftest import TALES

TEXTS = ["Once upon a time there was a king.", "The wolf said: \u201cLet me in!\u201d", "a"]


@pytest.fixture
def score(cli, tmp_path):
    """score(model, lines): the command's result and the objects it wrote (None when there is no output)."""

    def run(model, lines, *options):
        source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        source.write_bytes("".join(json.dumps(line) + "\n" for line in lines).encode()
                           if isinstance(lines, list) else lines)
        done = cli("score", model, source, "-o", target, *options)
        written = [json.loads(line) for line in target.read_text().splitlines()] if target.exists() else None
        assert not list(tmp_path.glob("*.part"))
        return done, written

    return run


@pytest.fixture(scope="module")
def expected():
    with LLM() as llm:
        return llm.score(TEXTS)


def test_lines(score, expected):
    done, written = score(TALES, [{"id": f"n\u00b0{i}", "text": text, "more": 1} for i, text in enumerate(TEXTS)])
    assert (done.code, done.out, done.err) == (0, "", "")
    assert [list(line) for line in written] == [["id", "token_ids", "logprobs", "perplexity"]] * 3
    assert written == [
        {"id": f"n\u00b0{i}", "token_ids": list(output.token_ids), "logprobs": list(output.logprobs),
         "perplexity": output.perplexity} for i, output in enumerate(expected)]
    assert all(line["logprobs"][0] is None and max(line["logprobs"][1:]) < 0 for line in written)
    assert [len(line["logprobs"]) for line in written] == [len(line["token_ids"]) for line in written]
    assert written[0]["perplexity"] == pytest.approx(np.exp(-np.mean(written[0]["logprobs"][1:])))


def test_text_and_token_ids_agree(score, expected):
    ids = list(expected[0].token_ids)
    _, [by_text, by_ids] = score(TALES, [{"id": 1, "text": TEXTS[0]}, {"id": 2, "token_ids": ids}])
    assert by_text["token_ids"] == by_ids["token_ids"] == ids
    np.testing.assert_allclose(by_text["logprobs"][1:], by_ids["logprobs"][1:], rtol=0, atol=1e-5)


PAIRS = [("The king", " of the"), ("", "rain"), ([1, 340], [497, 293]), ([], [5])]


def test_continuations(score):
    done, written = score(TALES, [{"id": i, "context": context, "continuation": continuation}
                                  for i, (context, continuation) in enumerate(PAIRS)] + [{"id": 4, "text": TEXTS[0]}])
    with LLM() as llm:
        *expected, text = llm.score([*PAIRS, TEXTS[0]])
    assert done.code == 0 and list(written[4]) == ["id", "token_ids", "logprobs", "perplexity"]
    assert written[4]["logprobs"] == list(text.logprobs)
    assert written[:4] == [
        {"id": i, "context_token_ids": list(output.context_token_ids), "token_ids": list(output.token_ids),
         "logprobs": list(output.logprobs), "logprob": output.logprob, "is_greedy": output.is_greedy}
        for i, output in enumerate(expected)]
    assert written[0]["is_greedy"] and not written[1]["is_greedy"]


def test_the_last_token_of_a_continuation_is_only_predicted(score, tiny):
    done, [line] = score(tiny("mha"), [{"id": 1, "context": [5] * 120, "continuation": [6] * 9}])
    assert done.code == 0 and len(line["logprobs"]) == 9
    score(tiny("mha"), [{"id": 1, "context": [5] * 121, "continuation": [6] * 9}])[0].assert_error(2, "130 tokens")


@pytest.mark.parametrize("size", [1, 100, 10**9])
def test_chunks(score, monkeypatch, size):
    lines = [{"id": i, "token_ids": [1, 2 + i]} for i in range(12)]
    _, expected = score(TALES, lines)
    calls = []
    whole = LLM.score
    monkeypatch.setattr(LLM, "score", lambda self, values, **names: calls.append(len(values))
                        or whole(self, values, **names))
    done, written = score(TALES, lines, "--chunk-bytes", size)
    assert done.code == 0 and [line["id"] for line in written] == list(range(12))
    for one, other in zip(written, expected, strict=True):
        np.testing.assert_allclose(one["logprobs"][1:], other["logprobs"][1:], atol=1e-5)
    assert calls == {1: [1] * 12, 100: [4] * 3, 10**9: [12]}[size]


def test_an_error_in_a_later_chunk_leaves_nothing(score):
    lines = [{"id": 1, "token_ids": [5, 6]}] * 5 + [{"id": 2, "token_ids": [4096]}]
    done, written = score(TALES, lines, "--chunk-bytes", "1")
    done.assert_error(2, "line 6 of", "4096")
    assert written is None


def test_gzip(score, expected):
    lines = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(TEXTS)).encode()
    done, written = score(TALES, gzip.compress(lines))
    assert done.code == 0 and [line["token_ids"] for line in written] == [list(output.token_ids) for output in expected]
    packed = gzip.compress(lines)
    for damaged in (packed[:-9], packed[:-8] + b"wrong sum", packed[:60]):
        score(TALES, damaged)[0].assert_error(2, "in.jsonl is damaged after line")


def test_a_line_without_end(score, monkeypatch):
    monkeypatch.setattr("cutp.cli.json_lines.MAX_LINE_BYTES", 100)
    assert score(TALES, b'{"id": 1, "text": "a"}'.ljust(99) + b"\n")[0].code == 0
    score(TALES, b'{"id": 1, "text": "a"}\n' + b'{"id": 1, "text": "a"}'.ljust(101) + b"\n")[0].assert_error(
        2, "line 2 of", "longer than 100 bytes")


def test_a_pipe(cli, tmp_path):
    """It can be read only once, and opened only once."""
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes(GOOD * 3))
    writer.start()
    done = cli("score", TALES, tmp_path / "pipe", "-o", tmp_path / "out")
    writer.join()
    assert done.code == 0 and len((tmp_path / "out").read_text().splitlines()) == 3


def test_ranks_agree_on_chunks_and_errors(tmp_path):
    """Every rank takes the same number of chunks, and all raise what rank 0 met."""
    source = tmp_path / "in.jsonl"
    for last, error in ((GOOD, None), (b"not json\n", "line 6 of .* is not JSON")):
        source.write_bytes(GOOD * 5 + last)

        def rank_main(comm):
            return [chunk and len(chunk) for chunk in JsonLines(str(source), need_id=True).chunks(comm, 80)]

        if error is None:
            assert run_threads(2, rank_main, timeout=20) == [[3, 3], [None, None]]
        else:
            with pytest.raises(RequestError, match=error):
                run_threads(2, rank_main, timeout=20)


def test_one_token(score):
    _, [line] = score(TALES, [{"id": None, "token_ids": [17]}])
    assert line == {"id": None, "token_ids": [17], "logprobs": [None], "perplexity": None}


def test_without_a_tokenizer(score, tiny):
    done, written = score(tiny("mha"), [{"id": [1, {"a": 2}], "token_ids": [1, 2, 3]}])
    with LLM(tiny("mha")) as llm:
        [output] = llm.score([[1, 2, 3]])
    assert done.code == 0
    assert written == [{"id": [1, {"a": 2}], "token_ids": [1, 2, 3], "logprobs": list(output.logprobs),
                        "perplexity": output.perplexity}]


def test_bfloat16(score, tiny):
    line = {"id": 1, "token_ids": [1, 2, 3]}
    (_, [float32]), (done, [bfloat16]) = score(tiny("mha"), [line]), score(tiny("mha"), [line], "--dtype", "bfloat16")
    assert done.code == 0 and 0 < abs(float32["perplexity"] - bfloat16["perplexity"]) < 0.5 * float32["perplexity"]


def test_id_with_half_a_surrogate_pair(score):
    done, [line] = score(TALES, b'{"id": "\\ud800", "token_ids": [5, 6]}\n')
    assert done.code == 0 and line["id"] == "\ud800"


def test_longest_text(score, tiny):
    assert score(tiny("mha"), [{"id": 1, "token_ids": [5] * 128}])[0].code == 0
    score(tiny("mha"), [{"id": 1, "token_ids": [5] * 2}, {"id": 1, "token_ids": [5] * 129}])[0].assert_error(
        2, "line 2 of", "129 tokens", "128")


GOOD = b'{"id": 1, "token_ids": [1, 2]}\n'


@pytest.mark.parametrize(("line", "message"), [
    (b"not json", "is not JSON"),
    (b"", "is not JSON"),
    (b"\xff\xfe{}", "is not JSON"),
    (b'{"id": 1, "text": "a"', "is not JSON"),
    (b'{"id": NaN, "text": "a"}', "is not JSON"),
    (b"[" * 100_000, "is not JSON"),
    (b"[1, 2]", 'is not an object with an "id"'),
    (b'"text"', 'is not an object with an "id"'),
    (b'{"text": "a"}', 'is not an object with an "id"'),
    (b'{"id": 1}', 'needs either "text" or "token_ids"'),
    (b'{"id": 1, "text": "a", "token_ids": [1]}', 'needs either "text" or "token_ids"'),
    (b'{"id": 1, "text": "a", "continuation": "b"}', 'or "context" and "continuation"'),
    (b'{"id": 1, "continuation": "b"}', 'needs both "context" and "continuation"'),
    (b'{"id": 1, "context": "b"}', 'needs both "context" and "continuation"'),
    (b'{"id": 1, "context": "b", "continuation": ""}', '"continuation" must be a string or a list of integers that'),
    (b'{"id": 1, "context": null, "continuation": "a"}', '"context" must be a string or a list of integers'),
    (b'{"id": 1, "context": [1], "continuation": [true]}', '"continuation" must be a string or a list of integers'),
    (b'{"id": 1, "context": [1], "continuation": "a"}', "must both be text or both be token ids"),
    (b'{"id": 1, "context": [1], "continuation": [4096]}', "token id 4096 is not in 0 .. 4095"),
    (b'{"id": 1, "text": 5}', '"text" must be a string'),
    (b'{"id": 1, "text": null}', '"text" must be a string'),
    (b'{"id": 1, "text": ""}', '"text" must be a string that is not empty'),
    (b'{"id": 1, "text": "\\ud800"}', "surrogate"),
    (b'{"id": 1, "token_ids": "1,2"}', '"token_ids" must be a list of integers'),
    (b'{"id": 1, "token_ids": []}', '"token_ids" must be a list of integers that is not empty'),
    (b'{"id": 1, "token_ids": [1, 2.0]}', '"token_ids" must be a list of integers'),
    (b'{"id": 1, "token_ids": [true]}', '"token_ids" must be a list of integers'),
    (b'{"id": 1, "token_ids": [4096]}', "token id 4096 is not in 0 .. 4095"),
    (b'{"id": 1, "token_ids": [5, -1]}', "token id -1 is not in 0 .. 4095"),
    (b'{"id": 1, "token_ids": [1e400]}', '"token_ids" must be a list of integers'),
])
def test_bad_line(cli, tmp_path, line, message):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(GOOD * 2 + line + b"\n" + GOOD)
    target.write_text("precious")
    cli("score", TALES, source, "-o", target).assert_error(2, f"line 3 of {source}", message)
    assert target.read_text() == "precious" and sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.jsonl"]


def test_text_without_a_tokenizer(cli, tmp_path, tiny):
    source = tmp_path / "in.jsonl"
    source.write_bytes(GOOD + b'{"id": 2, "text": "a"}\n')
    cli("score", tiny("mha"), source, "-o", tmp_path / "out").assert_error(2, f"line 2 of {source}", "tokenizer.json")


def test_integers_beyond_64_bits(cli, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"id": 1, "token_ids": [2**70]}))
    cli("score", TALES, source, "-o", tmp_path / "out").assert_error(2)


def test_bad_input_file(cli, tmp_path):
    cli("score", TALES, tmp_path / "none", "-o", tmp_path / "out").assert_error(2, tmp_path / "none", "No such file")
    cli("score", TALES, tmp_path, "-o", tmp_path / "out").assert_error(2, tmp_path, "Is a directory")
    (tmp_path / "empty").write_text("")
    cli("score", TALES, tmp_path / "empty", "-o", tmp_path / "out").assert_error(2, tmp_path / "empty", "is empty")
    assert not (tmp_path / "out").exists()


def test_bad_output(cli, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_bytes(GOOD)
    for name in (tmp_path / "none" / "out", tmp_path, source / "out"):
        cli("score", TALES, source, "-o", name).assert_error(2, name, "cannot be written")
        # This comes before the model is loaded, which may take minutes.
        cli("score", "/no/such/model", source, "-o", name).assert_error(2, name, "cannot be written")
    cli("score", TALES, source).assert_error(2, "-o/--output")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_output_without_permission(cli, tmp_path):
    (tmp_path / "in.jsonl").write_bytes(GOOD)
    (tmp_path / "locked").mkdir(mode=0o555)
    cli("score", TALES, tmp_path / "in.jsonl", "-o", tmp_path / "locked" / "out").assert_error(2, "cannot be written")


def test_disk_full_in_the_end(cli, tmp_path, monkeypatch):
    (tmp_path / "in.jsonl").write_bytes(GOOD)
    (tmp_path / "out").write_text("precious")

    def replace(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", replace)
    cli("score", TALES, tmp_path / "in.jsonl", "-o", tmp_path / "out").assert_error(2, "No space left")
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out"] and (tmp_path / "out").read_text() == "precious"


def test_output_through_a_link_and_to_a_pipe(cli, tmp_path):
    (tmp_path / "in.jsonl").write_bytes(GOOD)
    (tmp_path / "link").symlink_to(tmp_path / "target")
    assert cli("score", TALES, tmp_path / "in.jsonl", "-o", tmp_path / "link").code == 0
    assert (tmp_path / "link").is_symlink() and json.loads((tmp_path / "target").read_text())["id"] == 1
    # What is no regular file is written to and stays what it is.
    (tmp_path / "device").symlink_to("/dev/null")
    assert cli("score", TALES, tmp_path / "in.jsonl", "-o", tmp_path / "device").code == 0
    assert (tmp_path / "device").is_symlink() and not os.path.isfile("/dev/null")
