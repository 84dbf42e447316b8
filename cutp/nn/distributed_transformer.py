"""The decoder-only transformer over a tensor-parallel group, and its block.

Lists hold one entry for every device of the group that lives in this process: one under MPI, N when one process
holds N shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np

from cutp.array.scratch import frame, on_device
from cutp.comm.device_group import DeviceGroup
from cutp.errors import ConfigError
from cutp.kv_cache.paged import PagedKVCache
from cutp.kv_cache.params import KVCacheParams
from cutp.nn.attention import TensorParallelAttentionWithRope
from cutp.nn.distributed_gemm import DistributedGemmConfig, matmul_allreduce
from cutp.nn.embedding import VocabParallelEmbedding
from cutp.nn.linear import ColumnParallelLinear, Linear
from cutp.nn.mlp import MLP
from cutp.nn.module import Module, Shards, sharded
from cutp.nn.norm import RMSNorm
from cutp.nn.ragged_batch import RaggedBatch
from cutp.nn.return_hidden_states import ReturnHiddenStates, check_selected_layers
from cutp.nn.return_logits import ReturnLogits, logit_rows
from cutp.nn.rotary_embedding import RotaryEmbedding
from cutp.nn.sharding import Shardable, ShardingStrategy
from cutp.nn.subgraphs import plan_layer_runs
from cutp.ops.dispatch import copied, finish_logits, logits_to_draw_from, outside_frames, residual_add, scale, take_rows

T = TypeVar("T")


@runtime_checkable
class ShardableCallable(Shardable, Protocol):
    """A layer that can be sharded and called: what a block takes as its norm or its feed-forward layer."""

    def __call__(self, x: np.ndarray) -> np.ndarray: ...


def take(it: Iterator[T], n: int) -> list[T]:
    """The next `n` items of `it`, fewer if it ends."""
    return list(islice(it, n))


def distribute_value(v: Any, devices) -> list[Any]:
    """`v` once for every local device of `devices`. Copies nothing where the devices share memory."""
    return [v for _ in DeviceGroup.of(devices).local_ranks]


def forward_sharded_layers(layers: Sequence[Callable[[np.ndarray], np.ndarray]],
                           xs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """[layer_i(x_i)], without communication. AssertionError with both counts when they differ."""
    if len(layers) != len(xs):
        raise AssertionError(f"{len(layers)} sharded layers were given {len(xs)} inputs")
    return [layer(x) for layer, x in zip(layers, xs, strict=True)]


class DistributedTransformerBlock(Module):
    """h = x + attention(norm(x)); h + mlp(norm(h)): pre-norm, two all-reduces. Every norm is optional.

    attention: a parallel attention layer, called as `attention(layer_idx, xs, caches, batch)`, whose result is already
    summed over the group. mlp: sharded here, by expert_parallel if it has a true attribute of this name, else by
    tensor_parallel; its partial sums are all-reduced here. attention_norm, mlp_norm: before each branch, replicated
    here; None for none. devices: the group. distributed_gemm_config: with `enable_matmul_allreduce`, the mlp must be an
    `MLP`: its down projection is split into chunks of rows whose sums overlap the next chunk. residual_multiplier: both
    branches are multiplied by it before they are added (Granite). post_attention_norm, post_mlp_norm: applied to the
    summed result of a branch before it is added (Olmo2 with these alone, Gemma2 and Glm4 with all four).

    parallel: x + attention(norm(x)) + mlp(norm(x)), with `attention_norm` as the one norm and the sum of both branches
    in one all-reduce (Cohere2); the attention must be a `TensorParallelAttentionWithRope`.

    The weights' names are those of Llama and Glm4: `input_layernorm` (attention_norm), `post_self_attn_layernorm`
    (post_attention_norm), `post_attention_layernorm` (mlp_norm), `post_mlp_layernorm` (post_mlp_norm).
    """

    def __init__(self, attention: Module, mlp: ShardableCallable, attention_norm: ShardableCallable | None,
                 mlp_norm: ShardableCallable | None, devices,
                 distributed_gemm_config: DistributedGemmConfig | None = None, *, residual_multiplier: float = 1.0,
                 post_attention_norm: ShardableCallable | None = None, post_mlp_norm: ShardableCallable | None = None,
                 parallel: bool = False):
        self.group = DeviceGroup.of(devices)
        size = self.group.size

        def replicated(norm: ShardableCallable | None) -> Shards | None:
            return None if norm is None else sharded(norm, ShardingStrategy.replicate(size), self.group)

        whole_experts = getattr(mlp, "expert_parallel", False)
        strategy = ShardingStrategy.expert_parallel if whole_experts else ShardingStrategy.tensor_parallel
        self.self_attn = attention
        self.mlp: Shards = sharded(mlp, strategy(size), self.group)
        self.input_layernorm = replicated(attention_norm)
        self.post_self_attn_layernorm = replicated(post_attention_norm)
        self.post_attention_layernorm = replicated(mlp_norm)
        self.post_mlp_layernorm = replicated(post_mlp_norm)
        self.residual_multiplier = residual_multiplier
        self.parallel = parallel
        self.overlap_down_proj = bool(distributed_gemm_config and distributed_gemm_config.enable_matmul_allreduce)
        if self.overlap_down_proj and not isinstance(mlp, MLP):
            raise ConfigError(f"enable_matmul_allreduce needs an MLP, not a {type(mlp).__name__}")
        if parallel and not isinstance(attention, TensorParallelAttentionWithRope):
            raise ConfigError(f"a parallel block needs a TensorParallelAttentionWithRope, not a "
                              f"{type(attention).__name__}")
        if parallel and not mlp_norm is post_attention_norm is post_mlp_norm is None:
            raise ConfigError("a parallel block has no norm but attention_norm",
                              hint="leave mlp_norm, post_attention_norm and post_mlp_norm None")

    def __call__(self, layer_idx: int, xs: Sequence[np.ndarray], caches: Sequence[PagedKVCache],
                 batch: RaggedBatch) -> list[np.ndarray]:
        """One residual stream [T, dim] a local device -> the same, after this block; fills layer `layer_idx`."""
        return self.advance(layer_idx, xs, None, caches, batch)[0]

    def advance(self, layer_idx: int, xs: Sequence[np.ndarray], normed: Sequence[np.ndarray] | None,
                caches: Sequence[PagedKVCache], batch: RaggedBatch, following: Shards | None = None,
                outs: Sequence[np.ndarray | None] | None = None) -> tuple[list[np.ndarray], list[np.ndarray] | None]:
        """The streams after this block, and what norm `following` makes of them where one pass does both, else None.

        normed: the streams as the block before returned them, under this block's own `input_layernorm`; None to compute
        it here. outs: where the second result goes, an array of its own for every local device.
        """
        if normed is None:
            normed = _normed(self.input_layernorm, xs)
        if self.parallel:
            branch = self._both(layer_idx, normed, caches, batch)
        else:
            attended = _normed(self.post_self_attn_layernorm, self.self_attn(layer_idx, normed, caches, batch))
            if self._adds_in_one_pass(self.post_attention_layernorm):
                xs, normed = _added_and_normed(self.post_attention_layernorm, xs, attended)
            else:
                xs = self._add(xs, attended)
                normed = _normed(self.post_attention_layernorm, xs)
            branch = _normed(self.post_mlp_layernorm, self._feed_forward(normed, batch))
        if self._adds_in_one_pass(following):
            return _added_and_normed(following, xs, branch, outs)
        return self._add(xs, branch), None

    def _adds_in_one_pass(self, norms: Shards | None) -> bool:
        """Whether adding a branch and taking `norms` of the sum is one operation."""
        return norms is not None and self.residual_multiplier == 1.0 and all(isinstance(n, RMSNorm) for n in norms)

    def _both(self, layer_idx: int, xs: Sequence[np.ndarray], caches: Sequence[PagedKVCache],
              batch: RaggedBatch) -> list[np.ndarray]:
        """attention(x) + mlp(x): the partial sums of both are added before they are reduced."""
        attended = self.self_attn.attended(layer_idx, xs, caches, batch)
        projections = [shard.o_proj for shard in self.self_attn.shards]
        if not self.overlap_down_proj or on_device(xs[0]):  # where joining both inputs would cost a pass over them
            partial = forward_sharded_layers(projections, attended)
            return self.group.all_reduce(_sums(partial, self._partial_feed_forward(xs, batch)))
        activated = forward_sharded_layers([mlp.activated for mlp in self.mlp], xs)
        layers = [_side_by_side(o_proj, mlp.down_proj) for o_proj, mlp in zip(projections, self.mlp, strict=True)]
        joined = [np.concatenate(pair, axis=1) for pair in zip(attended, activated, strict=True)]
        return matmul_allreduce(layers, joined, self.group)

    def _partial_feed_forward(self, xs: Sequence[np.ndarray], batch: RaggedBatch) -> list[np.ndarray]:
        """Each local shard's partial sum."""
        if not getattr(self.mlp[0], "takes_slots", False):
            return forward_sharded_layers(self.mlp, xs)
        return [mlp(x, batch.slots) for mlp, x in zip(self.mlp, xs, strict=True)]

    def _feed_forward(self, xs: Sequence[np.ndarray], batch: RaggedBatch) -> list[np.ndarray]:
        if not self.overlap_down_proj:
            return self.group.all_reduce(self._partial_feed_forward(xs, batch))
        activated = forward_sharded_layers([mlp.activated for mlp in self.mlp], xs)
        return matmul_allreduce([mlp.down_proj for mlp in self.mlp], activated, self.group)

    def _add(self, xs: Sequence[np.ndarray], ys: Sequence[np.ndarray]) -> list[np.ndarray]:
        return _sums(xs, ys, self.residual_multiplier)


def _normed(norm: Shards | None, xs: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
    return xs if norm is None else forward_sharded_layers(norm, xs)


def _added_and_normed(norms: Shards, xs: Sequence[np.ndarray], ys: Sequence[np.ndarray],
                      outs: Sequence[np.ndarray | None] | None = None) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The sums x + y and their norms, these in `outs` if given."""
    outs = [None] * len(norms) if outs is None else outs
    pairs = [norm.after_add(y, x, out) for norm, x, y, out in zip(norms, xs, ys, outs, strict=True)]
    return [h for h, _ in pairs], [normed for _, normed in pairs]


def _sums(xs: Sequence[np.ndarray], ys: Sequence[np.ndarray], multiplier: float = 1.0) -> list[np.ndarray]:
    return [residual_add(x, y, multiplier) for x, y in zip(xs, ys, strict=True)]


def _side_by_side(first: Linear, second: Linear) -> Callable[[np.ndarray], np.ndarray]:
    """first(a) + second(b) of the rows [a, b]."""
    return lambda x: residual_add(first(x[:, : first.in_dim]), second(x[:, first.in_dim :]))


class DistributedTransformer(Module):
    """Embedding, blocks, final norm and output head of a decoder-only model over a tensor-parallel group.

    dim: width of the residual stream. n_heads: query heads of the whole model. layers: the blocks. norm: the final
    norm, replicated here. output: the head, divided by vocabulary. embedding: divided by vocabulary. kv_params: the
    cache this model needs. devices: the group, one DeviceRef a rank. rope: the rotary embedding of the attention layers
    (layers may hold others). return_logits: which rows `__call__` returns. use_subgraphs, subgraph_layer_groups: which
    layers share one captured body (`cutp.nn.subgraphs`); results do not depend on it. logits_scaling: the logits are
    divided by it. logit_softcapping: cap * tanh(logits / cap), after the scaling. embedding_multiplier: embeddings are
    multiplied by it. return_hidden_states, hidden_state_layers: see `ReturnHiddenStates`.

    Raises ConfigError when the number of layers or heads is not that of `kv_params`, for a mode that is no enum member,
    a `logits_scaling` of 0, a `logit_softcapping` that is not positive, and for subgraph groups that cannot be.
    """

    def __init__(self, dim: int, n_heads: int, layers: Iterable[DistributedTransformerBlock], norm: ShardableCallable,
                 output: ColumnParallelLinear, embedding: VocabParallelEmbedding, kv_params: KVCacheParams, devices,
                 rope: RotaryEmbedding | None, return_logits: ReturnLogits = ReturnLogits.LAST_TOKEN,
                 use_subgraphs: bool = False, subgraph_layer_groups: Sequence[Sequence[int]] | None = None,
                 logits_scaling: float = 1.0, *, logit_softcapping: float | None = None,
                 embedding_multiplier: float = 1.0,
                 return_hidden_states: ReturnHiddenStates = ReturnHiddenStates.NONE,
                 hidden_state_layers: Sequence[int] = ()):
        self.group = DeviceGroup.of(devices)
        self.dim, self.n_heads = dim, n_heads
        self.embed_tokens = embedding
        self.layers = list(layers)
        self.norm: Shards = sharded(norm, ShardingStrategy.replicate(self.group.size), self.group)
        self.lm_head = output
        self.kv_params = kv_params
        self.rope = rope
        self.return_logits = return_logits
        self.logits_scaling, self.logit_softcapping = logits_scaling, logit_softcapping
        self.embedding_multiplier = embedding_multiplier
        self.return_hidden_states = return_hidden_states
        for name, part in (("embedding", embedding), ("output", output), *(("layer", layer) for layer in self.layers)):
            if part.group.size != self.group.size:
                raise ConfigError(f"the {name} is divided over {part.group.size} devices, the model over "
                                  f"{self.group.size}")
        if len(self.layers) != kv_params.num_layers:
            raise ConfigError(f"{len(self.layers)} layers were given, but kv_params is for {kv_params.num_layers}")
        if n_heads != kv_params.n_heads:
            raise ConfigError(f"n_heads is {n_heads}, but kv_params is for {kv_params.n_heads}")
        if not isinstance(return_logits, ReturnLogits):
            raise ConfigError(f"return_logits is {return_logits!r}, not a ReturnLogits")
        if not isinstance(return_hidden_states, ReturnHiddenStates):
            raise ConfigError(f"return_hidden_states is {return_hidden_states!r}, not a ReturnHiddenStates")
        if logits_scaling == 0:
            raise ConfigError("logits_scaling is 0; logits are divided by it")
        if logit_softcapping is not None and logit_softcapping <= 0:
            raise ConfigError(f"logit_softcapping is {logit_softcapping}, it must be positive or None")
        self.hidden_state_layers = check_selected_layers(return_hidden_states, hidden_state_layers, len(self.layers))
        self.layer_runs = plan_layer_runs(self.layers, use_subgraphs, subgraph_layer_groups)

    @property
    def vocab_size(self) -> int:
        return self.embed_tokens.vocab_size

    def __call__(self, batch: RaggedBatch, caches: Sequence[PagedKVCache],
                 return_n_logits: int | np.ndarray = 1) -> tuple:
        """Logits of the rows that `return_logits` names, float32 and equal on every device; hidden states if asked for.

        batch: the new tokens of B requests, T in all, with their cache lengths and lookup table. caches: one a local
        device; the new keys and values are written into them. return_n_logits: n of VARIABLE (or an array of one).

        LAST_TOKEN: (last [B, V],). VARIABLE: (last [B, V], the last n of each request [B * n, V], offsets
        0, n, 2n, ... int64 [B + 1]). ALL: (last [B, V], [T, V], input_row_offsets). Hidden states, if any, come last.
        Norm and head run once, on the rows that are needed. Raises RequestError for a request of fewer than n tokens.
        """
        mode, return_n_logits = self.return_logits, int(np.asarray(return_n_logits).item())
        rows = logit_rows(mode, batch.input_row_offsets, return_n_logits)
        streams = dict.fromkeys(index + 1 for index in self.hidden_state_layers)
        hs = self.hidden_states(batch, caches, streams)
        if self.return_hidden_states is ReturnHiddenStates.ALL_NORMALIZED:
            hs = self.normed(hs)
            local = self._head([h[rows] for h in hs])
        else:
            local = self.local_logits(hs, rows)
        logits = self.group.all_gather(local, axis=-1)[0]
        hidden = self._hidden_result(hs[0], [streams[index + 1] for index in self.hidden_state_layers], batch)
        if mode is ReturnLogits.LAST_TOKEN:
            return (logits, *hidden)
        offsets = batch.input_row_offsets
        if mode is ReturnLogits.VARIABLE:
            offsets = np.arange(len(batch.lengths) + 1, dtype=np.int64) * return_n_logits
        return (logits[offsets[1:] - 1], logits, offsets, *hidden)

    def hidden_states(self, batch: RaggedBatch, caches: Sequence[PagedKVCache],
                      streams: dict[int, np.ndarray | None] | None = None) -> list[np.ndarray]:
        """The residual stream after the last block, before the final norm: one [T, dim] a local device.

        streams: its keys name residual streams that are wanted, 0 for the embeddings and i for what comes out of the
        i-th block, counted from 1; they become its values, [T, dim] each.
        """
        self._check_caches(batch, caches)
        hs = [scale(h, self.embedding_multiplier) for h in self.embed_tokens(batch.tokens)]
        if streams is not None and 0 in streams:
            streams[0] = copied(hs[0])
        # On a device a block leaves its result where it found the residual stream; what the next block's norm makes of
        # it must outlive the block's own memory.
        normed, outs = None, [outside_frames(h) for h in hs]
        for run in self.layer_runs:
            for layer_idx in range(run.start, run.stop):
                following = self.layers[layer_idx + 1].input_layernorm if layer_idx + 1 < len(self.layers) else None
                with frame():
                    hs, normed = self.layers[layer_idx].advance(layer_idx, hs, normed, caches, batch, following, outs)
                if streams is not None and layer_idx + 1 in streams:
                    streams[layer_idx + 1] = copied(hs[0])
        return hs

    def _check_caches(self, batch: RaggedBatch, caches: Sequence[PagedKVCache]) -> None:
        if len(caches) != len(self.group.local_ranks):
            raise ConfigError(f"{len(caches)} caches were given for {len(self.group.local_ranks)} local devices")
        for cache in caches:
            if cache.params.page_size != batch.page_size:
                raise ConfigError(f"the batch is for pages of {batch.page_size} tokens, "
                                  f"the cache has pages of {cache.params.page_size}")

    def local_logits(self, hs: Sequence[np.ndarray], rows: np.ndarray) -> list[np.ndarray]:
        """Each local device's slice of the logits of `rows`, float32 [R, V_local], scaled and capped, not gathered."""
        return self._head(self.normed([take_rows(h, rows) for h in hs]))

    def all_local_logits(self, hs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """`local_logits` of all rows, to draw tokens from: [T, V_local], float32, on a device also of the head's dtype
        where no scaling and no cap has given them the values of another."""
        return self._head(self.normed(hs), logits_to_draw_from)

    def normed(self, hs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The final norm of one residual stream a local device."""
        return forward_sharded_layers(self.norm, hs)

    def _hidden_result(self, h: np.ndarray, selected: list[np.ndarray], batch: RaggedBatch) -> tuple:
        """What `return_hidden_states` adds to the result, from the hidden states of all tokens, [T, dim]."""
        mode = self.return_hidden_states
        if mode is ReturnHiddenStates.NONE:
            return ()
        if mode is ReturnHiddenStates.SELECTED_LAYERS:
            return (selected,)
        return (h[batch.input_row_offsets[1:] - 1],) if mode is ReturnHiddenStates.LAST else (h,)

    def _head(self, normed: Sequence[np.ndarray],
              finish: Callable[[Any, float, float | None], Any] = finish_logits) -> list[np.ndarray]:
        return [finish(part, self.logits_scaling, self.logit_softcapping) for part in self.lm_head.local(normed)]
