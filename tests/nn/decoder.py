"""A decoder with any mix of the layers' options, built from `cutp.nn`, and the same in float64 by hand."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from cutp.kv_cache import KVCacheParams
from cutp.nn.attention import AttentionWithRope, TensorParallelAttentionWithRope
from cutp.nn.distributed_gemm import DistributedGemmConfig
from cutp.nn.distributed_transformer import DistributedTransformer, DistributedTransformerBlock
from cutp.nn.embedding import VocabParallelEmbedding
from cutp.nn.linear import ColumnParallelLinear
from cutp.nn.mlp import MLP
from cutp.nn.norm import LayerNorm, RMSNorm
from cutp.nn.rotary_embedding import RotaryEmbedding
from tests.nn.building import fill, make_batch, poisoned_caches

EPS, THETA = 1e-3, 50.0
PROMPTS = ([3, 1, 4, 1, 5], [9, 0], [2, 6, 5, 3, 5, 8, 9])


@dataclass(frozen=True)
class Spec:
    """Sizes and options. rotary: "half", "interleaved" or "none" of layer i at i % len; window likewise.

    qk_norm: "head", "projection" or none. norms: those of a block, "pre", "post" or "both", or those of a "parallel"
    block. fused: one weight for queries, keys and values, and one for gate and up.
    """

    vocab: int = 13
    hidden: int = 10
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 4
    width: int = 11
    layers: int = 2
    tied: bool = False
    bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: str | None = None
    qk_norm_offset: float = 0.0
    clip: float | None = None
    scale: float | None = None
    window: tuple[int | None, ...] = (None,)
    softcap: float | None = None
    sinks: bool = False
    rotary: tuple[str, ...] = ("half",)
    norms: str = "pre"
    fused: bool = False
    swiglu_limit: float | None = None
    layer_norm: bool = False
    norm_offset: float = 0.0
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
    logit_softcapping: float | None = None
    overlap: bool = False
    dtype: np.dtype = np.dtype(np.float32)

    def of_layer(self, values, index):
        return values[index % len(values)]


EVERYTHING = Spec(heads=6, kv_heads=3, bias=True, output_bias=True, mlp_bias=True, qk_norm="head", clip=1.2, scale=0.7,
                  window=(3, None), softcap=2.0, sinks=True, rotary=("half", "interleaved", "none"), layers=3,
                  swiglu_limit=0.8, norm_offset=1.0, embedding_multiplier=1.5, residual_multiplier=0.6,
                  logits_scaling=0.5, logit_softcapping=3.0)
# The same with the options that exclude those of EVERYTHING.
OTHERWISE = replace(EVERYTHING, qk_norm="projection", qk_norm_offset=1.0, fused=True, norms="both")


def build(spec: Spec, devices, **options) -> DistributedTransformer:
    ropes = {"half": RotaryEmbedding(spec.head_dim, max_seq_len=64, theta=THETA),
             "interleaved": RotaryEmbedding(spec.head_dim, max_seq_len=64, theta=THETA, interleaved=True),
             "none": None}
    gemm = DistributedGemmConfig(spec.overlap)

    def norm():
        if spec.layer_norm:
            return LayerNorm(spec.hidden, spec.dtype, EPS)
        return RMSNorm(spec.hidden, spec.dtype, EPS, spec.norm_offset)

    def block(i):
        attention = AttentionWithRope(
            spec.hidden, spec.heads, spec.kv_heads, spec.head_dim, spec.dtype, ropes[spec.of_layer(spec.rotary, i)],
            has_bias=spec.bias, has_output_bias=spec.output_bias, fused_qkv=spec.fused,
            qk_norm_eps=EPS if spec.qk_norm else None, qk_norm_over_projection=spec.qk_norm == "projection",
            qk_norm_offset=spec.qk_norm_offset, clip_qkv=spec.clip, scale=spec.scale,
            window=spec.of_layer(spec.window, i), softcap=spec.softcap, has_sinks=spec.sinks)
        mlp = MLP(spec.hidden, spec.width, spec.dtype, has_bias=spec.mlp_bias, swiglu_limit=spec.swiglu_limit,
                  fused=spec.fused)
        parallel, before, after = spec.norms == "parallel", spec.norms != "post", spec.norms in ("post", "both")
        return DistributedTransformerBlock(
            TensorParallelAttentionWithRope(attention, devices, gemm), mlp, norm() if before else None,
            norm() if before and not parallel else None, devices, gemm, parallel=parallel,
            residual_multiplier=spec.residual_multiplier, post_attention_norm=norm() if after else None,
            post_mlp_norm=norm() if after else None)

    embedding = VocabParallelEmbedding(spec.vocab, spec.hidden, spec.dtype, devices)
    head = ColumnParallelLinear(spec.hidden, spec.vocab, spec.dtype, devices, embedding if spec.tied else None)
    kv_params = KVCacheParams(spec.dtype, spec.heads, spec.kv_heads, spec.head_dim, spec.layers, page_size=3)
    settings = dict(logits_scaling=spec.logits_scaling, logit_softcapping=spec.logit_softcapping,
                    embedding_multiplier=spec.embedding_multiplier)
    return DistributedTransformer(spec.hidden, spec.heads, [block(i) for i in range(spec.layers)], norm(), head,
                                  embedding, kv_params, devices, ropes["half"], **(settings | options))


def forward(model, prompts=PROMPTS, count=1):
    """One pass over whole prompts, on empty caches."""
    caches = poisoned_caches(model.kv_params, model.group.size, model.group.local_ranks)
    return model(make_batch(prompts, [0] * len(prompts)), caches, count)


def results(spec, devices, prompts=PROMPTS, count=1, values=None, **options):
    """What a model with random weights returns, and the weights."""
    model = build(spec, devices, **options)
    values = fill(model, values)
    return forward(model, prompts, count), values


@dataclass(frozen=True)
class Trace:
    """Float64: logits [T, V], the residual stream after each layer [T, hidden], and the last one normalised."""

    logits: np.ndarray
    after: list[np.ndarray]
    normed: np.ndarray


def by_hand(values, spec: Spec, tokens) -> Trace:
    """One prompt, whole, without cache, pages or shards."""
    w = {name: value.astype(np.float64) for name, value in values.items()}
    n = len(tokens)

    def rms(x, weight, offset=0.0):
        return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + EPS) * (weight + offset)

    for name in [name for name in w if "qkv_proj" in name or "gate_up_proj" in name]:
        q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        parts, ends = (("q_proj", "k_proj", "v_proj"), [q, q + kv]) if "qkv" in name else (
            ("gate_proj", "up_proj"), [spec.width])
        for part, rows in zip(parts, np.split(w[name], ends), strict=True):
            w[name.replace("qkv_proj", part).replace("gate_up_proj", part)] = rows

    def norm(x, name):
        if f"{name}.weight" not in w:  # this block has no such norm
            return x
        if spec.layer_norm:
            x = x - x.mean(axis=-1, keepdims=True)
            return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + EPS) * w[f"{name}.weight"] + w[f"{name}.bias"]
        return rms(x, w[f"{name}.weight"], spec.norm_offset)

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    def rotate(y, kind):
        if kind == "none":
            return y
        half = spec.head_dim // 2
        turn = np.exp(1j * np.arange(n)[:, None] / THETA ** (np.arange(half) / half))[:, None]
        y = y.copy()
        first, second = (slice(0, None, 2), slice(1, None, 2)) if kind == "interleaved" else (
            slice(0, half), slice(half, None))
        turned = (y[..., first] + 1j * y[..., second]) * turn
        y[..., first], y[..., second] = turned.real, turned.imag
        return y

    def attention(x, i):
        name = f"layers.{i}.self_attn"
        heads = []
        for p in "qkv":
            y = linear(x, f"{name}.{p}_proj")
            y = y if spec.clip is None else np.clip(y, -spec.clip, spec.clip)
            if p != "v" and spec.qk_norm == "projection":
                y = rms(y, w[f"{name}.{p}_norm.weight"], spec.qk_norm_offset)
            y = y.reshape(n, -1, spec.head_dim)
            if p != "v":
                y = rms(y, w[f"{name}.{p}_norm.weight"], spec.qk_norm_offset) if spec.qk_norm == "head" else y
                y = rotate(y, spec.of_layer(spec.rotary, i))
            heads.append(y)
        q, k, v = heads
        window = spec.of_layer(spec.window, i)
        distance = np.arange(n)[:, None] - np.arange(n)
        seen = (distance >= 0) & (distance < (n if window is None else window))
        out = np.empty_like(q)
        for h in range(spec.heads):
            kv = h // (spec.heads // spec.kv_heads)
            scores = q[:, h] @ k[:, kv].T * (1 / math.sqrt(spec.head_dim) if spec.scale is None else spec.scale)
            if spec.softcap is not None:
                scores = spec.softcap * np.tanh(scores / spec.softcap)
            weights = np.where(seen, np.exp(scores), 0)
            total = weights.sum(axis=1) + (np.exp(w[f"{name}.sinks"][h]) if spec.sinks else 0)
            out[:, h] = weights / total[:, None] @ v[:, kv]
        return linear(out.reshape(n, -1), f"{name}.o_proj")

    def mlp(x, i):
        gate, up = linear(x, f"layers.{i}.mlp.gate_proj"), linear(x, f"layers.{i}.mlp.up_proj")
        if spec.swiglu_limit is not None:
            gate, up = np.minimum(gate, spec.swiglu_limit), np.clip(up, -spec.swiglu_limit, spec.swiglu_limit)
        return linear(gate / (1 + np.exp(-gate)) * up, f"layers.{i}.mlp.down_proj")

    h = w["embed_tokens.weight"][tokens] * spec.embedding_multiplier
    after = []
    for i in range(spec.layers):
        layer = f"layers.{i}"
        x = norm(h, f"{layer}.input_layernorm")
        if spec.norms == "parallel":
            h = h + spec.residual_multiplier * (attention(x, i) + mlp(x, i))
        else:
            h = h + spec.residual_multiplier * norm(attention(x, i), f"{layer}.post_self_attn_layernorm")
            y = mlp(norm(h, f"{layer}.post_attention_layernorm"), i)
            h = h + spec.residual_multiplier * norm(y, f"{layer}.post_mlp_layernorm")
        after.append(h)
    normed = norm(h, "norm")
    logits = normed @ w["embed_tokens.weight" if spec.tied else "lm_head.weight"].T / spec.logits_scaling
    if spec.logit_softcapping is not None:
        logits = spec.logit_softcapping * np.tanh(logits / spec.logit_softcapping)
    return Trace(logits, after, normed)


def all_by_hand(values, spec, prompts=PROMPTS) -> Trace:
    """Every prompt, the rows one after the other."""
    traces = [by_hand(values, spec, prompt) for prompt in prompts]
    after = [np.concatenate(each) for each in zip(*(trace.after for trace in traces), strict=True)]
    return Trace(np.concatenate([t.logits for t in traces]), after, np.concatenate([t.normed for t in traces]))


def ends(prompts=PROMPTS):
    """The row of the last token of each prompt."""
    return np.cumsum([len(prompt) for prompt in prompts]) - 1
