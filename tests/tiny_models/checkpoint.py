"""How a family file describes its checkpoints, and how their weights are drawn.

Weights are scaled so that scores and logits spread as in a trained model: attention is far from uniform, greedy tokens
lead clearly, norm weights are not all alike and biases not zero.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tests.tiny_llama import uniform

SMALL = {
    "vocab_size": 256,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "dtype": "float32",
}

# Standard deviation of a matrix's output for an input of unit size, by the name of the module (1 if not named).
GAINS = {
    "q_proj": 1.4,
    "k_proj": 1.4,
    "qkv_proj": 1.3,
    "o_proj": 1.5,
    "down_proj": 2.5,
    "lm_head": 4.0,
    "embed_tokens": 4.0,
}


@dataclass(frozen=True)
class Tensor:
    """A tensor with its own distribution: uniform in [center - half_width, center + half_width)."""

    shape: tuple[int, ...]
    half_width: float
    center: float = 0.0


@dataclass(frozen=True)
class Bytes:
    """A uint8 tensor, uniform in low .. high."""

    shape: tuple[int, ...]
    low: int = 0
    high: int = 255


Shapes = dict[str, "tuple[int, ...] | Tensor | Bytes"]


@dataclass(frozen=True)
class Case:
    """One checkpoint and its prompts.

    fields: what config.json has besides the family's base (a value of `ABSENT` removes a field of the base). seed: the
    draw of the weights; another one helps where a greedy token has no clear lead. prompt_lengths: tokens of each
    prompt; some must be longer than every window.
    """

    fields: Mapping[str, object] = field(default_factory=dict)
    seed: int = 0
    prompt_lengths: tuple[int, ...] = (1, 13, 44)


ABSENT = object()


@dataclass(frozen=True)
class TinyFamily:
    """The checkpoints of one architecture.

    base: config.json of all cases, on top of `SMALL`. shapes: config -> the tensors by their Hugging Face names *on
    disk* and their shapes (a Linear weight is [out, in]); where the usual draw does not fit, a `Tensor`. gains: on top
    of `GAINS`.
    """

    base: Mapping[str, object]
    shapes: Callable[[dict], Shapes]
    cases: Mapping[str, Case]
    gains: Mapping[str, float] = field(default_factory=dict)

    def config(self, case: str) -> dict:
        fields = SMALL | dict(self.base) | dict(self.cases[case].fields)
        return {key: value for key, value in fields.items() if value is not ABSENT}

    def tensors(self, case: str, seed: int) -> dict[str, np.ndarray]:
        """float32 (and uint8) tensors by name, a pure function of the case, its shapes and `seed`."""
        shapes = self.shapes(self.config(case))
        return {name: self._draw(name, spec, (case, seed, name)) for name, spec in shapes.items()}

    def _draw(self, name: str, spec: tuple[int, ...] | Tensor | Bytes, key: tuple) -> np.ndarray:
        if isinstance(spec, Bytes):
            share = (uniform(math.prod(spec.shape), *key).reshape(spec.shape) + 1) / 2  # in [0, 1)
            return (spec.low + np.floor(share * (spec.high + 1 - spec.low))).astype(np.uint8)
        tensor = spec if isinstance(spec, Tensor) else self._usual(name, spec)
        values = uniform(math.prod(tensor.shape), *key).reshape(tensor.shape)
        return (np.float32(tensor.center) + np.float32(tensor.half_width) * values).astype(np.float32)

    def _usual(self, name: str, shape: tuple[int, ...]) -> Tensor:
        parts = name.split(".")
        module = parts[-2] if parts[-1] in ("weight", "bias") else parts[-1]
        if module.endswith("norm"):
            return Tensor(shape, 0.2, 1.0)
        if name.endswith("bias"):
            return Tensor(shape, 0.4)
        # Uniform values in [-1, 1) have a variance of 1/3.
        gain = (GAINS | dict(self.gains)).get(module, 1.0)
        return Tensor(shape, gain * math.sqrt(3.0 / shape[-1]))


def decoder_shapes(c: dict, layer: Callable[[int], Shapes], *, norm: tuple[int, ...] | Tensor | None = None) -> Shapes:
    """Embedding, layers, final norm, and the head unless it is tied. layer: index -> names within the layer."""
    shapes: Shapes = {"model.embed_tokens.weight": (c["vocab_size"], c["hidden_size"])}
    for index in range(c["num_hidden_layers"]):
        shapes |= {f"model.layers.{index}.{name}": spec for name, spec in layer(index).items()}
    shapes["model.norm.weight"] = (c["hidden_size"],) if norm is None else norm
    if not c["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (c["vocab_size"], c["hidden_size"])
    return shapes


def attention_shapes(c: dict, *, bias: bool = False, output_bias: bool = False) -> Shapes:
    """self_attn.{q,k,v,o}_proj."""
    hidden, heads = c["hidden_size"], c["num_attention_heads"]
    head_dim = c.get("head_dim") or hidden // heads
    q, kv = heads * head_dim, (c.get("num_key_value_heads") or heads) * head_dim
    linears = {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, q)}
    shapes: Shapes = {f"self_attn.{name}.weight": shape for name, shape in linears.items()}
    biased = ["q_proj", "k_proj", "v_proj"] * bias + ["o_proj"] * output_bias
    return shapes | {f"self_attn.{name}.bias": linears[name][:1] for name in biased}


def mlp_shapes(c: dict, *, prefix: str = "mlp", width: int | None = None, bias: bool = False) -> Shapes:
    """`prefix`.{gate,up,down}_proj; width: the feed-forward channels (default intermediate_size)."""
    hidden, width = c["hidden_size"], width or c["intermediate_size"]
    linears = {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}
    shapes: Shapes = {f"{prefix}.{name}.weight": shape for name, shape in linears.items()}
    return shapes | ({f"{prefix}.{name}.bias": shape[:1] for name, shape in linears.items()} if bias else {})


def make_prompts(name: str, case: Case, vocab_size: int) -> list[list[int]]:
    return [
        [int(t) for t in (uniform(n, name, "prompt", i) + 1) * (vocab_size / 2)]
        for i, n in enumerate(case.prompt_lengths)
    ]


def save(config: dict, tensors: dict[str, np.ndarray], directory: str | Path) -> Path:
    """Writes a checkpoint without a tokenizer."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory
