"""`cutp embed`: the array it writes."""

import json
import os

import numpy as np
import pytest

from cutp import LLM
from tests.cli.conftest import TALES

TEXTS = ["The king", "Once upon a time there was a queen.", "rain", "The king and the queen"]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


@pytest.mark.parametrize("options,arguments", [
    ((), {}), (("--pool", "last", "--layer", "2"), {"pool": "last", "layer": 2}),
    (("--no-normalize", "--layer", "-2"), {"normalize": False, "layer": -2}), (("--chunk-bytes", "60"), {}),
])
def test_array(cli, source, tmp_path, options, arguments):
    done = cli("embed", TALES, source, "--out", tmp_path / "x.npy", *options)
    assert (done.code, done.out, done.err) == (0, "", "")
    vectors = np.load(tmp_path / "x.npy")
    with LLM() as llm:
        expected = llm.embed(TEXTS, **arguments)
    assert vectors.dtype == np.float32 and vectors.shape == (4, 256)
    np.testing.assert_allclose(vectors, expected, atol=1e-4)
    assert not np.allclose(vectors[0], vectors[1], atol=1e-2)
    assert np.load(tmp_path / "x.npy", mmap_mode="r").flags.c_contiguous
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "x.npy"]


def test_chunks_are_embedded_one_after_another(cli, source, tmp_path, monkeypatch):
    sizes = []
    whole = LLM.embed
    monkeypatch.setattr(LLM, "embed", lambda self, values, **more: sizes.append(len(values))
                        or whole(self, values, **more))
    assert cli("embed", TALES, source, "-o", tmp_path / "x.npy", "--chunk-bytes", "60").code == 0
    assert sizes == [2, 2]


def test_many_rows(cli, tmp_path, tiny):
    """The head of the file has room for the number of rows, which is known last."""
    (tmp_path / "in.jsonl").write_text('{"token_ids": [1, 2]}\n' * 1200)
    assert cli("embed", tiny("mha"), tmp_path / "in.jsonl", "-o", tmp_path / "x.npy").code == 0
    vectors = np.load(tmp_path / "x.npy")
    assert vectors.shape[0] == 1200 and np.allclose(vectors, vectors[0], atol=1e-5)


def test_errors_leave_what_was_there(cli, source, tmp_path):
    out = tmp_path / "x.npy"
    out.write_text("precious")
    with source.open("a") as file:
        file.write('{"token_ids": [4096]}\n')
    for options, parts in (((), ("line 5 of", "4096")), (("--chunk-bytes", "1"), ("line 5 of", "4096")),
                           (("--layer", "5"), ("layer 5 is not in 0 .. 4",))):
        cli("embed", TALES, source, "-o", out, *options).assert_error(2, *parts)
    source.write_text('{"text": ""}\n')
    cli("embed", "/no/such/model", source, "-o", out).assert_error(2, "line 1 of", "that is not empty")
    assert out.read_text() == "precious" and sorted(os.listdir(tmp_path)) == ["in.jsonl", "x.npy"]
    cli("embed", "/no/such/model", source, "-o", "/dev/null").assert_error(2, "/dev/null", "no regular file")
    cli("embed", "/no/such/model", source, "-o", tmp_path).assert_error(2, "cannot be written")
    cli("embed", TALES, source).assert_error(2, "--out")
