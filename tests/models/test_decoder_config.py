"""The sizes of a decoder: defaults, nulls, fields a family reads by itself, and what a subclass divides."""

from dataclasses import dataclass

import pytest

from cutp.checkpoint import ModelConfig
from cutp.errors import ConfigError, ModelConfigError, UnsupportedModelError
from cutp.models.decoder_config import DecoderConfig
from cutp.models.layer_types import FULL, SLIDING, layer_types, layer_windows
from cutp.nn.rope_parameters import RopeParameters

LEAST = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
         "vocab_size": 256}


def config(**raw):
    return ModelConfig({**LEAST, **raw})


def test_fallbacks_are_those_of_llama():
    c = DecoderConfig.read(config())
    assert (c.num_key_value_heads, c.head_dim, c.max_position_embeddings, c.rms_norm_eps) == (4, 12, 2048, 1e-6)
    assert (c.hidden_act, c.tie_word_embeddings, c.rope) == ("silu", False, RopeParameters())


DEFAULTS = {"num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 77, "rms_norm_eps": 0.5,
            "hidden_act": "gelu", "tie_word_embeddings": True, "rope_theta": 5.0, "partial_rotary_factor": 0.5}


def test_a_family_has_defaults_of_its_own():
    c = DecoderConfig.read(config(), DEFAULTS)
    assert (c.num_key_value_heads, c.head_dim, c.max_position_embeddings, c.rms_norm_eps) == (2, 32, 77, 0.5)
    assert (c.hidden_act, c.tie_word_embeddings) == ("gelu", True)
    assert (c.rope.theta, c.rope.partial_rotary_factor) == (5.0, 0.5)
    named = dict(num_key_value_heads=1, head_dim=8, max_position_embeddings=9, rms_norm_eps=0.1, hidden_act="relu",
                 tie_word_embeddings=False, rope_theta=7.0, partial_rotary_factor=0.25)
    c = DecoderConfig.read(config(**named), DEFAULTS)
    assert (c.num_key_value_heads, c.head_dim, c.max_position_embeddings, c.rms_norm_eps) == (1, 8, 9, 0.1)
    assert (c.hidden_act, c.tie_word_embeddings) == ("relu", False)
    assert (c.rope.theta, c.rope.partial_rotary_factor) == (7.0, 0.25)


def test_null_key_value_heads_are_as_many_as_query_heads():
    assert DecoderConfig.read(config(num_key_value_heads=None), DEFAULTS).num_key_value_heads == 4


def test_given_fields_are_not_looked_up():
    rope = RopeParameters(theta=3.0)
    c = DecoderConfig.read(config(rms_norm_eps="bad", rope_theta="bad", intermediate_size=None), rms_norm_eps=0.25,
                           rope=rope, intermediate_size=7)
    assert (c.rms_norm_eps, c.rope, c.intermediate_size) == (0.25, rope, 7)


@dataclass(frozen=True, kw_only=True)
class WithExperts(DecoderConfig):
    num_experts: int

    @property
    def divided(self):
        return {**super().divided, "experts": self.num_experts}


def test_a_subclass_adds_and_divides_more():
    c = WithExperts.read(config(), num_experts=3)
    assert isinstance(c, WithExperts) and c.max_tensor_parallel == 3
    c.check_tensor_parallel(3)
    with pytest.raises(ConfigError, match="size 4 does not fit this model: it has 4 attention heads, 80 feed-forward "
                                          "channels, 256 tokens and 3 experts to divide .sizes 1 to 3 work"):
        c.check_tensor_parallel(4)
    assert DecoderConfig.read(config()).divided == {"attention heads": 4, "feed-forward channels": 80, "tokens": 256}


@pytest.mark.parametrize("raw, message", [
    (dict(num_key_value_heads=3), "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
    (dict(hidden_size=50), "hidden_size 50 is not a multiple of num_attention_heads 4, and there is no head_dim"),
    (dict(hidden_size=None), "hidden_size is null"),
    (dict(num_hidden_layers=2001), "num_hidden_layers .* at most 2000"),
    (dict(head_dim=0), "head_dim"),
    (dict(rms_norm_eps=0), "rms_norm_eps"),
    (dict(hidden_act=3), "hidden_act"),
    (dict(tie_word_embeddings=1), "tie_word_embeddings"),
    (dict(is_causal="yes"), "is_causal"),
    (dict(rope_scaling={"type": "linear", "factor": 2.0**31}), "over 2..31 positions"),
])
def test_bad_values(raw, message):
    with pytest.raises(ModelConfigError, match=message):
        DecoderConfig.read(config(**raw))


def test_attention_to_later_tokens_is_refused():
    assert DecoderConfig.read(config(is_causal=True))
    with pytest.raises(UnsupportedModelError, match="is_causal false"):
        DecoderConfig.read(config(is_causal=False))


def test_layer_types():
    assert layer_types(config(), 3, lambda i: i == 1) == (FULL, SLIDING, FULL)
    assert layer_types(config(layer_types=None), 1, lambda i: True) == (SLIDING,)
    assert layer_types(config(layer_types=[SLIDING, FULL]), 2, lambda i: False) == (SLIDING, FULL)
    for bad in ([FULL], [FULL] * 3):
        with pytest.raises(ModelConfigError, match="a list of 2 entries, one a layer"):
            layer_types(config(layer_types=bad), 2, bool)
    with pytest.raises(ModelConfigError, match="a list of strings"):
        layer_types(config(layer_types=FULL), 2, bool)
    with pytest.raises(UnsupportedModelError, match="'linear_attention' for layer 1.*known kinds: full_attention"):
        layer_types(config(layer_types=[FULL, "linear_attention"]), 2, bool)


def test_layer_windows():
    listed = config(layer_types=[FULL, SLIDING])
    assert layer_windows(listed, 2, 5, bool) == (None, 5)
    assert layer_windows(config(), 3, 5, lambda i: i > 0) == (None, 5, 5)
    assert layer_windows(config(), 3, None, lambda i: False) == (None, None, None)
    with pytest.raises(ModelConfigError, match="layer 1 is of kind sliding_attention, but no sliding_window"):
        layer_windows(listed, 2, None, bool)
