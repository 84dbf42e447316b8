"""Which architectures cutp can run: the name in config.json's `architectures` and how to build it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import numpy as np

from cutp.checkpoint.config import ModelConfig
from cutp.comm.device_group import DeviceGroup
from cutp.errors import UnsupportedModelError
from cutp.models.decoder_config import DecoderConfig
from cutp.nn.distributed_transformer import DistributedTransformer


@dataclass(frozen=True)
class ModelFamily:
    """One architecture.

    sizes: checks config.json and returns its sizes. build: the model for a device group, without weights.
    checkpoint_name: a weight's name in the module tree -> its name in the checkpoint. ignored: endings of checkpoint
    names that carry nothing to load.
    """

    architecture: str
    model_type: str
    sizes: Callable[[ModelConfig], DecoderConfig]
    build: Callable[[ModelConfig, DeviceGroup, np.dtype, int], DistributedTransformer]
    checkpoint_name: Callable[[str], str]
    ignored: tuple[str, ...] = (".rotary_emb.inv_freq",)


_MODULES = ("llama",)
_families: dict[str, ModelFamily] = {}


def register(family: ModelFamily) -> None:
    """Makes `family` known by its architecture name; a later registration of the same name replaces it."""
    _families[family.architecture] = family


def families() -> dict[str, ModelFamily]:
    """Every known family by architecture name."""
    for module in _MODULES:
        import_module(f"cutp.models.{module}")
    return dict(_families)


def find_family(config: ModelConfig) -> ModelFamily:
    """The family of `config`, by `architectures` or else `model_type`; UnsupportedModelError lists what exists."""
    known = families()
    if config.architecture is not None:
        family = known.get(config.architecture)
    else:
        family = next((f for f in known.values() if f.model_type == config.model_type), None)
    if family is None:
        raise UnsupportedModelError(f"{config.path}: architecture {config.architecture or config.model_type!r} is not "
                                    "implemented", hint=f"implemented: {', '.join(sorted(known))}")
    return family
