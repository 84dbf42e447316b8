"""Which architectures cutp can run: the name in config.json's `architectures` and how to build it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import numpy as np

from cutp.checkpoint.config import ModelConfig
from cutp.comm.device_group import DeviceGroup
from cutp.errors import ConfigError, UnsupportedModelError
from cutp.models.decoder import checkpoint_name
from cutp.models.decoder_config import DecoderConfig
from cutp.models.weight_source import WeightSource
from cutp.nn.distributed_transformer import DistributedTransformer


@dataclass(frozen=True)
class ModelFamily:
    """One architecture.

    architecture, model_type: its names in config.json. sizes: checks config.json and returns its sizes. build: the
    model for a device group, without weights, as `build(config, devices, dtype, page_size)`. checkpoint_name: a
    weight's name in the module tree -> its name in the checkpoint, or a `WeightSource` where the checkpoint has it in
    another form. ignored: endings of checkpoint names that carry nothing to load. quantizations: the `quant_method`s
    that its weight sources can read.
    """

    architecture: str
    model_type: str
    sizes: Callable[[ModelConfig], DecoderConfig]
    build: Callable[[ModelConfig, DeviceGroup, np.dtype, int], DistributedTransformer]
    checkpoint_name: Callable[[str], str | WeightSource] = checkpoint_name
    ignored: tuple[str, ...] = (".rotary_emb.inv_freq",)
    quantizations: tuple[str, ...] = ()

    def __post_init__(self):
        for name in ("architecture", "model_type"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value:
                raise ConfigError(f"{name} of a model family is {value!r}, not a name")
        for name in ("sizes", "build", "checkpoint_name"):
            if not callable(getattr(self, name)):
                raise ConfigError(f"{name} of the model family {self.architecture} is {getattr(self, name)!r}, "
                                  "not a function")


# Each of these modules of cutp.models has a tuple FAMILIES.
_MODULES = (
    "cohere2",
    "deepseek_v3",
    "gemma2",
    "gemma3",
    "glm4",
    "gpt_oss",
    "granite",
    "llama",
    "mistral",
    "mixtral",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "smollm3",
)
_registered: dict[str, ModelFamily] = {}


def register(family: ModelFamily) -> None:
    """Makes `family` known by its architecture name, on this rank: every rank must register it, before `LLM(...)`.

    It goes before a built-in family, and replaces an earlier registration, of the same name. ConfigError when it is
    not a ModelFamily.
    """
    if not isinstance(family, ModelFamily):
        raise ConfigError(f"a model family must be a ModelFamily, not {family!r}")
    _registered[family.architecture] = family


def families() -> dict[str, ModelFamily]:
    """Every known family by architecture name."""
    built_in = [family for module in _MODULES for family in import_module(f"cutp.models.{module}").FAMILIES]
    return {family.architecture: family for family in built_in} | _registered


def find_family(config: ModelConfig) -> ModelFamily:
    """The family of `config`: by `architectures`, or by `model_type` where the file names no architecture.

    UnsupportedModelError lists what exists. A checkpoint with another head than a language model's names an
    architecture of its own, and is refused though its model_type is known; so are weights quantized in a way that the
    family cannot read.
    """
    known = families()
    if config.architecture is not None:
        family = known.get(config.architecture)
    else:
        by_type = {family.model_type: family for family in known.values()}  # a registered one comes last, and wins
        family = by_type.get(config.model_type)
    if family is None:
        raise UnsupportedModelError(f"{config.path}: architecture {config.architecture or config.model_type!r} is not "
                                    "implemented", hint=f"implemented: {', '.join(sorted(known))}; "
                                    "cutp/models/README.md says how to add one")
    config.check_quantization(family.quantizations)
    return family
