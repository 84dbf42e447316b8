"""The command line under mpirun: the same results on any number of ranks, and only rank 0 speaks."""

import functools
import io
import json
import re
import sys
import time
from contextlib import redirect_stdout

import numpy as np
import pytest

from cutp import LLM, SamplingParams, run_threads
from cutp.cli.main import main
from tests.cli.conftest import TALES
from tests.mpirun import needs_mpirun, run_mpi

pytestmark = needs_mpirun

# A job in which something fails ends within SOON, however busy the machine is. One in which a rank waits for another
# for ever is ended by run_mpi after a longer time, which is an error.
SOON = 30

PROMPTS = ["Once upon a time", "There was a little tailor who", "The wolf said: " * 30]
PROMPT_OPTIONS = [part for prompt in PROMPTS for part in ("-p", prompt)]
GREEDY = ["generate", *PROMPT_OPTIONS, "--temperature", "0", "--max-tokens", "24"]
SAMPLED = ["generate", *PROMPT_OPTIONS, "--temperature", "1.1", "--top-p", "0.95", "--top-k", "200", "--min-p", "0.001",
           "--seed", "12345", "--max-tokens", "24", "--json"]


def cutp(n, *argv, **options):
    """`mpirun -n N cutp ...`: exit status, stdout, stderr without the launcher's own lines, seconds."""
    began = time.monotonic()
    done = run_mpi(n, [sys.executable, "-m", "cutp", *map(str, argv)], **options)
    return done.returncode, done.stdout, done.stderr, time.monotonic() - began


@functools.cache
def alone(*argv):
    """What `cutp ...` prints without a launcher."""
    out = io.StringIO()
    with redirect_stdout(out), pytest.raises(SystemExit) as exit_:
        main([str(arg) for arg in argv])
    assert not exit_.value.code
    return out.getvalue()


def in_threads(n, params):
    def rank_main(comm):
        with LLM(comm=comm) as llm:
            return llm.generate(PROMPTS, params)

    ranks = run_threads(n, rank_main)
    assert all(ranks[0] == other for other in ranks)
    return ranks[0]


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_greedy_text_is_the_same(n):
    code, out, err, _ = cutp(n, *GREEDY)
    assert (code, out, err) == (0, alone(*GREEDY), "")
    outputs = in_threads(n, SamplingParams(temperature=0, max_tokens=24))
    assert out == "".join(f"{output.prompt}{output.text}\n" for output in outputs)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_sampled_json_is_the_same(n):
    code, out, err, _ = cutp(n, *SAMPLED)
    assert (code, out, err) == (0, alone(*SAMPLED), "")
    outputs = in_threads(n, [SamplingParams(temperature=1.1, top_p=0.95, top_k=200, min_p=0.001, seed=12345 + i,
                                            max_tokens=24) for i in range(len(PROMPTS))])
    assert [json.loads(line)["token_ids"] for line in out.splitlines()] == [list(o.token_ids) for o in outputs]


def test_stream_and_a_drawn_seed():
    command = ["generate", *PROMPT_OPTIONS, "--temperature", "1", "--max-tokens", "20", "--stream"]
    code, out, err, _ = cutp(3, *command)
    [seed] = re.findall(r"\Acutp: seed (\d+) \(repeat this run with --seed \1\)\n\Z", err)
    assert code == 0 and out == alone(*command, "--seed", seed)


@pytest.mark.parametrize("n", [3, 4])
@pytest.mark.parametrize("case", ["odd_vocab", "gqa_6_heads_2_kv", "odd_ffn"])
def test_uneven_shards(tiny, case, n):
    command = ["generate", tiny(case), "--prompt-ids", "1,2,3,4,5", "--prompt-ids", "400", "--temperature", "0",
               "--max-tokens", "24", "--json"]
    code, out, err, _ = cutp(n, *command)
    assert (code, out, err) == (0, alone(*command), "") and len(json.loads(out.splitlines()[0])["token_ids"]) == 24


def test_prompts_from_stdin():
    code, out, err, _ = cutp(2, "generate", "-f", "-", "--temperature", "0", "--max-tokens", "24",
                             stdin="".join(f"{prompt}\n" for prompt in PROMPTS))
    assert (code, out, err) == (0, alone(*GREEDY), "")


def test_score(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(PROMPTS)))
    alone("score", TALES, source, "-o", tmp_path / "one.jsonl")
    code, out, err, _ = cutp(2, "score", TALES, source, "-o", tmp_path / "two.jsonl")
    assert (code, out, err) == (0, "", "")
    one, two = ([json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
                for name in ("one.jsonl", "two.jsonl"))
    for a, b in zip(one, two, strict=True):
        assert (a["id"], a["token_ids"]) == (b["id"], b["token_ids"])
        np.testing.assert_allclose(a["logprobs"][1:], b["logprobs"][1:], rtol=0, atol=1e-4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "one.jsonl", "two.jsonl"]


def test_info():
    code, out, err, _ = cutp(3, "info", "--tp", "2", "--json")
    assert (code, out, err) == (0, alone("info", "--tp", "2", "--json"), "")


def test_help():
    code, out, err, _ = cutp(3, "generate", "--help")
    assert code == 0 and err == "" and out.count("usage:") == 1


ERRORS = {
    "usage": (2, ["generate", "-p", "a", "--bogus"], "--bogus"),
    "no prompt": (2, ["generate"], "-p/--prompt"),
    "sampling": (2, ["generate", "-p", "a", "--top-p", "7"], "top_p"),
    "model": (3, ["generate", "/no/such/model", "-p", "a"], "/no/such/model"),
    "info of no model": (3, ["info", "/no/such/model"], "/no/such/model"),
    "request": (2, ["generate", "-p", "a", "--prompt-ids", "1"], "not allowed"),
    "token id": (2, ["generate", "--prompt-ids", "5,99999"], "99999"),
    "prompt too long": (2, ["generate", "-p", "a " * 2000], "1023"),
    "no chat template": (2, ["generate", "--chat", "-p", "a"], "chat template"),
    "prompt file": (2, ["generate", "-f", "/no/such/file"], "/no/such/file"),
    "tp": (2, ["generate", "-p", "a", "--tp", "2"], "tp=2"),
    "input": (2, ["score", TALES, "/no/such/file", "-o", "/tmp/out"], "/no/such/file"),
    "output": (2, ["score", TALES, "/no/such/file", "-o", "/no/such/directory/out"], "/no/such/directory/out"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_error_appears_once_and_ends_the_job(name):
    expected, argv, part = ERRORS[name]
    code, out, err, seconds = cutp(3, *argv, timeout=40)
    assert (code, out) == (expected, ""), err
    assert err.count("cutp: error: ") == 1 and err.count(part) == 1 and "Traceback" not in err
    assert seconds < SOON


def test_bad_line_names_itself(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text('{"id": 1, "token_ids": [5, 6]}\n{"id": 2, "token_ids": [5, 5000]}\n')
    (tmp_path / "out.jsonl").write_text("precious")
    code, _, err, seconds = cutp(2, "score", TALES, source, "-o", tmp_path / "out.jsonl", timeout=40)
    assert code == 2 and seconds < SOON and err.count(f"line 2 of {source}: token id 5000") == 1
    assert (tmp_path / "out.jsonl").read_text() == "precious"


def test_tp_that_does_not_fit(tiny):
    code, _, err, seconds = cutp(5, "generate", tiny("mha"), "--prompt-ids", "1", timeout=40)
    assert code == 2 and seconds < SOON and err.count("sizes 1 to 4 work") == 1
