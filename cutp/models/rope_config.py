"""The rotary position embedding a config.json asks for, in one form whichever way the file spells it.

Defaults and precedence follow Hugging Face transformers (modeling_rope_utils.py). The frequencies are computed
elsewhere, from these parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cutp.checkpoint.config import ModelConfig
from cutp.errors import ModelConfigError, UnsupportedModelError
from cutp.nn.rope_parameters import ROPE_TYPES, RopeParameters

_ALIASES = {"su": "longrope"}
_WITH_ORIGINAL_LENGTH = ("llama3", "yarn", "longrope")


def rope_parameters(
    config: ModelConfig, *, default_theta: float = 10000.0, default_partial_rotary_factor: float = 1.0
) -> RopeParameters:
    """The rotary parameters of a model whose layers all share them.

    Reads `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (earlier). `rope_scaling` wins when
    both are there, as it does in transformers. Raises ModelConfigError for a missing or bad value, also when the
    parameters are given per layer type, and UnsupportedModelError for an unknown rope type.
    """
    found = _find(config)
    if found is not None and _layer_types(found):
        raise found.error(_layer_types(found)[0], "absent: this model has one set of rotary parameters for all layers")
    return _parse(config, found, default_theta, default_partial_rotary_factor)


def rope_parameters_by_layer_type(
    config: ModelConfig,
    layer_types: Sequence[str],
    *,
    default_theta: float = 10000.0,
    default_partial_rotary_factor: float = 1.0,
) -> dict[str, RopeParameters]:
    """Rotary parameters for each of `layer_types`, for example ("full_attention", "sliding_attention").

    A file that nests `rope_parameters` by layer type must have an entry for each. A flat file gives all types the
    same parameters, except that an older `rope_local_base_freq` is the unscaled theta of "sliding_attention".
    """
    found = _find(config)
    if found is not None and _layer_types(found):
        return {
            kind: _parse(config, found.section(kind), default_theta, default_partial_rotary_factor, nested=True)
            for kind in layer_types
        }
    shared = _parse(config, found, default_theta, default_partial_rotary_factor)
    result = dict.fromkeys(layer_types, shared)
    local = config.positive_float("rope_local_base_freq", None)
    if local is not None and "sliding_attention" in result:
        result["sliding_attention"] = RopeParameters(theta=local, partial_rotary_factor=shared.partial_rotary_factor)
    return result


def _find(config: ModelConfig) -> ModelConfig | None:
    # An empty rope_scaling object counts as absent, as in transformers.
    scaling = config.section("rope_scaling", None)
    return scaling if scaling is not None and scaling.raw else config.section("rope_parameters", None)


def _layer_types(found: ModelConfig) -> list[str]:
    return [key for key, value in found.raw.items() if isinstance(value, dict)]


def _parse(
    config: ModelConfig, found: ModelConfig | None, default_theta: float, default_partial: float, nested: bool = False
) -> RopeParameters:
    rope = found if found is not None else ModelConfig({}, config.path, "rope_parameters.")
    kind = rope.string("rope_type", None) or rope.string("type", "default")
    kind = _ALIASES.get(kind, kind)
    if kind not in ROPE_TYPES:
        message = f"{config.path} asks for the rope type {kind!r}, which cutp does not implement"
        raise UnsupportedModelError(message, hint=f"known types: {', '.join(ROPE_TYPES)}")

    theta = rope.positive_float("rope_theta", None) or config.positive_float("rope_theta", default_theta)
    if theta <= 1.0:
        raise (rope if "rope_theta" in rope else config).error("rope_theta", "above 1")
    partial = rope.positive_float("partial_rotary_factor", None)
    if partial is None:
        partial = config.positive_float("partial_rotary_factor", default_partial)
    if partial > 1.0:
        raise (rope if "partial_rotary_factor" in rope else config).error("partial_rotary_factor", "at most 1")

    values: dict[str, Any] = {"rope_type": kind, "theta": theta, "partial_rotary_factor": partial}
    if kind in _WITH_ORIGINAL_LENGTH:
        values["original_max_position_embeddings"] = _original_length(config, rope, nested)
    if kind in ("linear", "dynamic", "llama3"):
        values["factor"] = rope.positive_float("factor")
    elif kind in ("yarn", "longrope"):
        # yarn must name the factor, though it may be null; longrope (Phi-3) may leave it out.
        if kind == "yarn" and "factor" not in rope.raw:
            rope.positive_float("factor")
        values["factor"] = rope.positive_float("factor", None) or (
            config.positive_int("max_position_embeddings") / values["original_max_position_embeddings"]
        )
        values["attention_factor"] = rope.non_negative_float("attention_factor", None)
    if kind != "default":
        values["mscale_all_dim"] = rope.non_negative_float("mscale_all_dim", None)
    if kind == "llama3":
        values["low_freq_factor"] = rope.positive_float("low_freq_factor")
        values["high_freq_factor"] = rope.positive_float("high_freq_factor")
        if values["high_freq_factor"] <= values["low_freq_factor"]:
            raise rope.error("high_freq_factor", f"above low_freq_factor ({values['low_freq_factor']})")
    elif kind == "yarn":
        # Zero stands for the default here, as in transformers.
        values["beta_fast"] = rope.non_negative_float("beta_fast", None) or None
        values["beta_slow"] = rope.non_negative_float("beta_slow", None) or None
        values["mscale"] = rope.non_negative_float("mscale", None)
        values["truncate"] = rope.boolean("truncate", True)
    elif kind == "longrope":
        values["short_factor"] = rope.positive_floats("short_factor")
        values["long_factor"] = rope.positive_floats("long_factor")
        if len(values["short_factor"]) != len(values["long_factor"]):
            raise ModelConfigError(
                f"{rope.prefix}short_factor and long_factor in {config.path} have {len(values['short_factor'])} and "
                f"{len(values['long_factor'])} entries, but must have equally many",
                hint="correct the file, or fetch it again",
            )
    return RopeParameters(**values)


def _original_length(config: ModelConfig, rope: ModelConfig, nested: bool) -> int:
    # The top-level value (Phi-3) wins over the one inside for flat files and is not looked at for nested ones.
    key = "original_max_position_embeddings"
    top = None if nested else config.positive_int(key, None)
    return top or rope.positive_int(key, None) or config.positive_int("max_position_embeddings")
