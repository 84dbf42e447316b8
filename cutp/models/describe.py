"""What a checkpoint holds and needs, from its headers alone."""

from __future__ import annotations

import os
from typing import Any

from cutp.array.dtypes import COMPUTE_DTYPES, dtype_name, float32
from cutp.checkpoint.checkpoint import Checkpoint
from cutp.checkpoint.config import load_config
from cutp.checkpoint.files import resolve_model
from cutp.comm.device_group import DeviceGroup
from cutp.kv_cache.params import PAGE_SIZE
from cutp.models.load import check_weights
from cutp.models.registry import find_family


def describe_model(model: str | os.PathLike | None, tp: int = 1) -> dict[str, Any]:
    """The facts of a model directory at tensor-parallel size `tp`, JSON-safe.

    Sizes are in bytes of the dtype that config.json names (float32 if none); `..._per_rank` lists hold one entry a
    rank. latent_dim: values of the one vector a token that heads share in the cache, None where it holds keys and
    values. The tensors are checked against config.json, so what this accepts can be loaded. Raises CheckpointError, or
    ConfigError for a `tp` that does not fit.
    """
    path = resolve_model(model)
    config = load_config(path)
    family = find_family(config)
    sizes = family.sizes(config)
    sizes.check_tensor_parallel(tp)
    dtype = COMPUTE_DTYPES.get(config.torch_dtype, float32)
    ranks = [family.build(config, DeviceGroup.planned(tp, rank), dtype, PAGE_SIZE) for rank in range(tp)]
    weights = [dict(ranked.named_weights()) for ranked in ranks]
    with Checkpoint(path) as checkpoint:
        check_weights(ranks[0], checkpoint, family)
    return {
        "path": str(path),
        "architecture": family.architecture,
        "parameters": sum(weight.num_elements for weight in weights[0].values()),
        "dtype": dtype_name(dtype),
        "layers": sizes.num_hidden_layers,
        "hidden_size": sizes.hidden_size,
        "intermediate_size": sizes.intermediate_size,
        "attention_heads": sizes.num_attention_heads,
        "key_value_heads": sizes.num_key_value_heads,
        "head_dim": sizes.head_dim,
        "latent_dim": ranks[0].kv_params.head_dim if ranks[0].kv_params.latent else None,
        "vocab_size": sizes.vocab_size,
        "context_length": sizes.context_length,
        "rope_type": sizes.rope.rope_type,
        "tied_embeddings": sizes.tie_word_embeddings,
        "tp": tp,
        "weight_bytes_per_rank": [sum(weight.local_bytes for weight in rank.values()) for rank in weights],
        "kv_bytes_per_token_per_rank": [ranks[0].kv_params.bytes_per_token(tp, rank) for rank in range(tp)],
        "valid_tp": list(range(1, sizes.max_tensor_parallel + 1)),
    }
