"""`cutp generate`: every way to pass prompts, every form of output, and the options that change the text."""

import io
import json
import re
import shlex
import subprocess
import sys
import tomllib

import numpy as np
import pytest

from cutp import LLM, SamplingParams
from tests.mpirun import CHECKOUT, clean_environment, find_mpirun, why_no_mpirun

ONCE = "Once upon a time"
# The first takes two passes to read.
PROMPTS = ["The king said to his daughter: " * 90, ONCE, "There was a little tailor"]
GREEDY = ("--temperature", "0", "--max-tokens", "12")


@pytest.fixture(scope="module")
def tales():
    with LLM() as llm:
        yield llm


@pytest.fixture(scope="module")
def greedy(tales):
    """The greedy results of PROMPTS."""
    return tales.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=12))


def lines(outputs):
    return "".join(f"{output.prompt}{output.text}\n" for output in outputs)


def many(option, prompts):
    return [part for prompt in prompts for part in (option, prompt)]


# ---------------------------------------------------------------- prompts

def test_prompts_from_options(cli, greedy):
    done = cli("generate", *many("-p", PROMPTS), *GREEDY)
    assert (done.code, done.out, done.err) == (0, lines(greedy), "")


@pytest.mark.parametrize("ending", ["\n", "\r\n", ""])
def test_prompts_from_a_file(cli, greedy, tmp_path, ending):
    file = tmp_path / "prompts.txt"
    file.write_bytes(("\r\n" if ending else "\n").join(PROMPTS).encode() + ending.encode())
    assert cli("generate", "-f", file, *GREEDY).out == lines(greedy)


def test_prompts_from_stdin(cli, greedy, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(PROMPTS) + "\n"))
    assert cli("generate", "-f", "-", *GREEDY).out == lines(greedy)


@pytest.mark.parametrize(("content", "message"), [
    (b"", "is empty"),
    (b"one\n\nthree\n", "line 2 of {} is an empty prompt"),
    (b"one\ntwo\n\r\n", "line 3 of {} is an empty prompt"),
    (b"\n", "line 1 of {} is an empty prompt"),
    (b"caf\xe9\n", "not UTF-8 at byte 3"),
    (None, "cannot be read: No such file"),
])
def test_bad_prompt_file(cli, tmp_path, content, message):
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    cli("generate", "-f", file).assert_error(2, file, message.format(file))


def test_prompt_file_is_a_directory(cli, tmp_path):
    cli("generate", "-f", tmp_path).assert_error(2, tmp_path, "Is a directory")


def test_prompts_as_token_ids(cli, greedy):
    ids = [",".join(map(str, output.prompt_token_ids)) for output in greedy]
    done = cli("generate", *many("--prompt-ids", ids), *GREEDY)
    # The text of a prompt that was never text is not shown.
    assert done.out == "".join(f"{output.text}\n" for output in greedy)
    found = cli("generate", *many("--prompt-ids", ids), *GREEDY, "--json").json
    assert [line["token_ids"] for line in found] == [list(output.token_ids) for output in greedy]


@pytest.mark.parametrize("options", [
    ["-p", "a", "-f", "b"], ["-p", "a", "--prompt-ids", "1"], ["-f", "b", "--prompt-ids", "1"],
])
def test_ways_to_pass_prompts_exclude_each_other(cli, options):
    cli("generate", *options).assert_error(2, "not allowed with argument")


# ---------------------------------------------------------------- output

@pytest.fixture(scope="module")
def stop(greedy):
    """A string that ends the second result early, and no other."""
    stop = greedy[1].text[3:9]
    assert [stop in output.text for output in greedy] == [False, True, False]
    return stop


def test_json(cli, tales, greedy, stop):
    params = SamplingParams(temperature=0, max_tokens=12, stop=(stop,))
    done_first = next(event.index for event in tales.stream(PROMPTS, params) if event.output is not None)
    assert done_first == 1, "the case must finish out of order to say anything"
    command = ("generate", *many("-p", PROMPTS), *GREEDY, "--stop", stop, "--json")
    done = cli(*command)
    assert done.code == 0
    assert [list(line) for line in done.json] == [
        ["index", "sample_index", "prompt_token_ids", "token_ids", "text", "finish_reason"]] * 3
    assert done.json == [
        {"index": index, "sample_index": 0, "prompt_token_ids": list(output.prompt_token_ids),
         "token_ids": list(output.token_ids), "text": output.text, "finish_reason": reason}
        for index, (output, reason) in enumerate(zip(tales.generate(PROMPTS, params), ("length", "stop", "length"),
                                                     strict=True))]
    assert [done.json[i]["text"] for i in (0, 2)] == [greedy[i].text for i in (0, 2)]
    assert cli(*command, "--stream").out == done.out


class _Recorder(io.StringIO):
    def __init__(self):
        super().__init__()
        self.pieces = []

    def write(self, text):
        self.pieces.append(text)
        return super().write(text)


def test_stream(cli, greedy, stop, monkeypatch):
    command = ("generate", *many("-p", PROMPTS), *GREEDY)
    whole, stopped = cli(*command), cli(*command, "--stop", stop)
    assert whole.out == lines(greedy) and stopped.out.startswith(lines(greedy[:1])) and stopped.out != whole.out
    for expected, more in ((whole, ()), (stopped, ("--stop", stop))):
        recorder = _Recorder()
        monkeypatch.setattr(sys, "stdout", recorder)
        done = cli(*command, *more, "--stream")
        assert done.code == 0 and recorder.getvalue() == expected.out
        # The first prompt's text grows on the screen; the others' is there when its turn comes.
        pieces = recorder.pieces[: recorder.pieces.index("\n")]
        assert len(pieces) >= 5 and "".join(pieces) + "\n" == lines(greedy[:1])


@pytest.mark.parametrize("options", [["--prompt-ids", "1,2079,687"], ["-p", ONCE, "--stop", "king"]])
def test_stream_equals_the_whole(cli, options):
    whole = cli("generate", *options, *GREEDY)
    assert whole.code == 0 and len(whole.out) > 5
    assert cli("generate", *options, *GREEDY, "--stream").out == whole.out


def test_library_stream_joins_to_the_text(tales, greedy):
    text, count = {}, 0
    for event in tales.stream(PROMPTS, SamplingParams(temperature=0, max_tokens=12)):
        text[event.index] = text.get(event.index, "") + event.text
        count += 1
    assert [text[i] for i in range(3)] == [output.text for output in greedy] and count == 36


# ---------------------------------------------------------------- chat

def test_chat(cli, tales_copy, tales):
    (tales_copy / "chat_template.jinja").write_text(
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}")
    done = cli("generate", tales_copy, "--chat", "-p", "Who are you?", *GREEDY, "--json")
    [line] = done.json
    rendered = "[user] Who are you?\n[assistant]"
    ids = tales.tokenizer.encode(rendered, add_special_tokens=False)
    assert line["prompt_token_ids"] == ids
    [expected] = tales.generate([ids], SamplingParams(temperature=0, max_tokens=12))
    assert line["token_ids"] == list(expected.token_ids)
    for more in ((), ("--stream",)):
        assert cli("generate", tales_copy, "--chat", "-p", "Who are you?", *GREEDY, *more).out == line["text"] + "\n"


def test_chat_without_a_template(cli):
    cli("generate", "--chat", "-p", "Who are you?").assert_error(2, "no chat template")


def test_chat_needs_text(cli):
    cli("generate", "--chat", "--prompt-ids", "1,2").assert_error(2, "--chat", "--prompt-ids")


# ---------------------------------------------------------------- engine options

def test_bfloat16(cli, tiny):
    directory = tiny("mha")
    with LLM(directory, dtype="bfloat16") as llm:
        [expected] = llm.generate([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=12, logprobs=1))
    with LLM(directory) as llm:
        [float32] = llm.generate([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=12, logprobs=1))
    assert expected.logprobs[0].logprob != float32.logprobs[0].logprob
    [line] = cli("generate", directory, "--prompt-ids", "1,2,3", *GREEDY, "--dtype", "bfloat16", "--json").json
    assert line["token_ids"] == list(expected.token_ids)
    assert cli("generate", "-p", ONCE, *GREEDY, "--dtype", "bfloat16").code == 0


def test_kv_memory(cli):
    """The cache has whole pages of 64 tokens, 524288 bytes each for this model."""
    cli("generate", "--prompt-ids", "5,6", "--kv-memory", "1000kB", *GREEDY[:2], "--max-tokens", "100").assert_error(
        4, "102 tokens", "the cache holds 64")
    assert cli("generate", "--prompt-ids", "5,6", "--kv-memory", "1.1 MB", *GREEDY[:2], "--max-tokens", "100").code == 0
    cli("generate", "--prompt-ids", "5,6", "--kv-memory", "0.5 MB", *GREEDY).assert_error(4, "cache")


def test_max_len(cli):
    ids = ",".join(["7"] * 9)
    [line] = cli("generate", "--prompt-ids", ids, "--max-len", "10", *GREEDY, "--ignore-eos", "--json").json
    assert len(line["token_ids"]) == 1 and line["finish_reason"] == "length"
    cli("generate", "--prompt-ids", ids + ",7", "--max-len", "10", *GREEDY).assert_error(2, "10 tokens", "9")


def test_without_a_tokenizer(cli, tiny):
    command = ("generate", tiny("mha"), "--prompt-ids", "1,2,3", "--prompt-ids", "4", *GREEDY)
    found = cli(*command, "--json").json
    assert [line["text"] for line in found] == [None, None] and len(found[0]["token_ids"]) == 12
    shown = "".join(",".join(map(str, line["token_ids"])) + "\n" for line in found)
    assert cli(*command).out == shown and cli(*command, "--stream").out == shown
    cli("generate", tiny("mha"), "-p", "text").assert_error(2, "no tokenizer.json")
    cli(*command, "--stop", "text").assert_error(2, "tokenizer.json")


# ---------------------------------------------------------------- the command itself

def python(code_or_module, *argv, cwd):
    return subprocess.run([sys.executable, *code_or_module, *argv], capture_output=True, text=True, timeout=120,
                          env=clean_environment(), cwd=cwd, stdin=subprocess.DEVNULL, check=False)


def test_module_and_command_are_the_same(tmp_path, greedy):
    scripts = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"cutp": "cutp.cli.main:main"}
    command = ["generate", "-p", ONCE, *GREEDY]
    script = "import sys; sys.argv[0] = 'cutp'; from cutp.cli.main import main; sys.exit(main())"
    by_module, by_script = (python(how, *command, cwd=tmp_path) for how in (["-m", "cutp"], ["-c", script]))
    assert by_module.stdout == by_script.stdout == lines(greedy[1:2])
    assert (by_module.returncode, by_module.stderr) == (by_script.returncode, by_script.stderr) == (0, "")
    helps = [python(how, "--help", cwd=tmp_path).stdout for how in (["-m", "cutp"], ["-c", script])]
    assert helps[0] == helps[1] and helps[0].startswith("usage: cutp ")


@pytest.mark.parametrize("command", ["generate", "score", "perplexity", "embed", "info"])
def test_help_ends_with_an_example_that_runs(cli, command, tmp_path):
    done = cli(command, "--help")
    last = done.out.rstrip("\n").split("\n")[-1]
    assert done.code == 0 and last.startswith("example: ")
    example = last.removeprefix("example: ")
    if why_no_mpirun() is not None:
        example = example.replace("mpirun -n 2 ", "")
    (tmp_path / "cutp").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m cutp "$@"\n')
    (tmp_path / "cutp").chmod(0o755)
    if find_mpirun():
        (tmp_path / "mpirun").write_text(f'#!/bin/sh\nexec {shlex.quote(find_mpirun())} "$@"\n')
        (tmp_path / "mpirun").chmod(0o755)
    env = clean_environment()
    env["PATH"] = f"{tmp_path}:{env['PATH']}"
    env.update(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1",
               PRTE_MCA_rmaps_default_mapping_policy=":oversubscribe")
    ran = subprocess.run(["sh", "-c", example], capture_output=True, text=True, timeout=120, env=env, cwd=tmp_path,
                         stdin=subprocess.DEVNULL, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    if command == "generate":
        assert ran.stdout.startswith(ONCE) and len(ran.stdout) > 60
    elif command == "score":
        assert json.loads((tmp_path / "scores.jsonl").read_text())["id"] == 1
    elif command == "perplexity":
        assert ran.stdout.count("\n") == 3 and ran.stdout.split("\n")[1].endswith(" tale.txt")
    elif command == "embed":
        assert np.load(tmp_path / "vectors.npy").shape == (1, 256)
    else:
        assert "LlamaForCausalLM" in ran.stdout


def test_version(cli):
    assert re.fullmatch(r"cutp \d+\.\d+\.\d+\n", cli("--version").out)


def test_output_whose_reader_went_away(tmp_path):
    command = (f"{shlex.quote(sys.executable)} -m cutp generate --prompt-ids 5 --max-tokens 300 --ignore-eos --stream "
               "| head -c 1")
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=120, check=False,
                          env=clean_environment(), cwd=tmp_path, stdin=subprocess.DEVNULL)
    assert len(done.stdout) == 1 and "Traceback" not in done.stderr and "Exception" not in done.stderr
