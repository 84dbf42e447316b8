"""Transformer layers over a tensor-parallel group: what models are built from.

A decoder-only model by hand, over the ranks of a communicator:

    import numpy as np
    from cutp import Communicator
    from cutp.nn import *

    comm = Communicator.single()                 # or Communicator.from_mpi(MPI.COMM_WORLD)
    devices = DeviceGroup.of(comm)               # one DeviceRef a rank
    dtype = np.dtype(np.float32)
    rope = RotaryEmbedding(head_dim, max_seq_len=2048)

    def block():
        attention = AttentionWithRope(dim, n_heads, n_kv_heads, head_dim, dtype, rope)
        return DistributedTransformerBlock(TensorParallelAttentionWithRope(attention, devices), MLP(dim, ffn, dtype),
                                           RMSNorm(dim, dtype), RMSNorm(dim, dtype), devices)

    embedding = VocabParallelEmbedding(vocab_size, dim, dtype, devices)
    kv_params = KVCacheParams(dtype, n_heads, n_kv_heads, head_dim, num_layers)
    model = DistributedTransformer(dim, n_heads, [block() for _ in range(num_layers)], RMSNorm(dim, dtype),
                                   ColumnParallelLinear(dim, vocab_size, dtype, devices), embedding, kv_params,
                                   devices, rope)
    model.load(arrays)                           # whole arrays by name; each rank keeps its part
    caches = allocate_caches(kv_params, num_pages, devices)
    (logits,) = model(RaggedBatch.of([[5, 3, 8], [1, 4]], kv_params.page_size), caches)      # [2, vocab_size]

Shapes are written [T, dim]: T counts the tokens of all requests of a batch, concatenated without padding. Arrays of
activations have the model's dtype; logits are float32.

`devices` is the tensor-parallel group, one `DeviceRef` a rank. Made from a communicator (`DeviceGroup.of(comm)`), each
process builds and holds its own shard and reaches the others through it. A plain list of N devices means that this
process holds all N shards and collectives are sums in memory. Wherever a layer takes or returns a list with one entry
a device, the list covers the devices *of this process*: 1 entry under a communicator, N for a plain list.

A weight takes no memory before it is loaded, so a model of any size can be built to be measured. Errors are
`cutp.errors.CutpError`s; a wrong argument is a `ConfigError`, which is also a ValueError.
"""

from cutp.array.device import DeviceRef
from cutp.comm.device_group import DeviceGroup
from cutp.kv_cache.paged import PagedKVCache, allocate_caches
from cutp.kv_cache.params import KVCacheParams
from cutp.nn.attention import AttentionWithRope, TensorParallelAttentionWithRope
from cutp.nn.distributed_gemm import DistributedGemmConfig
from cutp.nn.distributed_transformer import (
    DistributedTransformer,
    DistributedTransformerBlock,
    ShardableCallable,
    distribute_value,
    forward_sharded_layers,
    take,
)
from cutp.nn.embedding import Embedding, VocabParallelEmbedding
from cutp.nn.linear import ColumnParallelLinear, FusedLinear, Linear, StackedLinear
from cutp.nn.mla import MultiHeadLatentAttention, TensorParallelMultiHeadLatentAttention
from cutp.nn.mlp import MLP
from cutp.nn.module import Module, ShardableModule, Weight
from cutp.nn.moe import Experts, MoE
from cutp.nn.moe_router import GroupLimitedRouter, SoftmaxRouter, TopKSoftmaxRouter
from cutp.nn.norm import LayerNorm, RMSNorm, ShardedRMSNorm
from cutp.nn.ragged_batch import RaggedBatch
from cutp.nn.return_hidden_states import ReturnHiddenStates
from cutp.nn.return_logits import ReturnLogits
from cutp.nn.rope_parameters import RopeParameters
from cutp.nn.rotary_embedding import RotaryEmbedding
from cutp.nn.sharding import EvenSegment, HeadSegment, Shardable, ShardingStrategy

__all__ = [
    "AttentionWithRope",
    "ColumnParallelLinear",
    "DeviceGroup",
    "DeviceRef",
    "DistributedGemmConfig",
    "DistributedTransformer",
    "DistributedTransformerBlock",
    "Embedding",
    "EvenSegment",
    "Experts",
    "FusedLinear",
    "GroupLimitedRouter",
    "HeadSegment",
    "KVCacheParams",
    "LayerNorm",
    "Linear",
    "MLP",
    "MoE",
    "Module",
    "MultiHeadLatentAttention",
    "PagedKVCache",
    "RMSNorm",
    "RaggedBatch",
    "ReturnHiddenStates",
    "ReturnLogits",
    "RopeParameters",
    "RotaryEmbedding",
    "Shardable",
    "ShardableCallable",
    "ShardableModule",
    "ShardedRMSNorm",
    "ShardingStrategy",
    "SoftmaxRouter",
    "StackedLinear",
    "TensorParallelAttentionWithRope",
    "TensorParallelMultiHeadLatentAttention",
    "TopKSoftmaxRouter",
    "VocabParallelEmbedding",
    "Weight",
    "allocate_caches",
    "distribute_value",
    "forward_sharded_layers",
    "take",
]
