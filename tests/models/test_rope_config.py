"""Both spellings of rotary parameters mean the same."""

import pytest

from cutp.checkpoint import ModelConfig
from cutp.errors import ModelConfigError, UnsupportedModelError
from cutp.models.rope_config import rope_parameters, rope_parameters_by_layer_type
from cutp.nn.rope_parameters import RopeParameters

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32768, "beta_fast": 16, "mscale": 1.0, "truncate": False}
LONG = {"short_factor": [1.0, 1.5], "long_factor": [2, 3.5], "original_max_position_embeddings": 4096}
CASES = {
    "default": ({}, RopeParameters(theta=5e5)),
    "linear": ({"factor": 2}, RopeParameters("linear", 5e5, 2.0)),
    "dynamic": ({"factor": 2.5}, RopeParameters("dynamic", 5e5, 2.5)),
    "llama3": (LLAMA3, RopeParameters("llama3", 5e5, 8.0, 8192, 1.0, 4.0)),
    "yarn": (YARN, RopeParameters("yarn", 5e5, 4.0, 32768, beta_fast=16.0, mscale=1.0, truncate=False)),
    "longrope": (
        LONG, RopeParameters("longrope", 5e5, 32.0, 4096, short_factor=(1.0, 1.5), long_factor=(2.0, 3.5)),
    ),
}  # fmt: skip


def parse(raw, **options):
    return rope_parameters(ModelConfig({"max_position_embeddings": 131072, **raw}, "config.json"), **options)


@pytest.mark.parametrize("kind", CASES)
def test_all_spellings_are_equal(kind):
    fields, wanted = CASES[kind]
    assert parse({"rope_parameters": {"rope_type": kind, "rope_theta": 500000, **fields}}) == wanted
    assert parse({"rope_theta": 5e5, "rope_scaling": {"rope_type": kind, **fields}}) == wanted
    assert parse({"rope_theta": 5e5, "rope_scaling": {"type": kind, **fields}}) == wanted
    assert parse({"rope_theta": 5e5, "rope_parameters": {"rope_type": kind, **fields}}) == wanted
    assert parse({"rope_scaling": {"rope_type": kind, "rope_theta": 5e5, **fields}}) == wanted


def test_absence():
    assert parse({}) == RopeParameters()
    assert parse({"rope_theta": 1e6, "rope_scaling": None}) == RopeParameters(theta=1e6)
    assert parse({"rope_theta": 1e6, "rope_scaling": {}, "rope_parameters": None}) == RopeParameters(theta=1e6)
    assert parse({}, default_theta=1e6, default_partial_rotary_factor=0.5) == RopeParameters(
        theta=1e6, partial_rotary_factor=0.5
    )


def test_precedence():
    raw = {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.25}}
    assert parse({**raw, "partial_rotary_factor": 0.5}) == RopeParameters(theta=1e6, partial_rotary_factor=0.25)
    assert parse({"partial_rotary_factor": 0.5}).partial_rotary_factor == 0.5
    both = {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"type": "linear", "factor": 3}}
    assert parse(both).factor == 2.0
    assert parse({"rope_scaling": {"rope_type": "linear", "type": "default", "factor": 2}}).rope_type == "linear"


def test_original_length():
    outside = {k: v for k, v in LONG.items() if k != "original_max_position_embeddings"}
    scaling = {"type": "su", **outside}  # the older name of longrope
    assert parse({"rope_scaling": scaling, "original_max_position_embeddings": 4096}) == parse(
        {"rope_scaling": {"type": "longrope", **LONG}}
    )
    assert parse({"rope_scaling": {"type": "su", **LONG}, "original_max_position_embeddings": 2048}).factor == 64.0
    assert parse({"rope_scaling": scaling}).original_max_position_embeddings == 131072
    yarn = {"rope_scaling": {"type": "yarn", "factor": None, "original_max_position_embeddings": 32768}}
    assert parse(yarn).factor == 4.0
    assert parse({"rope_scaling": {**LONG, "type": "longrope", "factor": 8, "attention_factor": 1.2}}).factor == 8.0
    zero = {"rope_scaling": {**YARN, "type": "yarn", "beta_fast": 0, "beta_slow": None}}
    assert (parse(zero).beta_fast, parse(zero).beta_slow) == (None, None)


@pytest.mark.parametrize(
    ("kind", "missing"),
    [("linear", "factor"), ("dynamic", "factor"), ("yarn", "factor"), ("llama3", "factor"),
     ("llama3", "low_freq_factor"), ("llama3", "high_freq_factor"), ("longrope", "short_factor"),
     ("longrope", "long_factor")],
)  # fmt: skip
def test_missing_fields(kind, missing):
    fields = {k: v for k, v in CASES[kind][0].items() if k != missing}
    with pytest.raises(ModelConfigError, match=f"rope_scaling.{missing} is missing in config.json"):
        parse({"rope_scaling": {"type": kind, **fields}})


@pytest.mark.parametrize(
    ("kind", "change"),
    [("linear", {"factor": 0}), ("linear", {"factor": "2"}), ("linear", {"factor": True}),
     ("default", {"rope_theta": 0}), ("default", {"rope_theta": 1}), ("default", {"partial_rotary_factor": 1.5}),
     ("llama3", {"high_freq_factor": 1.0}), ("llama3", {"original_max_position_embeddings": 0}),
     ("longrope", {"short_factor": [1.0]}), ("longrope", {"long_factor": [1.0, "x"]}),
     ("longrope", {"long_factor": [1.0, 0]}), ("yarn", {"truncate": 1}), ("yarn", {"beta_fast": -1})],
)  # fmt: skip
def test_bad_values(kind, change):
    with pytest.raises(ModelConfigError, match=f"rope_scaling.({'|'.join(change)}|short_factor)"):
        parse({"rope_scaling": {"type": kind, **CASES[kind][0], **change}})


def test_unknown_type_and_wrong_shape():
    with pytest.raises(UnsupportedModelError, match="'mrope'.*known types: default, linear"):
        parse({"rope_scaling": {"type": "mrope"}})
    for value in ("linear", [1], 3):
        with pytest.raises(ModelConfigError, match="rope_scaling"):
            parse({"rope_scaling": value})
    with pytest.raises(ModelConfigError, match="rope_type"):
        parse({"rope_scaling": {"rope_type": 3}})


LAYERS = ("full_attention", "sliding_attention")


def by_layer(raw):
    return rope_parameters_by_layer_type(ModelConfig({"max_position_embeddings": 131072, **raw}), LAYERS)


def test_nested_by_layer_type():
    nested = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    wanted = {"full_attention": RopeParameters("linear", 1e6, 8.0), "sliding_attention": RopeParameters()}
    assert by_layer({"rope_parameters": nested}) == wanted
    old = {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    assert by_layer(old) == wanted
    assert by_layer({"rope_theta": 1e6}) == dict.fromkeys(LAYERS, RopeParameters(theta=1e6))
    with pytest.raises(ModelConfigError, match="full_attention"):
        parse({"rope_parameters": nested})
    with pytest.raises(ModelConfigError, match=r"rope_parameters\.sliding_attention is missing"):
        by_layer({"rope_parameters": {"full_attention": nested["full_attention"]}})
    with pytest.raises(ModelConfigError, match=r"rope_parameters\.full_attention\.factor"):
        by_layer({"rope_parameters": {**nested, "full_attention": {"rope_type": "linear"}}})


@pytest.mark.parametrize("kind", CASES)
def test_mscale_all_dim_of_every_type_but_default(kind):
    """Latent attention scales its scores by it."""
    found = parse({"rope_scaling": {"rope_type": kind, "mscale_all_dim": 0.5, **CASES[kind][0]}})
    assert found.mscale_all_dim == (None if kind == "default" else 0.5)
