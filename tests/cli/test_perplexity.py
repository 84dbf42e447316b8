"""`cutp perplexity`: documents and their total."""

import json

import pytest

from cutp import LLM
from tests.cli.conftest import TALES

TEXTS = ["Once upon a time there was a king.", "The wolf said: \u201cLet me in!\u201d", "In old times " * 30]


@pytest.fixture(scope="module")
def expected():
    with LLM() as llm:
        return llm.perplexity(TEXTS)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"id": f"n\u00b0{i}", "text": text} if i else {"text": text}) + "\n"
                            for i, text in enumerate(TEXTS)))
    return path


def fields(output):
    return {"tokens": output.num_tokens, "bytes": output.num_bytes, "logprob": output.logprob,
            "perplexity": output.perplexity, "bits_per_byte": output.bits_per_byte}


@pytest.mark.parametrize("options", [(), ("--chunk-bytes", "1")])
def test_documents_and_total(cli, source, expected, options):
    done = cli("perplexity", TALES, source, "--json", *options)
    assert (done.code, done.err) == (0, "")
    *documents, total = done.json
    for line, output, name in zip(documents, expected, (1, "n\u00b01", "n\u00b02"), strict=True):
        assert list(line) == ["id", "tokens", "bytes", "logprob", "perplexity", "bits_per_byte"]
        assert line.pop("id") == name and line == pytest.approx(fields(output), rel=1e-5)
    tokens, size = sum(e.num_tokens for e in expected), sum(len(text.encode()) for text in TEXTS)
    logprob = sum(e.logprob for e in expected)
    assert (total["documents"], total["tokens"], total["bytes"]) == (3, tokens, size)
    assert total["logprob"] == pytest.approx(logprob)
    assert total["perplexity"] == pytest.approx(2.718281828459045 ** (-logprob / tokens))
    assert total["bits_per_byte"] == pytest.approx(-logprob / 0.6931471805599453 / size)


def test_table(cli, source, expected):
    done = cli("perplexity", TALES, source)
    assert done.code == 0
    head, *lines = done.out.splitlines()
    assert head.split() == ["tokens", "perplexity", "bits/byte", "document"]
    assert [line.split()[3:] for line in lines] == [["1"], ["n\u00b01"], ["n\u00b02"], ["all", "3"]]
    assert float(lines[0].split()[1]) == pytest.approx(expected[0].perplexity, abs=1e-3)
    assert float(lines[0].split()[2]) == pytest.approx(expected[0].bits_per_byte, abs=1e-3)


def test_a_text_file_is_one_document(cli, tmp_path):
    text = "Once upon a time.\nThere was a king.\r\n" * 40
    (tmp_path / "tale.txt").write_bytes(text.encode())
    with LLM() as llm:
        [whole], [windowed] = llm.perplexity([text]), llm.perplexity([text], window=16)
    document, total = cli("perplexity", TALES, "--text", tmp_path / "tale.txt", "--json").json
    assert document.pop("id") == str(tmp_path / "tale.txt") and document == pytest.approx(fields(whole), rel=1e-6)
    assert total["logprob"] == document["logprob"] and total["documents"] == 1
    document, _ = cli("perplexity", TALES, "--text", tmp_path / "tale.txt", "--json", "--window", "16").json
    assert document["logprob"] == pytest.approx(windowed.logprob) != pytest.approx(whole.logprob)


def test_token_ids_have_no_bytes(cli, tmp_path, tiny):
    (tmp_path / "in.jsonl").write_text('{"token_ids": [1, 2, 3]}\n{"id": [4], "token_ids": [5]}\n')
    one, other, total = cli("perplexity", tiny("mha"), tmp_path / "in.jsonl", "--json").json
    assert (one["id"], other["id"]) == (1, [4])
    assert one["bytes"] is one["bits_per_byte"] is total["bytes"] is total["bits_per_byte"] is None
    assert cli("perplexity", tiny("mha"), tmp_path / "in.jsonl").out.splitlines()[2].split()[2:] == ["-", "[4]"]


def test_errors(cli, source, tmp_path):
    with source.open("a") as file:
        file.write('{"id": 9, "token_ids": [1, 4096]}\n')
    done = cli("perplexity", TALES, source, "--json")
    done.assert_error(2, f"line 4 of {source}", "4096")
    cli("perplexity", TALES, source, "--window", "1025").assert_error(2, "window", "1024")
    cli("perplexity", TALES, source, "--window", "0").assert_error(2, "--window")
    cli("perplexity", TALES).assert_error(2, "INPUT.jsonl", "--text")
    cli("perplexity", TALES, source, "--text", source).assert_error(2, "not allowed with")
    source.write_text('{"context": "a", "continuation": "b"}\n')
    cli("perplexity", "/no/such/model", source).assert_error(2, "line 1 of", '"text" or "token_ids"')
    for data, message in ((b"", "is empty"), (b"abc\xff", "is not UTF-8 at byte 3")):
        (tmp_path / "bad.txt").write_bytes(data)
        cli("perplexity", "/no/such/model", "--text", tmp_path / "bad.txt").assert_error(2, "bad.txt", message)
    cli("perplexity", "/no/such/model", "--text", tmp_path / "none").assert_error(2, "none cannot be read")
