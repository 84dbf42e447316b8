"""The sampling options of `cutp generate`: each reaches the engine, changes the text, is refused by name when bad."""

import argparse
import dataclasses
import json
import re

import pytest

from cutp import LLM, SamplingParams
from cutp.cli.sampling_options import add_sampling_options, sampling_params

ONCE = "Once upon a time"
GREEDY = ("--temperature", "0", "--max-tokens", "12")


@pytest.fixture(scope="module")
def tales():
    with LLM() as llm:
        yield llm


@pytest.fixture(scope="module")
def greedy(tales):
    """The greedy continuation of ONCE."""
    [output] = tales.generate(ONCE, SamplingParams(temperature=0, max_tokens=12))
    return output


def parsed(*options, json=True):
    parser = argparse.ArgumentParser()
    add_sampling_options(parser)
    parser.set_defaults(json=json)
    return sampling_params(parser.parse_args(options))


def test_every_parameter_has_an_option():
    params = parsed(
        "--max-tokens", "9", "--min-tokens", "2", "--n", "3", "--temperature", "0.5", "--top-k", "4", "--top-p", "0.6",
        "--min-p", "0.1", "--seed", "5", "--repetition-penalty", "1.2", "--presence-penalty", "-0.5",
        "--frequency-penalty", "0.25", "--logit-bias", "7=-3", "--logit-bias", "3=1e1", "--bad-words", "a",
        "--bad-words", "b", "--bad-word-ids", "1,2", "--stop", "x", "--stop", "y", "--stop-token-ids", "8,9",
        "--ignore-eos", "--logprobs", "3", "--prompt-logprobs", "0")
    assert params == SamplingParams(
        max_tokens=9, min_tokens=2, n=3, temperature=0.5, top_k=4, top_p=0.6, min_p=0.1, seed=5,
        repetition_penalty=1.2, presence_penalty=-0.5, frequency_penalty=0.25, logit_bias={7: -3, 3: 10},
        bad_words=["a", "b", [1, 2]], stop=["x", "y"], stop_token_ids=[8, 9], ignore_eos=True, logprobs=3,
        prompt_logprobs=0)
    for field in dataclasses.fields(SamplingParams):
        assert getattr(params, field.name) != field.default, field.name


def test_without_options_everything_is_left_to_the_checkpoint():
    assert parsed() == SamplingParams()


@pytest.mark.parametrize("options, params", [
    (["--temperature", "1.3", "--seed", "4"], {"temperature": 1.3, "seed": 4}),
    (["--temperature", "2", "--seed", "4", "--top-k", "3"], {"temperature": 2, "seed": 4, "top_k": 3}),
    (["--repetition-penalty", "3", "--max-tokens", "25"], {"repetition_penalty": 3, "max_tokens": 25}),
    (["--presence-penalty", "2", "--max-tokens", "25"], {"presence_penalty": 2, "max_tokens": 25}),
    (["--frequency-penalty", "2", "--max-tokens", "25"], {"frequency_penalty": 2, "max_tokens": 25}),
    (["--logit-bias", "{first}=-100"], {"logit_bias": {"{first}": -100}}),
    (["--bad-words", "{word}"], {"bad_words": ["{word}"]}),
    (["--bad-word-ids", "{first}"], {"bad_words": [["{first}"]]}),
    (["--stop-token-ids", "{third}"], {"stop_token_ids": ["{third}"]}),
    (["--stop-token-ids", "{third}", "--min-tokens", "5"], {"stop_token_ids": ["{third}"], "min_tokens": 5}),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_an_option_does_what_the_parameter_does(cli, tales, greedy, options, params):
    names = {"{first}": greedy.token_ids[0], "{third}": greedy.token_ids[2], "{word}": greedy.text.split()[1]}

    def filled(value):
        if isinstance(value, list):
            return [filled(each) for each in value]
        if isinstance(value, dict):
            return {filled(key): filled(each) for key, each in value.items()}
        return names.get(value, value)

    for name, token in names.items():
        options = [option.replace(name, str(token)) for option in options]
    [output] = tales.generate(ONCE, SamplingParams(**{"temperature": 0, "max_tokens": 12, **filled(params)}))
    length = params.get("max_tokens", 12)
    [plain] = tales.generate(ONCE, SamplingParams(temperature=0, max_tokens=length))
    assert output.token_ids != plain.token_ids  # else this says nothing
    [line] = cli("generate", "-p", ONCE, *GREEDY, *options, "--json").json
    assert (line["token_ids"], line["text"]) == (list(output.token_ids), output.text)


# ---------------------------------------------------------------- several samples

def test_samples_of_two_prompts(cli, tales):
    options = ("-p", ONCE, "-p", "The king", "--n", "3", "--temperature", "1", "--seed", "5", "--max-tokens", "10")
    found = cli("generate", *options, "--json").json
    assert [(line["index"], line["sample_index"]) for line in found] == [(i, j) for i in range(2) for j in range(3)]
    outputs = tales.generate([ONCE, "The king"], [SamplingParams(temperature=1, n=3, seed=5 + i, max_tokens=10)
                                                  for i in range(2)])
    assert [line["token_ids"] for line in found] == [list(output.token_ids) for output in outputs]
    assert len({line["text"] for line in found}) == 6
    text = "".join((ONCE, "The king")[line["index"]] + line["text"] + "\n" for line in found)
    assert cli("generate", *options).out == text
    assert cli("generate", *options, "--stream").out == text


def test_samples_of_a_chat_and_of_token_ids(cli):
    options = ("--n", "2", "--temperature", "1", "--seed", "5", "--max-tokens", "5", "--prompt-ids", "1,9")
    texts = [line["text"] + "\n" for line in cli("generate", *options, "--json").json]
    assert cli("generate", *options).out == "".join(texts) and len(set(texts)) == 2


def test_one_sample_is_the_first_of_several(cli):
    options = ("-p", ONCE, "--temperature", "1", "--seed", "5", "--max-tokens", "10", "--json")
    [one], three = cli("generate", *options).json, cli("generate", *options, "--n", "3").json
    assert one == three[0]


# ---------------------------------------------------------------- seeds

def test_each_prompt_has_the_next_seed(cli):
    def texts(prompts, seed):
        options = [part for prompt in prompts for part in ("-p", prompt)]
        return [line["text"] for line in cli("generate", *options, "--temperature", "1", "--max-tokens", "12",
                                             "--seed", seed, "--json").json]

    found = texts([ONCE, ONCE, ONCE], 2**64 - 2)
    assert len(set(found)) == 3
    assert found == [*texts([ONCE], 2**64 - 2), *texts([ONCE], 2**64 - 1), *texts([ONCE], 0)]


def test_a_reported_seed_repeats_all_prompts(cli):
    command = ("generate", "-p", ONCE, "-p", ONCE, "--n", "2", "--max-tokens", "12", "--temperature", "1", "--json")
    first = cli(*command)
    [seed] = re.findall(r"^cutp: seed (\d+) ", first.err, re.M)
    again = cli(*command, "--seed", seed)
    texts = [line["text"] for line in first.json]
    assert first.err.count("\n") == 1 and [line["text"] for line in again.json] == texts
    assert len(set(texts)) == 4


def test_seed(cli):
    command = ("generate", "-p", ONCE, "-p", "There was a little tailor", "--max-tokens", "12", "--temperature", "1")
    runs = [cli(*command, "--seed", seed) for seed in (7, 7, 8, 2**64 - 1)]
    assert [run.code for run in runs] == [0] * 4 and [run.err for run in runs] == [""] * 4
    assert runs[0].out == runs[1].out and len({run.out for run in runs}) == 3


def test_reported_seed_repeats_the_run(cli):
    command = ("generate", "-p", ONCE, "--max-tokens", "16", "--temperature", "1.2")
    first, second = cli(*command), cli(*command)
    [seed] = re.findall(r"^cutp: seed (\d+) \(repeat this run with --seed \1\)$", first.err, re.M)
    assert first.err.count("\n") == 1 and second.out != first.out
    assert cli(*command, "--seed", seed).out == first.out


def test_temperature_zero_has_no_seed(cli, greedy):
    done = cli("generate", "-p", ONCE, *GREEDY)
    assert done.err == "" and done.out == ONCE + greedy.text + "\n"


@pytest.mark.parametrize("options", [["--top-k", "1"], ["--top-p", "1e-9"], ["--min-p", "1"]])
def test_cut_to_the_likeliest_token_is_greedy(cli, greedy, options):
    done = cli("generate", "-p", ONCE, "--temperature", "1.5", "--max-tokens", "12", "--seed", "3", *options)
    assert done.out == ONCE + greedy.text + "\n"


def test_defaults_come_from_the_checkpoint(cli, tales_copy, greedy):
    (tales_copy / "generation_config.json").write_text('{"do_sample": false, "max_new_tokens": 12}')
    assert cli("generate", tales_copy, "-p", ONCE).out == ONCE + greedy.text + "\n"


def test_stop(cli, greedy):
    text = greedy.text
    stop = text[len(text) // 2 :][:3]
    [line] = cli("generate", "-p", ONCE, *GREEDY, "--stop", "no such text", "--stop", stop, "--json").json
    assert line["text"] == text[: text.index(stop)] and line["finish_reason"] == "stop"
    assert line["token_ids"] == list(greedy.token_ids)[: len(line["token_ids"])]


def test_ignore_eos(cli, tales_copy, greedy):
    ids = list(greedy.token_ids)
    assert ids[4] not in ids[:4]
    (tales_copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, ids[4]]}))
    command = ("generate", tales_copy, "-p", ONCE, *GREEDY, "--json")
    [line] = cli(*command).json
    assert (line["token_ids"], line["finish_reason"]) == (ids[:5], "stop")
    [line] = cli(*command, "--ignore-eos").json
    assert (line["token_ids"], line["finish_reason"]) == (ids, "length")


# ---------------------------------------------------------------- log-probabilities

def test_logprobs(cli, tales, greedy):
    [line] = cli("generate", "-p", ONCE, *GREEDY, "--json", "--logprobs", "2", "--prompt-logprobs", "0").json
    [output] = tales.generate(ONCE, SamplingParams(temperature=0, max_tokens=12, logprobs=2, prompt_logprobs=0))
    assert line["logprobs"] == [{"token_id": e.token_id, "logprob": e.logprob, "top": [list(pair) for pair in e.top]}
                                for e in output.logprobs]
    assert [entry["token_id"] for entry in line["logprobs"]] == list(greedy.token_ids)
    assert all(len(entry["top"]) == 2 and entry["top"][0] == [entry["token_id"], entry["logprob"]]
               for entry in line["logprobs"])
    first, *others = line["prompt_logprobs"]
    [scored] = tales.score(ONCE)
    assert first is None and [entry["token_id"] for entry in others] == line["prompt_token_ids"][1:]
    assert [entry["logprob"] for entry in others] == pytest.approx(scored.logprobs[1:], abs=1e-4)
    assert all(entry["top"] == [] for entry in others)


@pytest.mark.parametrize("option", ["--logprobs", "--prompt-logprobs"])
def test_logprobs_are_for_json(cli, option):
    cli("generate", "-p", ONCE, option, "1").assert_error(2, f"{option} needs --json")


# ---------------------------------------------------------------- what the checkpoint asks for

def test_the_checkpoint_s_repetition_penalty(cli, tales_copy):
    options = ("-p", ONCE, "--temperature", "0", "--max-tokens", "25")
    expected = cli("generate", *options, "--repetition-penalty", "3").out
    (tales_copy / "generation_config.json").write_text('{"repetition_penalty": 3.0}')
    done = cli("generate", tales_copy, *options)
    assert done.out == expected != cli("generate", *options).out and done.err == ""
    assert cli("generate", tales_copy, *options, "--repetition-penalty", "1").out == cli("generate", *options).out


@pytest.mark.parametrize(("options", "parts"), [
    (["--n", "0"], ["n must", "0"]),
    (["--n", "129"], ["n must", "129"]),
    (["--n", "x"], ["--n", "'x'"]),
    (["--n", "2", "--temperature", "0"], ["n is 2", "temperature 0"]),
    (["--min-tokens", "-1"], ["min_tokens", "-1"]),
    (["--min-tokens", "9", "--max-tokens", "8"], ["min_tokens is 9", "max_tokens", "8"]),
    (["--min-tokens", "129"], ["min_tokens is 129", "128"]),
    (["--min-tokens", "40", "--max-tokens", "50", "--max-len", "20"], ["min_tokens is 40", "prompt 0"]),
    (["--repetition-penalty", "0"], ["repetition_penalty", "0"]),
    (["--repetition-penalty", "nan"], ["repetition_penalty", "nan"]),
    (["--presence-penalty", "3"], ["presence_penalty", "3"]),
    (["--frequency-penalty", "-3"], ["frequency_penalty", "-3"]),
    (["--frequency-penalty", "x"], ["--frequency-penalty", "'x'"]),
    (["--logit-bias", "5"], ["--logit-bias", "'5'", "42=-1.5"]),
    (["--logit-bias", "x=1"], ["--logit-bias", "'x=1'"]),
    (["--logit-bias", "5=x"], ["--logit-bias", "'5=x'"]),
    (["--logit-bias", "5=101"], ["logit_bias of token 5", "101"]),
    (["--logit-bias=-5=1"], ["logit_bias", "-5"]),
    (["--logit-bias", "5=1", "--logit-bias", "5=2"], ["logit_bias", "each token id once"]),
    (["--logit-bias", "99999=1"], ["logit_bias", "99999"]),
    (["--bad-words", " "], ["bad_words", "' '"]),
    (["--bad-word-ids", "1;2"], ["--bad-word-ids", "'1;2'"]),
    (["--bad-word-ids", "1,99999"], ["bad_words", "99999"]),
    (["--stop-token-ids", "x"], ["--stop-token-ids", "'x'"]),
    (["--stop-token-ids", "99999"], ["stop_token_ids", "99999"]),
    (["--logprobs", "21", "--json"], ["logprobs", "21"]),
    (["--prompt-logprobs", "-1", "--json"], ["prompt_logprobs", "-1"]),
], ids=" ".join)
def test_bad_values(cli, options, parts):
    cli("generate", "-p", ONCE, *options).assert_error(2, *parts)
