"""Which family a config.json belongs to, families from outside the package, and what is said when there is none."""

import inspect
import pathlib
import re
from dataclasses import replace

import numpy as np
import pytest

import cutp.models
from cutp.checkpoint import ModelConfig
from cutp.comm.device_group import DeviceGroup
from cutp.errors import ConfigError, ModelConfigError, UnsupportedModelError
from cutp.models import registry
from cutp.models.registry import ModelFamily, families, find_family, register

BUILT_IN = {"Cohere2ForCausalLM", "DeepseekV3ForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM",
            "Glm4ForCausalLM", "GptOssForCausalLM", "GraniteForCausalLM", "LlamaForCausalLM", "MistralForCausalLM",
            "MixtralForCausalLM", "Olmo2ForCausalLM", "Phi3ForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM",
            "Qwen3MoeForCausalLM", "SmolLM3ForCausalLM"}


@pytest.fixture(autouse=True)
def nothing_stays_registered(monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})


def config(**raw):
    return ModelConfig(raw, "somewhere/config.json")


def mine(architecture="MineForCausalLM", model_type="mine"):
    llama = families()["LlamaForCausalLM"]
    return replace(llama, architecture=architecture, model_type=model_type)


def test_every_built_in_family_is_found_by_both_names():
    known = families()
    assert known.keys() >= BUILT_IN
    for architecture, family in known.items():
        assert family.architecture == architecture
        assert find_family(config(architectures=[architecture])) is family
        assert find_family(config(architectures=[architecture], model_type="anything")) is family
    for name in ("llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "olmo2", "mixtral", "gpt_oss"):
        for raw in (dict(model_type=name), dict(model_type=name, architectures=[]), dict(
                model_type=name, architectures=None)):
            assert find_family(config(**raw)).model_type == name


@pytest.mark.parametrize("raw, name", [
    (dict(architectures=["BertModel"]), "'BertModel'"),
    # A known model_type with another head is no language model.
    (dict(architectures=["LlamaForSequenceClassification"], model_type="llama"), "'LlamaForSequenceClassification'"),
    (dict(model_type="bert"), "'bert'"),
    ({}, "None"),
])
def test_an_unknown_architecture_names_what_exists(raw, name):
    with pytest.raises(UnsupportedModelError) as error:
        find_family(config(**raw))
    text = str(error.value)
    assert re.search(rf"somewhere/config\.json: architecture {name} is not implemented", text)
    assert all(known in text for known in BUILT_IN) and "cutp/models/README.md" in text
    register(mine())
    with pytest.raises(UnsupportedModelError, match="MineForCausalLM"):
        find_family(config(**raw))


def test_a_family_from_outside():
    with pytest.raises(UnsupportedModelError):
        find_family(config(architectures=["MineForCausalLM"]))
    family = mine()
    register(family)
    assert find_family(config(architectures=["MineForCausalLM"])) is family
    assert find_family(config(model_type="mine")) is family
    later = mine()
    register(later)
    assert find_family(config(architectures=["MineForCausalLM"])) is later


def test_a_registered_family_goes_before_a_built_in_one():
    own, other = mine("LlamaForCausalLM", "llama"), mine("OtherForCausalLM", "qwen3")
    register(own)
    register(other)
    assert find_family(config(architectures=["LlamaForCausalLM"])) is own is find_family(config(model_type="llama"))
    assert find_family(config(model_type="qwen3")) is other
    assert find_family(config(architectures=["Qwen3ForCausalLM"])).architecture == "Qwen3ForCausalLM"


@pytest.mark.parametrize("wrong", [None, "LlamaForCausalLM", dict(architecture="A"), ModelFamily])
def test_only_a_family_can_be_registered(wrong):
    with pytest.raises(ConfigError, match="must be a ModelFamily, not"):
        register(wrong)
    assert families().keys() >= BUILT_IN


@pytest.mark.parametrize("change, message", [
    (dict(architecture=""), "architecture of a model family is '', not a name"),
    (dict(architecture=["A"]), r"architecture of a model family is \['A'\]"),
    (dict(model_type=None), "model_type of a model family is None"),
    (dict(sizes=None), "sizes of the model family LlamaForCausalLM is None, not a function"),
    (dict(build=3), "build of the model family LlamaForCausalLM is 3"),
    (dict(checkpoint_name="model."), "checkpoint_name of the model family LlamaForCausalLM is 'model.'"),
])
def test_parts_of_a_family_are_checked(change, message):
    with pytest.raises(ConfigError, match=message):
        replace(families()["LlamaForCausalLM"], **change)


def test_architectures_must_be_a_list():
    with pytest.raises(ModelConfigError, match="architectures"):
        find_family(config(architectures="LlamaForCausalLM"))


@pytest.mark.parametrize("architecture", sorted(BUILT_IN))
def test_a_family_is_one_short_file_that_knows_of_no_ranks(architecture):
    source = inspect.getsource(inspect.getmodule(families()[architecture].build))
    assert len(source.splitlines()) < 150
    code = re.sub(r'""".*?"""', "", source, flags=re.DOTALL)
    assert not re.search(r"\branks?\b|\.size\b|all_reduce|all_gather|local_(ranks|devices|shape)", code)


def test_the_example_of_the_readme_builds():
    text = (pathlib.Path(cutp.models.__file__).parent / "README.md").read_text()
    code, last = re.search(r"```python\n(.*)(llm = LLM.*?)```", text, re.DOTALL).groups()
    assert len(text.splitlines()) <= 60 and last.count("\n") == 1
    exec(code, {})
    raw = config(architectures=["MyForCausalLM"], hidden_size=24, intermediate_size=20, num_hidden_layers=4,
                 num_attention_heads=3, vocab_size=32, sliding_window=8)
    family = find_family(raw)
    model = family.build(raw, DeviceGroup.planned(3, 1), np.dtype(np.float32), 64)
    attentions = [layer.self_attn.shards[0] for layer in model.layers]
    assert [attention.window for attention in attentions] == [8, 8, 8, None]
    assert [attention.rope is None for attention in attentions] == [False, False, False, True]
    assert family.checkpoint_name("layers.0.mlp.up_proj.weight") == "model.layers.0.feed_forward.up_proj.weight"
