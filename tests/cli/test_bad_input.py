"""Every kind of bad input has its own one-line error and exit status: 3 for the model, 2 for the request."""

import json
import pickle
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cutp.cli.main import main
from cutp.errors import DeviceError
from tests.mpirun import clean_environment

REQUEST = ("--prompt-ids", "1,2,3", "--max-tokens", "2", "--temperature", "0")


@pytest.fixture
def model(tiny, tmp_path):
    """A copy of a tiny checkpoint that may be broken."""
    return shutil.copytree(tiny("mha"), tmp_path / "model")


def config(**changes):
    """A way to break a model: these entries of config.json."""

    def change(directory):
        file = directory / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def tensors(edit):
    """A way to break a model: edit({name: array}) changes its tensors."""

    def change(directory):
        held = load_file(directory / "model.safetensors")
        edit(held)
        save_file(held, directory / "model.safetensors")

    return change


def header(edit):
    """A way to break a model: edit(header length, header, data) gives the bytes of the weights file."""

    def change(directory):
        file = directory / "model.safetensors"
        raw = file.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        file.write_bytes(edit(length, raw[8 : 8 + length], raw[8 + length :]))

    return change


def text_of_config(text):
    def change(directory):
        (directory / "config.json").write_text(text)

    return change


def remove(name):
    return lambda directory: (directory / name).unlink()


class _Trap:
    def __reduce__(self):
        return exec, ("raise SystemExit('a pickle was opened')",)


def only_a_pickle(directory):
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(_Trap()))


def tokenizer_class(directory):
    (directory / "tokenizer.json").write_text("{}")


Q = "model.layers.1.self_attn.q_proj"
BAD_MODELS = {
    "no config": (remove("config.json"), "no config.json"),
    "no weights": (remove("model.safetensors"), "no *.safetensors"),
    "missing tensor": (tensors(lambda t: t.pop(f"{Q}.weight")), f"no tensor '{Q}.weight'"),
    "no head": (tensors(lambda t: t.pop("lm_head.weight")), "no tensor 'lm_head.weight'"),
    "wrong shape": (tensors(lambda t: t.update({f"{Q}.weight": np.zeros((64, 32), np.float32)})),
                    f"'{Q}.weight' in", "[64, 32]", "[64, 64]"),
    "transposed": (tensors(lambda t: t.update({"lm_head.weight": t["lm_head.weight"].T.copy()})), "[64, 512]"),
    "other vocabulary": (config(vocab_size=500), "'model.embed_tokens.weight'", "[512, 64]", "[500, 64]"),
    "integer weights": (tensors(lambda t: t.update({"model.norm.weight": np.zeros(64, np.int32)})),
                        "'model.norm.weight'", "int32"),
    "extra bias": (tensors(lambda t: t.update({f"{Q}.bias": np.zeros(64, np.float32)})), f"'{Q}.bias'"),
    "missing bias": (config(attention_bias=True), "no tensor", "bias"),
    "more layers": (config(num_hidden_layers=3), "no tensor 'model.layers.2."),
    "billions of layers": (config(num_hidden_layers=2**31), "num_hidden_layers", "2147483648"),
    "truncated": (header(lambda n, h, d: struct.pack("<Q", n) + h + d[:-1]), "model.safetensors"),
    "truncated header": (header(lambda n, h, d: struct.pack("<Q", n) + h[:100]), "model.safetensors"),
    "empty file": (header(lambda n, h, d: b""), "model.safetensors"),
    "longer than described": (header(lambda n, h, d: struct.pack("<Q", n) + h + d + b"1234"), "model.safetensors"),
    "header not JSON": (header(lambda n, h, d: struct.pack("<Q", n) + b"x" * n + d), "model.safetensors"),
    "huge header": (header(lambda n, h, d: struct.pack("<Q", 2**63) + h + d), "model.safetensors"),
    "unknown dtype": (header(lambda n, h, d: struct.pack("<Q", n) + h.replace(b"F32", b"F33") + d),
                      "model.safetensors", "F33"),
    "a pickle in disguise": (header(lambda n, h, d: pickle.dumps(_Trap())), "model.safetensors"),
    "only a pickle": (only_a_pickle, "pytorch_model.bin", "never opens"),
    "unknown architecture": (config(architectures=["MambaForCausalLM"]), "'MambaForCausalLM'", "LlamaForCausalLM"),
    "no architecture": (config(architectures=None, model_type="mamba"), "'mamba'"),
    "architectures no list": (config(architectures="LlamaForCausalLM"), "architectures", "list of strings"),
    "code for the model": (config(auto_map={"AutoModelForCausalLM": "evil.Model"}), "auto_map", "evil.Model"),
    "quantized": (config(quantization_config={"quant_method": "gptq", "bits": 4}), "gptq"),
    "unknown rope type": (config(rope_scaling={"rope_type": "spiral", "factor": 2.0}), "'spiral'"),
    "rope without a factor": (config(rope_scaling={"rope_type": "linear"}), "factor"),
    "rope factor too large": (config(rope_scaling={"rope_type": "linear", "factor": 1e308}), "config.json", "1e+308"),
    "rope factor a string": (config(rope_scaling={"rope_type": "linear", "factor": "2"}), "factor", "'2'"),
    "zero theta": (config(rope_theta=0), "rope_theta"),
    "zero heads": (config(num_attention_heads=0), "num_attention_heads", " 0,"),
    "no heads": (config(num_attention_heads=None), "num_attention_heads", "null"),
    "zero kv heads": (config(num_key_value_heads=0), "num_key_value_heads", " 0,"),
    "kv heads": (config(num_key_value_heads=3), "num_key_value_heads 3"),
    "more kv heads than heads": (config(num_key_value_heads=8), "num_key_value_heads 8"),
    "heads do not divide": (config(num_attention_heads=3, num_key_value_heads=3), "hidden_size 64"),
    "odd head_dim": (config(head_dim=15), "15"),
    "huge head_dim": (config(head_dim=2**31), "q_proj"),
    "negative layers": (config(num_hidden_layers=-2), "num_hidden_layers", "-2"),
    "zero layers": (config(num_hidden_layers=0), "num_hidden_layers"),
    "size a string": (config(hidden_size="64"), "hidden_size", "'64'"),
    "size a float": (config(hidden_size=64.0), "hidden_size", "64.0"),
    "size a bool": (config(intermediate_size=True), "intermediate_size", "True"),
    "size a list": (config(hidden_size=[64]), "hidden_size", "[64]"),
    "size too large": (config(hidden_size=2**40), "hidden_size", str(2**40)),
    "zero vocabulary": (config(vocab_size=0), "vocab_size"),
    "zero context": (config(max_position_embeddings=0), "max_position_embeddings"),
    "NaN epsilon": (config(rms_norm_eps=float("nan")), "config.json", "NaN"),
    "epsilon a string": (config(rms_norm_eps="1e-5"), "rms_norm_eps", "'1e-5'"),
    "negative epsilon": (config(rms_norm_eps=-1e-5), "rms_norm_eps", "-1e-05"),
    "unknown activation": (config(hidden_act="wobble"), "'wobble'"),
    "bias a string": (config(attention_bias="no"), "attention_bias", "'no'"),
    "tied a string": (config(tie_word_embeddings="yes"), "tie_word_embeddings", "'yes'"),
    "config not JSON": (text_of_config("{"), "config.json", "not valid JSON"),
    "config a list": (text_of_config("[]"), "config.json", "not an object"),
    "config too deep": (text_of_config('{"a": ' + "[" * 100_000), "config.json"),
    "damaged tokenizer": (tokenizer_class, "tokenizer.json"),
}
# What `info` does not look at.
NOT_FOR_INFO = {"damaged tokenizer"}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_bad_model(cli, model, name):
    change, *parts = BAD_MODELS[name]
    change(model)
    commands = [("generate", model, *REQUEST)] + [("info", model)] * (name not in NOT_FOR_INFO)
    for command in commands:
        cli(*command).assert_error(3, *parts)


def test_every_bad_model_has_its_own_message(model, tiny, cli):
    said = {}
    for name, (change, *_) in BAD_MODELS.items():
        shutil.rmtree(model)
        shutil.copytree(tiny("mha"), model)
        change(model)
        said.setdefault(cli("generate", model, *REQUEST).err, []).append(name)
    assert {tuple(names) for names in said.values() if len(names) > 1} == set()


def test_no_gpu(cli, monkeypatch):
    def cupy():
        raise DeviceError("no NVIDIA driver was found", hint="use --device cpu")

    monkeypatch.setattr("cutp.array.cuda.cupy", cupy)
    cli("generate", *REQUEST, "--device", "cuda").assert_error(4, "no NVIDIA driver was found (use --device cpu)")


def test_no_model(cli, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in (tmp_path / "none", "./none", "some-org/some-model"):
        for command in (("generate", name, *REQUEST), ("info", name)):
            cli(*command).assert_error(3, name if name != "./none" else "none")
    (tmp_path / "empty").mkdir()
    cli("info", tmp_path / "empty").assert_error(3, tmp_path / "empty", "config.json")
    (tmp_path / "file.gguf").write_text("")
    cli("info", tmp_path / "file.gguf").assert_error(3, "GGUF")


@pytest.mark.parametrize(("options", "parts"), [
    (["--bogus"], ["--bogus"]),
    (["--max-token", "3"], ["--max-token"]),
    (["--device", "tpu"], ["--device", "tpu"]),
    (["--kv-memory", "20 apples"], ["kv_memory", "'20 apples'", "20GB"]),
    (["--dtype", "int4"], ["'int4'", "bfloat16"]),
    (["--tp", "2"], ["tp=2", "1 ranks"]),
    (["--tp", "99"], ["tp=99", "choose a tp of 1"]),
    (["--tp", "x"], ["--tp", "'x'"]),
    (["--max-len", "0"], ["--max-len", "0"]),
    (["--temperature", "-1"], ["temperature", "-1"]),
    (["--temperature", "nan"], ["temperature", "nan"]),
    (["--temperature", "inf"], ["temperature", "inf"]),
    (["--temperature", "warm"], ["--temperature", "'warm'"]),
    (["--top-p", "0"], ["top_p", "0.0"]),
    (["--top-p", "1.5"], ["top_p", "1.5"]),
    (["--top-p", "nan"], ["top_p", "nan"]),
    (["--top-k", "-1"], ["top_k", "-1"]),
    (["--top-k", "1.5"], ["--top-k", "'1.5'"]),
    (["--min-p", "-0.1"], ["min_p", "-0.1"]),
    (["--min-p", "1.1"], ["min_p", "1.1"]),
    (["--seed", "-1"], ["seed", "-1"]),
    (["--seed", str(2**64)], ["seed", str(2**64)]),
    (["--max-tokens", "0"], ["--max-tokens", "0"]),
    (["--max-tokens", "-3"], ["--max-tokens", "-3"]),
    (["--max-tokens", str(2**40)], ["max_tokens", str(2**40)]),
    (["--stop", ""], ["stop", "''"]),
    (["--prompt-ids", "512"], ["token id 512", "0 .. 511"]),
    (["--prompt-ids=-1,2"], ["token id -1"]),
    (["--prompt-ids", str(2**70)], ["prompt 1"]),
    (["--prompt-ids", ""], ["--prompt-ids", "''"]),
    (["--prompt-ids", "1,,2"], ["--prompt-ids", "'1,,2'"]),
    (["--prompt-ids", "1;2"], ["--prompt-ids", "'1;2'"]),
    (["--prompt-ids", ",".join(["5"] * 128)], ["prompt 1", "128 tokens", "127"]),
])
def test_bad_request(cli, tiny, options, parts):
    cli("generate", tiny("mha"), "--prompt-ids", "1,2,3", *options).assert_error(2, *parts)


@pytest.mark.parametrize("command", [[], ["paint"], ["generate"], ["score"], ["info", "a", "b"], ["--bogus"]])
def test_bad_usage(cli, command):
    cli(*command).assert_error(2)


def test_longest_prompt(cli, tiny):
    done = cli("generate", tiny("mha"), "--prompt-ids", ",".join(["5"] * 127), "--temperature", "0", "--json")
    assert done.code == 0 and len(done.json[0]["token_ids"]) == 1 and done.json[0]["finish_reason"] == "length"


def test_empty_prompt(cli):
    cli("generate", "-p", "fine", "-p", "").assert_error(2, "prompt 1 is empty")


def test_prompt_that_is_not_text(cli):
    cli("generate", "-p", "fine", "-p", "half \udcff of it").assert_error(2, "prompt 1", "surrogate")


def test_a_bug_shows_its_traceback(capsys, monkeypatch):
    def explode(*_):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("cutp.models.describe.describe_model", explode)
    with pytest.raises(SystemExit) as exit_:
        main(["info"])
    err = capsys.readouterr().err
    assert exit_.value.code == 1 and "in explode" in err and err.startswith("ZeroDivisionError: a bug\n")


@pytest.mark.parametrize(("code", "argv", "part"), [
    (3, ["generate", "/no/such/model", "-p", "a"], "/no/such/model"),
    (3, ["info", "no-org/no-model"], "no-org/no-model"),
    (2, ["generate", "-p", "a", "--bogus"], "--bogus"),
    (2, ["generate", "--prompt-ids", "99999"], "99999"),
    (2, ["generate", "-p", "a", "--top-p", "0"], "top_p"),
])
def test_as_a_process(code, argv, part, tmp_path):
    done = subprocess.run([sys.executable, "-m", "cutp", *argv], capture_output=True, text=True, timeout=120,
                          env=clean_environment({"HF_HUB_CACHE": str(tmp_path)}), cwd=tmp_path,
                          stdin=subprocess.DEVNULL, check=False)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith("cutp: error: ") and part in done.stderr and done.stderr.count("\n") == 1
