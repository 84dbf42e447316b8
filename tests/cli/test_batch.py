"""`cutp batch` with the bundled model, in this process."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cutp import LLM, SamplingParams
from cutp.batch.records import record_seed
from tests.cli.conftest import TALES
from tests.mpirun import clean_environment

RECORDS = [
    {"id": "a", "prompt": "Once upon a time", "max_tokens": 8},
    {"id": 2, "prompt": "The wolf", "temperature": 0, "max_tokens": 5, "logprobs": 1},
    {"custom_id": "c", "method": "POST", "url": "/v1/completions",
     "body": {"model": "tales", "prompt": "A king", "max_tokens": 4, "n": 2, "temperature": 1, "logprobs": 1}},
]
SEED = ("--seed", "5")


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return path


def lines(directory, kind="part-"):
    found = [json.loads(line) for path in sorted(directory.glob(f"{kind}*.jsonl"))
             for line in path.read_text().splitlines()]
    return {line.get("custom_id", line["id"]): line for line in found}


def test_results_are_those_of_the_library(cli, corpus, tmp_path):
    done = cli("batch", TALES, corpus, "-o", tmp_path / "out", *SEED)
    assert (done.code, done.out) == (0, "") and "3 of 3 records done, 0 failed, 0 left" in done.err
    found = lines(tmp_path / "out")
    with LLM() as llm:
        a, b, c, d = llm.generate(["Once upon a time", "The wolf", "A king"], [
            SamplingParams(max_tokens=8, seed=record_seed(5, "a")),
            SamplingParams(max_tokens=5, temperature=0, logprobs=1, seed=record_seed(5, 2)),
            SamplingParams(max_tokens=4, temperature=1, n=2, logprobs=1, seed=record_seed(5, "c"))])
    assert found["a"]["text"] == a.text and found[2]["text"] == b.text
    assert [entry["token_id"] for entry in found[2]["logprobs"]] == list(b.token_ids)
    body = found["c"]["response"]["body"]
    assert [choice["text"] for choice in body["choices"]] == [c.text, d.text]
    assert "".join(body["choices"][0]["logprobs"]["tokens"]) == c.text
    assert body["usage"]["completion_tokens"] == len(c.token_ids) + len(d.token_ids)
    again = cli("batch", TALES, corpus, "-o", tmp_path / "out", *SEED)
    assert again.code == 0 and "nothing is left to do: 3 of 3 records are done" in again.err


def test_status_and_merge(cli, corpus, tmp_path):
    with corpus.open("a") as file:
        file.write('{"id": "d", "prompt": "x", "temperature": -1}\n')
    out = tmp_path / "out"
    assert cli("batch", TALES, corpus, "-o", out, "--time-limit", "0", *SEED).code == 75
    done = cli("batch", "status", out)
    expected = rf"{out}: 0 of 4 records done, 0 failed, 4 left\n  attempt 1 on .*: ended .* with exit status 75\n"
    assert re.fullmatch(expected, done.out)
    cli("batch", "merge", out, "-o", tmp_path / "all.jsonl").assert_error(2, "4 of 4 records are still", "--partial")
    assert cli("batch", TALES, corpus, "-o", out, *SEED).code == 6
    done = cli("batch", "status", out, "--json")
    [status] = done.json
    assert [status[name] for name in ("records", "done", "failed", "remaining")] == [4, 3, 1, 0]
    assert "1 x request, such as: line 4 of in.jsonl: temperature" in cli("batch", "status", out).out
    done = cli("batch", "merge", out, "-o", tmp_path / "all.jsonl")
    assert (done.code, done.out) == (0, "")
    assert done.err == f"cutp: 3 results in {tmp_path}/all.jsonl; 1 records have no result\n"
    merged = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert [line.get("custom_id", line["id"]) for line in merged] == ["a", 2, "c"]
    assert list(lines(out, "errors.")) == ["d"]


def test_options_reach_the_records(cli, tmp_path):
    (tmp_path / "in.txt").write_text("Once upon a time\nThe wolf\n")
    assert cli("batch", TALES, tmp_path / "in.txt", "-o", tmp_path / "out", "--max-tokens", "3", "--n", "2",
               "--logprobs", "0", *SEED).code == 0
    found = lines(tmp_path / "out")
    assert list(sorted(found)) == ["in.txt:1", "in.txt:2"]
    for line in found.values():
        assert [len(choice["logprobs"]) for choice in line["choices"]] == [3, 3]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["parameters"] == {"max_tokens": 3, "n": 2, "logprobs": 0, "chat": False, "format": "auto",
                                      "dtype": None, "max_len": None}
    assert manifest["seed"] == 5


def test_a_prompt_too_long_and_a_chat_without_template(cli, tmp_path):
    records = [{"id": 1, "prompt": "word " * 5000}, {"id": 2, "messages": [{"role": "user", "content": "x"}]},
               {"id": 3, "prompt": [99999999]}, {"id": 4, "prompt": "The wolf", "max_tokens": 2}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert cli("batch", TALES, tmp_path / "in.jsonl", "-o", tmp_path / "out").code == 6
    errors = lines(tmp_path / "out", "errors.")
    assert {key: line["error"]["code"] for key, line in errors.items()} == {
        1: "prompt_too_long", 2: "request", 3: "invalid_token"}
    assert all(f"line {key} of in.jsonl: " in line["error"]["message"] for key, line in errors.items())
    assert list(lines(tmp_path / "out")) == [4]


@pytest.mark.parametrize(("options", "words"), [
    (["--time-limit", "soon"], "'soon' is not a time"), (["--margin", "x"], "'x' is not a time"),
    (["--tp", "2"], "tp=2, but there are 1 ranks"), (["--temperature", "-1"], "temperature"),
    (["--max-fails", "0"], "--max-fails"), (["--interval", "0"], "--interval"), (["--format", "xml"], "--format"),
    (["--seed", "-1"], "seed"), (["--dtype", "int8"], "int8")])
def test_bad_options(cli, corpus, tmp_path, options, words):
    cli("batch", TALES, corpus, "-o", tmp_path / "out", *options).assert_error(2, words)
    assert not lines(tmp_path / "out")


def test_what_is_not_there(cli, corpus, tmp_path):
    cli("batch", tmp_path / "none", corpus, "-o", tmp_path / "out").assert_error(3, "there is no directory")
    cli("batch", TALES, tmp_path / "none.jsonl", "-o", tmp_path / "out").assert_error(2, "none.jsonl is not there")
    cli("batch", TALES, corpus).assert_error(2, "-o")
    cli("batch", TALES, corpus, "-o", "/proc/out").assert_error(1, "/proc/out cannot be written")
    cli("batch", "status", tmp_path).assert_error(1, "is not the directory of a batch job")
    cli("batch", "merge", tmp_path, "-o", tmp_path / "x").assert_error(1, "is not the directory of a batch job")


def test_help(cli):
    for words in (["batch"], ["batch", "status"], ["batch", "merge"]):
        done = cli(*words, "--help")
        assert done.code == 0 and done.out.startswith(f"usage: cutp {' '.join(words)} ") and "example: " in done.out


def test_a_model_that_is_called_status(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("status").symlink_to(TALES)
    Path("in.txt").write_text("The wolf\n")
    assert cli("batch", "./status", "in.txt", "-o", "out", "--max-tokens", "2").code == 0


def test_the_example_runs(tmp_path):
    from cutp.cli.batch import EXAMPLE

    command = EXAMPLE.rpartition("example: ")[2].replace("mpirun -n 2 cutp", f"{sys.executable} -m cutp")
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=60,
                          env=clean_environment())
    assert done.returncode == 0 and list(lines(tmp_path / "out")) == [1], done.stderr


def test_files_that_may_not_grow(corpus, tmp_path):
    """A real limit of the system, which lets part of a line through: the job ends with an error; nothing is lost."""
    records = [{"id": i, "prompt": "The wolf", "max_tokens": 3 + i % 3} for i in range(60)]
    corpus.write_text("".join(json.dumps(record) + "\n" for record in records))
    code = ("import resource, sys\nfrom cutp.cli.main import main\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))\nmain(sys.argv[1:])")
    argv = ["batch", str(TALES), str(corpus), "-o", str(tmp_path / "out"), *SEED]
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, timeout=60,
                          env=clean_environment())
    assert done.returncode == 1 and re.search(r"\ncutp: error: .*/part-0\.1\.jsonl cannot be written: File too large "
                                              r"\(the finished records are kept", "\n" + done.stderr), done.stderr
    part = (tmp_path / "out" / "part-0.1.jsonl").read_bytes()
    assert 3000 < len(part) <= 4000 and part.endswith(b"\n")
    done = subprocess.run([sys.executable, "-m", "cutp", *argv], capture_output=True, text=True, timeout=60,
                          env=clean_environment())
    assert done.returncode == 0 and set(lines(tmp_path / "out")) == set(range(60))
    assert os.path.getsize(tmp_path / "out" / "part-0.1.jsonl") == len(part)
