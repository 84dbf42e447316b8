"""What a model needs to run on a GPU: sizes that the kernels can take."""

from __future__ import annotations

from cutp.errors import ConfigError
from cutp.nn.distributed_transformer import DistributedTransformer
from cutp.nn.mla import MultiHeadLatentAttention
from cutp.nn.moe_router import Router
from cutp.ops.launch_arguments import VECTOR_BYTES, vector_width
from cutp.ops.moe_routing_cuda import MAX_EXPERTS, MAX_TOP_K


def fit_to_kernels(model: DistributedTransformer) -> None:
    """Gives `model` the cache that kernels need; the storage in use is the GPU's.

    ConfigError, naming the weight or the layer, for a model with sizes that no kernel takes.
    """
    model.kv_params = model.kv_params.for_kernels()
    for name, weight in model.named_weights():
        width = vector_width(weight.held_dtype)
        if len(weight.shape) == 2 and weight.held_shape[0] and weight.held_shape[1] % width:
            raise ConfigError(f"the weight {name!r} has rows of {weight.held_shape[1]} {weight.held_dtype} elements on "
                              f"this rank; on a GPU they need a multiple of {width} ({VECTOR_BYTES} bytes)",
                              hint="use device=\"cpu\", or another number of ranks")
    for module in model.modules():
        if isinstance(module, MultiHeadLatentAttention):
            width = vector_width(model.kv_params.dtype)
            sizes = {"qk_nope_head_dim": module.qk_nope_head_dim, "v_head_dim": module.v_head_dim,
                     "kv_lora_rank": module.kv_lora_rank,
                     "qk_nope_head_dim + qk_rope_head_dim": module.qk_head_dim}
            for name, size in sizes.items():
                if size % width:
                    raise ConfigError(f"{name} is {size}; on a GPU it needs a multiple of {width} ({VECTOR_BYTES} "
                                      "bytes)", hint="use device=\"cpu\"")
        if isinstance(module, Router) and (module.weight.shape[0] > MAX_EXPERTS or module.top_k > MAX_TOP_K):
            raise ConfigError(f"a token chooses {module.top_k} of {module.weight.shape[0]} experts; on a GPU at most "
                              f"{MAX_TOP_K} of {MAX_EXPERTS} are possible", hint="use device=\"cpu\"")
