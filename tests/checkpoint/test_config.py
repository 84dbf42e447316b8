"""config.json and generation_config.json: every value is checked, every error names file, key and value."""

import json

import pytest

from cutp.checkpoint import GenerationDefaults, ModelConfig, load_config, load_generation_config, resolve_model
from cutp.errors import ModelConfigError, UnsupportedModelError

GETTERS = ["positive_int", "non_negative_int", "positive_float", "non_negative_float", "boolean", "string",
           "positive_floats", "strings", "token_ids", "section"]  # fmt: skip
# value: the getters that accept it
VALUES = [
    (0, {"non_negative_int", "non_negative_float", "token_ids"}),
    (1, {"positive_int", "non_negative_int", "positive_float", "non_negative_float", "token_ids"}),
    (-1, set()),
    (2**31, {"positive_int", "non_negative_int", "positive_float", "non_negative_float"}),
    (2**31 + 1, {"positive_float", "non_negative_float"}),
    (10**400, set()),
    (0.0, {"non_negative_float"}),
    (1e-5, {"positive_float", "non_negative_float"}),
    (8.0, {"positive_float", "non_negative_float"}),
    (-1.5, set()),
    (float("nan"), set()),
    (float("inf"), set()),
    (True, {"boolean"}),
    (False, {"boolean"}),
    ("", set()),
    ("4096", {"string"}),
    ([], {"strings", "token_ids"}),
    ([1, 2], {"positive_floats", "token_ids"}),
    ([1.5, 2], {"positive_floats"}),
    ([1, True], set()),
    ([1, None], set()),
    ([-1], set()),
    (["a"], {"strings"}),
    (["a", 1], set()),
    ({}, {"section"}),
    ({"a": 1}, {"section"}),
]


@pytest.mark.parametrize("getter", GETTERS)
@pytest.mark.parametrize(("value", "accepted"), VALUES, ids=lambda v: repr(sorted(v) if isinstance(v, set) else v)[:20])
def test_value_table(getter, value, accepted):
    config = ModelConfig({"key": value}, "/m/config.json")
    if getter in accepted:
        getattr(config, getter)("key")
    else:
        for default in ((), (None,)):  # a bad value is an error even where a missing one is not
            with pytest.raises(ModelConfigError) as caught:
                getattr(config, getter)("key", *default)
            message = str(caught.value)
            assert "key in /m/config.json is" in message and "must be" in message and repr(value)[:70] in message


@pytest.mark.parametrize("getter", GETTERS)
def test_absent_and_null(getter):
    for raw, word in (({}, "missing"), ({"key": None}, "null")):
        config = ModelConfig(raw)
        assert getattr(config, getter)("key", None) is None
        with pytest.raises(ModelConfigError, match=word):
            getattr(config, getter)("key")
        assert "key" not in config


def test_types_of_results():
    config = ModelConfig({"one": 1, "list": [3, 3, 4], "text": {"hidden_size": "x"}})
    assert type(config.positive_float("one", 1)) is float
    assert config.positive_int("absent", 7) == 7
    assert config.token_ids("one") == (1,) and config.token_ids("list") == (3, 4)
    assert config.choice("one", (1, 2)) == 1
    for allowed in ((2, 3), (True, 2), (1.0,)):
        with pytest.raises(ModelConfigError, match="one of"):
            config.choice("one", allowed)
    with pytest.raises(ModelConfigError, match=r"text\.hidden_size in config.json is 'x'"):
        config.section("text").positive_int("hidden_size")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "JSON"),
        ("[]", "list"),
        ("3", "int"),
        ('{"a": 1,}', "line 1"),
        ('{"a": 1, "a": 2}', "duplicate key 'a'"),
        ('{"a": {"b": 1, "b": 2}}', "duplicate key 'b'"),
        ('{"a": NaN}', "NaN"),
        ('{"a": -Infinity}', "Infinity"),
        ("[" * 100_000, "deeply"),
        ('{"a": ' + "1" * 10_000 + "}", "digits"),
        ('{"architectures": "Llama"}', "architectures"),
        ('{"architectures": [3]}', "architectures"),
        ('{"model_type": 3}', "model_type"),
        ('{"torch_dtype": 16}', "torch_dtype"),
    ],
)
def test_malformed_file(tmp_path, text, word):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelConfigError, match=word) as caught:
        load_config(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_missing_and_binary_file(tmp_path):
    with pytest.raises(ModelConfigError, match="no config.json"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\x80\x81")
    with pytest.raises(ModelConfigError, match="UTF-8"):
        load_config(tmp_path)


def test_identity(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"architectures": ["LlamaForCausalLM", "x"], "model_type": "llama", "torch_dtype": "float16"}')
    config = load_config(tmp_path)
    assert (config.architecture, config.model_type, config.torch_dtype, config.path) == (
        "LlamaForCausalLM", "llama", "float16", path,
    )  # fmt: skip
    path.write_text('{"dtype": "torch.bfloat16", "architectures": null}')
    config = load_config(tmp_path)
    assert (config.architecture, config.model_type, config.torch_dtype) == (None, None, "bfloat16")


def test_quantized(tmp_path):
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "gptq", "bits": 4}}')
    config = load_config(tmp_path)
    for readable in ((), ("mxfp4",)):
        with pytest.raises(UnsupportedModelError, match="config.json.*gptq"):
            config.check_quantization(readable)
    config.check_quantization(("mxfp4", "gptq"))
    (tmp_path / "config.json").write_text('{"quantization_config": null}')
    load_config(tmp_path).check_quantization()
    (tmp_path / "config.json").write_text('{"quantization_config": ["mxfp4"]}')
    with pytest.raises(UnsupportedModelError, match="quantized"):
        load_config(tmp_path).check_quantization(("mxfp4",))


class TestGeneration:
    def load(self, directory, config, generation=None):
        if generation is not None:
            (directory / "generation_config.json").write_text(json.dumps(generation))
        return load_generation_config(directory, ModelConfig(config, directory / "config.json"))

    def test_bundled(self):
        directory = resolve_model(None)
        assert load_generation_config(directory, load_config(directory)) == GenerationDefaults(
            temperature=0.8, top_p=0.95, do_sample=True, eos_token_ids=(2,), bos_token_id=1, pad_token_id=3
        )

    def test_missing_file_takes_ids_from_the_config(self, tmp_path):
        found = self.load(tmp_path, {"eos_token_id": [2, 3], "bos_token_id": 1, "pad_token_id": -1})
        assert found == GenerationDefaults(eos_token_ids=(2, 3), bos_token_id=1)

    def test_file_wins_over_the_config(self, tmp_path):
        generation = {"eos_token_id": [7, 8, 7], "bos_token_id": None, "top_k": 20, "max_new_tokens": 64,
                      "repetition_penalty": 1.05, "min_p": 0, "temperature": 0, "min_new_tokens": 3}  # fmt: skip
        found = self.load(tmp_path, {"eos_token_id": 2, "bos_token_id": 1, "vocab_size": 9}, generation)
        assert found == GenerationDefaults(
            temperature=0.0, top_k=20, min_p=0.0, eos_token_ids=(7, 8), bos_token_id=1, max_new_tokens=64,
            repetition_penalty=1.05, min_new_tokens=3,
        )  # fmt: skip

    @pytest.mark.parametrize(
        "bad",
        [{"temperature": -1}, {"temperature": "hot"}, {"top_k": 1.5}, {"top_k": -1}, {"top_p": 1.5}, {"min_p": 2},
         {"do_sample": 1}, {"eos_token_id": "2"}, {"eos_token_id": [2, "3"]},
         {"bos_token_id": [1, 2]}, {"pad_token_id": "x"}, {"max_new_tokens": 0}, {"repetition_penalty": 0},
         {"min_new_tokens": -1}],
    )  # fmt: skip
    def test_bad_values(self, tmp_path, bad):
        (key,) = bad
        with pytest.raises(ModelConfigError, match=f"{key} in .*generation_config.json"):
            self.load(tmp_path, {"vocab_size": 9}, bad)

    def test_ids_outside_the_vocabulary_are_not_applied(self, tmp_path):
        config = {"vocab_size": 9, "bos_token_id": 8, "eos_token_id": 9}
        found = self.load(tmp_path, config, {"eos_token_id": [9, 3], "bos_token_id": 77})
        assert (found.eos_token_ids, found.bos_token_id) == ((3,), 8)
        assert found.not_applied == ("eos_token_id 9, beyond vocab_size 9", "bos_token_id 77, beyond vocab_size 9")
        assert self.load(tmp_path, config, {}).eos_token_ids == ()

    def test_what_is_not_applied_is_named(self, tmp_path):
        generation = {"num_beams": 4, "typical_p": 0.9, "no_repeat_ngram_size": 3, "suppress_tokens": [1, 2],
                      "forced_eos_token_id": 2, "guidance_scale": 1.5, "temperature": 0.5, "max_length": 4096,
                      "bad_words_ids": [[i] for i in range(99)], "transformers_version": "4.40.0"}  # fmt: skip
        found = self.load(tmp_path, {}, generation).not_applied
        assert found[:-1] == ("num_beams 4", "guidance_scale 1.5", "typical_p 0.9", "no_repeat_ngram_size 3",
                              found[4], "suppress_tokens [1, 2]")
        assert found[-1] == "forced_eos_token_id 2" and found[4].startswith("bad_words_ids [[0], [1]")
        assert max(map(len, found)) < 80

    def test_values_that_ask_for_nothing_are_not_named(self, tmp_path):
        generation = {"num_beams": 1, "typical_p": 1.0, "no_repeat_ngram_size": 0, "suppress_tokens": [],
                      "min_length": 0, "forced_eos_token_id": None, "sequence_bias": {}, "guidance_scale": 1,
                      "epsilon_cutoff": 0.0, "renormalize_logits": True, "use_cache": True,
                      "token_healing": False}  # fmt: skip
        assert self.load(tmp_path, {}, generation).not_applied == ()

    def test_damaged_file(self, tmp_path):
        (tmp_path / "generation_config.json").write_text("{")
        with pytest.raises(ModelConfigError, match="generation_config.json"):
            load_generation_config(tmp_path, ModelConfig({}))
