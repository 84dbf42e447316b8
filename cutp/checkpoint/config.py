"""config.json: validated access to its values, the same for every model family."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cutp.checkpoint.json_file import read_json_object
from cutp.errors import ModelConfigError, UnsafeCheckpointError, UnsupportedModelError

MAX_SIZE = 2**31  # no dimension, count or token id of a real model is larger


class _Required:
    def __repr__(self) -> str:
        return "REQUIRED"


REQUIRED: Any = _Required()


class ModelConfig:
    """The JSON object of a config file with getters that check what they return.

    Every getter takes a key and a default. A missing key or a JSON null gives the default, or ModelConfigError when
    the default is REQUIRED. A value of the wrong type or range always raises ModelConfigError naming file, key,
    value and expectation. `has_remote_code` says that config.json or tokenizer_config.json names Python code of the
    checkpoint (`auto_map`), which cutp never runs. `path` is the file, `raw` the
    parsed object, `prefix` the place inside the file.
    """

    def __init__(self, raw: Mapping[str, Any], path: str | os.PathLike = "config.json", prefix: str = ""):
        self.raw = dict(raw)
        self.path = Path(path)
        self.prefix = prefix
        self.has_remote_code = bool(self.raw.get("auto_map"))

    @property
    def architecture(self) -> str | None:
        """The first entry of `architectures`, or None when the file does not name one."""
        names = self.raw.get("architectures")
        if names is None:
            return None
        if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
            raise self.error("architectures", "a list of strings")
        return names[0] if names else None

    @property
    def model_type(self) -> str | None:
        return self.string("model_type", None)

    @property
    def torch_dtype(self) -> str | None:
        """The dtype the weights were saved in ("bfloat16", ...), from `dtype` or the older `torch_dtype`."""
        name = self.string("dtype", None) or self.string("torch_dtype", None)
        return name.removeprefix("torch.") if name else None

    def check_quantization(self, readable: Sequence[str] = ()) -> None:
        """UnsupportedModelError when the weights are quantized by a method that is not one of `readable`."""
        quantization = self.raw.get("quantization_config")
        if not quantization:
            return
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        if method not in readable:
            message = f"{self.path} describes quantized weights (quant_method {method!r})"
            raise UnsupportedModelError(message, hint="use the unquantized checkpoint")

    def __contains__(self, key: object) -> bool:
        """Whether the key is there with a value other than null."""
        return self.raw.get(key) is not None

    def positive_int(self, key: str, default: Any = REQUIRED) -> int:
        """An int in 1 .. 2**31."""
        return self._get(key, default, lambda v: _is_int(v) and 0 < v <= MAX_SIZE, "an integer from 1 to 2**31")

    def non_negative_int(self, key: str, default: Any = REQUIRED) -> int:
        """An int in 0 .. 2**31."""
        return self._get(key, default, lambda v: _is_int(v) and 0 <= v <= MAX_SIZE, "an integer from 0 to 2**31")

    def positive_float(self, key: str, default: Any = REQUIRED) -> float:
        """A finite number above 0, as float."""
        return self._float(key, default, lambda v: v > 0, "a finite number above 0")

    def non_negative_float(self, key: str, default: Any = REQUIRED) -> float:
        """A finite number of at least 0, as float."""
        return self._float(key, default, lambda v: v >= 0, "a finite number of at least 0")

    def boolean(self, key: str, default: Any = REQUIRED) -> bool:
        return self._get(key, default, lambda v: isinstance(v, bool), "true or false")

    def string(self, key: str, default: Any = REQUIRED) -> str:
        """A non-empty string."""
        return self._get(key, default, lambda v: isinstance(v, str) and v != "", "a non-empty string")

    def choice(self, key: str, allowed: Sequence[Any], default: Any = REQUIRED) -> Any:
        """A value equal to, and of the same type as, one of `allowed`."""
        expected = f"one of {', '.join(repr(a) for a in allowed)}"
        return self._get(key, default, lambda v: any(type(v) is type(a) and v == a for a in allowed), expected)

    def positive_floats(self, key: str, default: Any = REQUIRED) -> tuple[float, ...]:
        """A non-empty list of finite numbers above 0."""
        value = self._get(
            key,
            default,
            lambda v: isinstance(v, list) and bool(v) and all(_is_number(x) and x > 0 for x in v),
            "a list of finite numbers above 0",
        )
        return tuple(float(x) for x in value) if isinstance(value, list) else value

    def strings(self, key: str, default: Any = REQUIRED) -> tuple[str, ...]:
        """A list of strings."""
        value = self._get(
            key, default, lambda v: isinstance(v, list) and all(isinstance(x, str) for x in v), "a list of strings"
        )
        return tuple(value) if isinstance(value, list) else value

    def layer_indices(self, key: str, default: Any = REQUIRED) -> tuple[int, ...]:
        """A list of integers from 0."""
        value = self._get(key, default, lambda v: isinstance(v, list) and all(_is_int(x) and x >= 0 for x in v),
                          "a list of integers from 0")
        return tuple(value) if isinstance(value, list) else value

    def token_ids(self, key: str, default: Any = REQUIRED) -> tuple[int, ...]:
        """One token id or a list of them, always returned as a tuple without duplicates."""

        def is_id(v: Any) -> bool:
            return _is_int(v) and 0 <= v < MAX_SIZE

        value = self._get(
            key,
            default,
            lambda v: is_id(v) or (isinstance(v, list) and all(is_id(x) for x in v)),
            "a token id or a list of token ids",
        )
        if value is None or isinstance(value, tuple):
            return value
        return tuple(dict.fromkeys(value if isinstance(value, list) else [value]))

    def section(self, key: str, default: Any = REQUIRED) -> ModelConfig:
        """A nested JSON object, with the same getters."""
        value = self._get(key, default, lambda v: isinstance(v, dict), "an object")
        return value if value is default else ModelConfig(value, self.path, f"{self.prefix}{key}.")

    def error(self, key: str, expected: str) -> ModelConfigError:
        """The error to raise when the value of `key` is not `expected` (a phrase such as "an even integer")."""
        value = repr(self.raw.get(key))
        shown = value if len(value) <= 80 else value[:77] + "..."
        message = f"{self.prefix}{key} in {self.path} is {shown}, but must be {expected}"
        return ModelConfigError(message, hint="correct the file, or fetch it again")

    def _get(self, key: str, default: Any, accept: Any, expected: str) -> Any:
        value = self.raw.get(key)
        if value is None:
            if default is not REQUIRED:
                return default
            state = "null" if key in self.raw else "missing"
            message = f"{self.prefix}{key} is {state} in {self.path}, but must be {expected}"
            raise ModelConfigError(message, hint="correct the file, or fetch it again")
        if not accept(value):
            raise self.error(key, expected)
        return value

    def _float(self, key: str, default: Any, accept: Any, expected: str) -> Any:
        value = self._get(key, default, lambda v: _is_number(v) and accept(v), expected)
        return float(value) if _is_number(value) else value


def load_config(directory: str | os.PathLike, *, refuse_remote_code: bool = True) -> ModelConfig:
    """The checked config.json of a model directory.

    Raises ModelConfigError when it is missing or malformed and UnsafeCheckpointError when `auto_map` says that the
    checkpoint expects its own Python code to be run. That code is never run either way: `refuse_remote_code=False` is
    for callers that implement the named architecture themselves. An `auto_map` whose AutoModelForCausalLM has the name
    of the architecture is accepted, as it is in transformers where that architecture is built in: many models were
    released before they were. Whether quantized weights can be read depends on the
    architecture: see `ModelConfig.check_quantization`.
    """
    path = Path(directory) / "config.json"
    tokenizer_path = path.with_name("tokenizer_config.json")
    if not path.is_file():
        raise ModelConfigError(f"{directory} has no config.json", hint="pass a directory in Hugging Face format")
    config = ModelConfig(read_json_object(path, ModelConfigError), path)
    auto_map = config.raw.get("auto_map")
    if auto_map and refuse_remote_code and not _is_architecture(config):
        shown = ", ".join(f"{k}: {v}" for k, v in auto_map.items()) if isinstance(auto_map, dict) else repr(auto_map)
        raise UnsafeCheckpointError(
            f"{path} asks to run the checkpoint's own code (auto_map: {shown[:200]}); cutp never runs such code",
            hint="use a revision whose architecture is built in, without auto_map",
        )
    if tokenizer_path.exists() and read_json_object(tokenizer_path).get("auto_map"):
        config.has_remote_code = True  # a tokenizer class of its own; tokenizer.json is read without it
    # The identifying values are read here so that a bad one is reported at once.
    _ = config.architecture, config.model_type, config.torch_dtype
    return config


def _is_architecture(config: ModelConfig) -> bool:
    """Whether `auto_map` holds the checkpoint's own code of the very architecture that it names."""
    auto_map = config.raw["auto_map"]
    model = auto_map.get("AutoModelForCausalLM") if isinstance(auto_map, dict) else None
    return isinstance(model, str) and model.rpartition(".")[2] == config.architecture


def _is_int(value: Any) -> bool:
    return type(value) is int  # bool is a subclass of int


def _is_number(value: Any) -> bool:
    if _is_int(value):
        return abs(value) < 2**1000  # larger integers overflow float
    return isinstance(value, float) and math.isfinite(value)
