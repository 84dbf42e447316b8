"""Tiny random checkpoints with heads of 64 elements, the least that the attention kernels know."""

from __future__ import annotations

from pathlib import Path

from tests import tiny_models
from tests.tiny_models.checkpoint import Case, TinyFamily, attention_shapes, decoder_shapes, mlp_shapes, save

VOCAB = 211


def _llama_shapes(c):
    hidden = (c["hidden_size"],)
    layer = attention_shapes(c) | mlp_shapes(c)
    layer |= {"input_layernorm.weight": hidden, "post_attention_layernorm.weight": hidden}
    return decoder_shapes(c, lambda _: layer)


_LLAMA = TinyFamily(
    base={"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-5,
          "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False},
    shapes=_llama_shapes, cases={"llama": Case()})

_SIZES = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
          "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 320}


def write_checkpoint(directory: str | Path, family: str = "llama", case: str | None = None, **fields) -> Path:
    """A checkpoint of `family` (of tests/tiny_models, or "llama") in `directory`: its first case, or `case`, with these
    sizes and `fields`."""
    found = _LLAMA if family == "llama" else tiny_models.FAMILIES[family]
    case = next(iter(found.cases)) if case is None else case
    config = found.config(case) | _SIZES | fields
    shapes = found.shapes(config)
    tensors = {name: found._draw(name, spec, (family, name)) for name, spec in shapes.items()}
    return save(config, tensors, directory)
