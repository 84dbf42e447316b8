"""Times every kernel at the shapes of an 8B model: `python -m cutp.bench.kernels [--json] [--only TEXT]`.

Shapes: width 4096, 32 query and 8 key-value heads of 128, feed-forward 14336, vocabulary 128256, bfloat16, pages of 64
tokens; of mixtures of experts those of Mixtral-8x7B and Qwen3-30B-A3B, of latent attention those of DeepSeek-V3 on
eight ranks and on one. Bytes are those that must be moved, of experts those of the ones that are used. Kernels are held
against what this GPU reads, and where work is counted in FLOP against what cuBLASLt computes, both measured in the same
run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from cutp.array import cuda
from cutp.array.dtypes import bfloat16
from cutp.array.gemm import linear
from cutp.array.kernel import runs_on
from cutp.bench.limits import Limits, normal, reading
from cutp.bench.timing import copies_beyond_cache, microseconds
from cutp.ops.activation_cuda import gated_activation
from cutp.ops.decode_attention_cuda import (
    BLOCKS_PER_MULTIPROCESSOR,
    decode_attention,
    decode_plan,
    decode_workspace,
    rotary_decode_attention,
)
from cutp.ops.embedding_cuda import embedding
from cutp.ops.grouped_gemm_cuda import grouped_linear
from cutp.ops.latent_decode_cuda import (
    CHANNELS,
    VALUE_DIM,
    latent_decode_attention,
    latent_decode_plan,
    latent_decode_workspace,
)
from cutp.ops.latent_decode_cuda import blocks_per_multiprocessor as latent_blocks_per_multiprocessor
from cutp.ops.moe import expert_rows as sort_on_cpu
from cutp.ops.moe_cuda import combine_experts, expert_rows
from cutp.ops.moe_routing_cuda import route_softmax
from cutp.ops.prefill_attention_cuda import prefill_attention, prefill_work_list
from cutp.ops.residual_cuda import finish_logits, residual_add
from cutp.ops.rms_norm_cuda import add_rms_norm, rms_norm
from cutp.ops.rotary_cuda import rotary_kv_write
from cutp.ops.sampling import SamplingRows
from cutp.ops.sampling_cuda import SamplingArrays, SamplingBuffers, buffer_shapes, greedy, passes_needed, sample
from cutp.ops.skinny_gemm_cuda import skinny_gemm
from cutp.ops.stream_gemm_cuda import stream_gemm

DIM, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCAB, PAGE = 4096, 32, 8, 128, 14336, 128256, 64
QKV = (HEADS + 2 * KV_HEADS) * HEAD_DIM
MATRICES = {"qkv": (QKV, DIM), "o": (DIM, DIM), "gate_up": (2 * FFN, DIM), "down": (DIM, FFN), "head": (VOCAB, DIM)}
TOKENS = (1, 8, 32, 4096)
BATCHES = (1, 8, 32)
CONTEXTS = (1024, 2048, 8192, 32768)
PROMPTS = (1024, 4096, 16384)
# Experts, chosen experts, width and feed-forward of one expert.
MIXTURES = {"Mixtral-8x7B": (8, 2, 4096, 14336), "Qwen3-30B-A3B": (128, 8, 2048, 768)}
MIXTURE_TOKENS = (1, 8, 32, 2048)


@dataclass(frozen=True)
class Case:
    """make(copy) gives the call that starts the kernel on its own data; amount: bytes moved, or FLOP when `flops`."""

    kernel: str
    case: str
    amount: float
    make: Callable[[], Callable[[], object]]
    flops: bool = False


@dataclass(frozen=True)
class Result:
    """One line: rate in GB/s or TFLOP/s, and the percentage of the limit measured in this run."""

    kernel: str
    case: str
    microseconds: float
    rate: float
    unit: str
    percent: float


def row_cases() -> Iterator[Case]:
    """Kernels whose work is proportional to the number of tokens."""
    cupy = cuda.cupy()

    def empty(*shape: int) -> Any:
        return cupy.empty(shape, bfloat16)

    for t in TOKENS:
        def norm(t=t):
            x, w, out = normal((t, DIM)), normal((DIM,)), empty(t, DIM)
            return lambda: rms_norm(x, w, 1e-5, out=out)

        def add_norm(t=t):
            x, r, w, out, r_out = normal((t, DIM)), normal((t, DIM)), normal((DIM,)), empty(t, DIM), empty(t, DIM)
            return lambda: add_rms_norm(x, r, w, 1e-5, out=out, residual_out=r_out)

        def add(t=t):
            x, y, out = normal((t, DIM)), normal((t, DIM)), empty(t, DIM)
            return lambda: residual_add(x, y, out=out)

        def gather(t=t):
            table, out = normal((VOCAB, DIM)), empty(t, DIM)
            tokens = cupy.asarray(np.random.default_rng(1).integers(0, VOCAB, t, np.int64))
            return lambda: embedding(tokens, table, 0, out=out)

        def rotary(t=t):
            qkv, q_out = normal((t, QKV)), empty(t, HEADS, HEAD_DIM)
            cos, sin = normal((t, HEAD_DIM // 2), np.float32), normal((t, HEAD_DIM // 2), np.float32)
            pages = empty(-(-t // PAGE), 2, KV_HEADS, PAGE, HEAD_DIM)
            slots = cupy.arange(t, dtype=np.int64)
            return lambda: rotary_kv_write(qkv, cos, sin, slots, pages, q_out=q_out)

        def swiglu(t=t):
            gate_up, out = normal((t, 2 * FFN)), empty(t, FFN)
            return lambda: gated_activation(gate_up, "silu", out=out)

        yield Case("rms_norm", f"T={t}", 4.0 * t * DIM, norm)
        yield Case("add_rms_norm", f"T={t}", 8.0 * t * DIM, add_norm)
        yield Case("residual_add", f"T={t}", 6.0 * t * DIM, add)
        yield Case("embedding", f"T={t}", 4.0 * t * DIM, gather)
        yield Case("rotary_kv_write", f"T={t}", 4.0 * t * QKV + 4.0 * t * HEAD_DIM, rotary)
        yield Case("gated_activation", f"T={t}", 6.0 * t * FFN, swiglu)


def gemm_cases(limits: Limits) -> Iterator[Case]:
    """The GEMMs for few rows, and cuBLASLt beside them, on the matrices of a layer and the head."""
    cupy = cuda.cupy()
    for name, (n, k) in MATRICES.items():
        for m in BATCHES:
            def ours(n=n, k=k, m=m):
                x, w, out = normal((m, k)), normal((n, k)), cupy.empty((m, n), bfloat16)
                return lambda: skinny_gemm(x, w, out=out)

            def streamed(n=n, k=k, m=m):
                x, w, out = normal((m, k)), normal((n, k)), cupy.empty((m, n), bfloat16)
                return lambda: stream_gemm(x, w, out=out, pdl=True)

            def cublas(n=n, k=k, m=m):
                x, w, out = normal((m, k)), normal((n, k)), cupy.empty((m, n), bfloat16)
                return lambda: linear(x, w, out, workspace=limits.workspace)

            moved = 2.0 * (n * k + m * k + m * n)
            yield Case("skinny_gemm", f"{name} {n}x{k} M={m}", moved, ours)
            if runs_on((9, 0)):
                yield Case("stream_gemm", f"{name} {n}x{k} M={m}", moved, streamed)
            yield Case("cuBLASLt", f"{name} {n}x{k} M={m}", moved, cublas)


def decode_cases() -> Iterator[Case]:
    """Decode attention at several batch sizes and contexts, its plan not included (it runs once a step): by itself; as
    in a step, with the rotary embedding and started under the kernel before, here another of the same; and beside both
    reading as many bytes and nothing else, which takes its time to start and end too."""
    cupy = cuda.cupy()
    for batch in BATCHES:
        for context in CONTEXTS:
            per_request = context // PAGE
            if batch * context > 32 * 8192:
                continue

            def make(rotates, batch=batch, context=context, per_request=per_request):
                table = np.random.default_rng(2).permutation(batch * per_request).reshape(batch, per_request)
                pages = normal((batch * per_request, 2, KV_HEADS, PAGE, HEAD_DIM))
                lengths = cupy.full(batch, context, np.int32)
                shapes = decode_workspace(batch, context, HEADS, KV_HEADS, HEAD_DIM)
                plan = cupy.zeros(shapes.plan, np.int32)
                decode_plan(lengths, KV_HEADS, together=True, plan=plan)
                q, qkv = normal((batch, HEADS, HEAD_DIM)), normal((batch, QKV))
                cos, sin = normal((2, batch, HEAD_DIM // 2), np.float32)
                lookup_table = cupy.asarray(table.astype(np.int32))
                rest = pages, lookup_table, lengths, plan, HEAD_DIM**-0.5
                options = {
                    "partials": cupy.empty(shapes.partials, np.float32),
                    "counters": cupy.zeros(shapes.counters, np.uint32),
                    "blocks": cupy.cuda.Device().attributes["MultiProcessorCount"] * BLOCKS_PER_MULTIPROCESSOR,
                    "out": cupy.empty((batch, HEADS, HEAD_DIM), bfloat16),
                }
                if rotates:
                    return lambda: rotary_decode_attention(qkv, cos, sin, *rest, **options, pdl=True)
                return lambda: decode_attention(q, *rest, **options)

            def read(batch=batch, per_request=per_request):
                return reading(normal((batch * per_request, 2, KV_HEADS, PAGE, HEAD_DIM)))

            case, moved = f"B={batch} context={context}", 4.0 * batch * context * KV_HEADS * HEAD_DIM
            yield Case("decode_attention", case, moved, partial(make, False))
            yield Case("rotary_decode_attention", case, moved, partial(make, True))
            yield Case("decode_attention, read", case, moved, read)


def prefill_cases() -> Iterator[Case]:
    """Causal prefill attention of one prompt."""
    cupy = cuda.cupy()
    for t in PROMPTS:
        def make(t=t):
            table = np.random.default_rng(3).permutation(t // PAGE)[None].astype(np.int32)
            pages = normal((t // PAGE, 2, KV_HEADS, PAGE, HEAD_DIM))
            q, out = normal((t, HEADS, HEAD_DIM)), cupy.empty((t, HEADS, HEAD_DIM), bfloat16)
            work = cupy.asarray(prefill_work_list([t], [0], HEADS // KV_HEADS, head_dim=HEAD_DIM,
                                                  dtype=bfloat16, row_offsets=[0]))
            offsets, cached = cupy.asarray(np.array([0, t], np.int32)), cupy.zeros(1, np.int32)
            lookup_table = cupy.asarray(table)
            return lambda: prefill_attention(q, pages, lookup_table, offsets, cached, work, HEAD_DIM**-0.5, out=out)

        yield Case("prefill_attention", f"T={t}", 2.0 * t * t * HEADS * HEAD_DIM, make, flops=True)


def mixture_cases() -> Iterator[Case]:
    """A mixture of experts, step by step, with experts chosen at random; from 256 tokens on products count FLOP."""
    cupy = cuda.cupy()
    for name, (count, top_k, dim, width) in MIXTURES.items():
        for t in MIXTURE_TOKENS:
            chosen = np.random.default_rng(4).random((t, count)).argsort(axis=1)[:, :top_k].astype(np.int32)
            rows, used = t * top_k, len(np.unique(chosen))

            def route(t=t, count=count, top_k=top_k):
                logits = normal((t, count))
                experts, weights = cupy.empty((t, top_k), np.int32), cupy.empty((t, top_k), np.float32)
                return lambda: route_softmax(logits, top_k, renormalize=True, experts=experts, weights=weights)

            def sort(chosen=chosen, count=count):
                experts, tokens = cupy.asarray(chosen), cupy.empty(chosen.size, np.int32)
                offsets, positions = cupy.empty(count + 1, np.int32), cupy.empty(chosen.shape, np.int32)
                return lambda: expert_rows(experts, 0, count, tokens=tokens, offsets=offsets, positions=positions)

            def product(n, k, gathered, chosen=chosen, count=count):
                sorted_rows = sort_on_cpu(chosen, 0, count)
                offsets = cupy.asarray(sorted_rows.offsets)
                tokens = cupy.asarray(sorted_rows.tokens) if gathered else None
                x, w = normal((len(chosen) if gathered else chosen.size, k)), normal((count, n, k))
                out = cupy.empty((chosen.size, n), bfloat16)
                return lambda: grouped_linear(x, w, offsets, tokens=tokens, out=out)

            def combine(chosen=chosen, count=count, dim=dim):
                positions = cupy.asarray(sort_on_cpu(chosen, 0, count).positions)
                y, weights = normal((chosen.size, dim)), normal(chosen.shape, np.float32)
                out = cupy.empty((len(chosen), dim), bfloat16)
                return lambda: combine_experts(y, positions, weights, out=out)

            case = f"{name} T={t}"
            yield Case("moe_route", case, 2.0 * t * count + 8.0 * rows, route)
            yield Case("moe_expert_rows", case, 12.0 * rows, sort)
            for part, n, k in (("gate_up", 2 * width, dim), ("down", dim, width)):
                moved = 2.0 * (used * n * k + (t if part == "gate_up" else rows) * k + rows * n)
                flops = t >= 256
                yield Case("moe_grouped_gemm", f"{case} {part}", 2.0 * rows * n * k if flops else moved,
                           lambda n=n, k=k, gathered=part == "gate_up", product=product: product(n, k, gathered),
                           flops=flops)
            yield Case("moe_combine", case, 2.0 * dim * (rows + t), combine)


def latent_cases() -> Iterator[Case]:
    """Latent decode attention, its plan not included. All heads read the same bytes: with 128 the limit is FLOP."""
    cupy = cuda.cupy()
    for heads in (16, 128):
        for batch in BATCHES:
            for context in CONTEXTS:
                def make(heads=heads, batch=batch, context=context):
                    per_request = context // PAGE
                    table = np.random.default_rng(5).permutation(batch * per_request).reshape(batch, per_request)
                    pages, q = normal((batch * per_request, 1, 1, PAGE, CHANNELS)), normal((batch, heads, CHANNELS))
                    lengths = cupy.full(batch, context, np.int32)
                    shapes = latent_decode_workspace(batch, context, heads)
                    plan, partials = cupy.zeros(shapes.plan, np.int32), cupy.empty(shapes.partials, np.float32)
                    latent_decode_plan(lengths, heads, plan=plan)
                    out, lookup_table = cupy.empty((batch, heads, VALUE_DIM), bfloat16), cupy.asarray(table, np.int32)
                    blocks = (cupy.cuda.Device().attributes["MultiProcessorCount"]
                              * latent_blocks_per_multiprocessor(heads))
                    return lambda: latent_decode_attention(q, pages, lookup_table, lengths, plan, CHANNELS**-0.5,
                                                           partials=partials, blocks=blocks, out=out)

                flops = heads == 128
                amount = 2.0 * heads * (CHANNELS + VALUE_DIM) if flops else 2.0 * CHANNELS
                yield Case("latent_decode", f"H={heads} B={batch} context={context}", amount * batch * context, make,
                           flops=flops)


def sampling_cases() -> Iterator[Case]:
    """Greedy and top-p sampling over the whole vocabulary on one rank; the bytes are the logits read once."""
    cupy, float32 = cuda.cupy(), np.dtype(np.float32)
    for batch in BATCHES:
        for name, temperature, top_p, dtype in (("greedy", 0.0, 1.0, float32), ("greedy", 0.0, 1.0, bfloat16),
                                                ("temperature", 1.0, 1.0, float32), ("top_p 0.9", 1.0, 0.9, float32),
                                                ("top_p 0.9", 1.0, 0.9, bfloat16)):
            def make(batch=batch, temperature=temperature, top_p=top_p, dtype=dtype):
                ones, ids = np.ones(batch), np.arange(batch)
                rows = SamplingRows(temperature * ones, 0 * ids, top_p * ones, 0 * ones, ids.astype(np.uint64), 0 * ids,
                                    ids)
                arrays, passes = SamplingArrays.of(rows, cupy.asarray), passes_needed(rows)
                shapes = buffer_shapes(batch, VOCAB)
                histograms = tuple(cupy.zeros(*one) for one in shapes.pop("histograms"))
                buffers = SamplingBuffers(**{key: cupy.zeros(*one) for key, one in shapes.items()},
                                          histograms=histograms)
                host = 3 * np.random.default_rng(0).standard_normal((batch, VOCAB), np.float32)
                logits, tokens = cupy.asarray(host.astype(dtype)), cupy.zeros(batch, np.int64)
                if temperature == 0.0:
                    return lambda: greedy(logits, 0, arrays, buffers, lambda x: x[None], tokens=tokens)
                return lambda: sample(logits, 0, arrays, buffers, lambda x: x[None], tokens=tokens, passes=passes)

            yield Case("sampling", f"B={batch} {name} {dtype.name}", float(dtype.itemsize) * batch * VOCAB, make)


def logits_cases() -> Iterator[Case]:
    """The last step of the logits, where they are scaled, capped or wanted in float32: they are read and written."""
    cupy = cuda.cupy()
    for batch in BATCHES:
        for name, settings in (("to float32", (1.0, None)), ("scaled", (8.0, None)), ("capped", (1.0, 30.0))):
            def make(batch=batch, settings=settings):
                logits, out = normal((batch, VOCAB)), cupy.empty((batch, VOCAB), np.float32)
                return lambda: finish_logits(logits, *settings, out=out)

            yield Case("finish_logits", f"B={batch} {name}", 6.0 * batch * VOCAB, make)


def measure(case: Case, limits: Limits) -> Result:
    copies = 1 if case.flops else copies_beyond_cache(int(case.amount))
    time = microseconds([case.make() for _ in range(copies)], least_launches=10)
    if case.flops:
        rate = case.amount / time / 1e6
        return Result(case.kernel, case.case, time, rate, "TFLOP/s", 100 * rate / limits.matmul_tflops)
    rate = case.amount / time / 1e3
    return Result(case.kernel, case.case, time, rate, "GB/s", 100 * rate / limits.read_gbps)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m cutp.bench.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON line a case")
    parser.add_argument("--only", default="", metavar="TEXT", help="only kernels whose name contains this")
    args = parser.parse_args()
    limits = Limits()
    head = {"read_gbps": round(limits.read_gbps, 1), "matmul_tflops": round(limits.matmul_tflops, 1)}
    print(json.dumps(head) if args.json else f"this GPU: reads {limits.read_gbps:.0f} GB/s, "
          f"cuBLASLt 8192^3 {limits.matmul_tflops:.0f} TFLOP/s", flush=True)
    for case in (*row_cases(), *gemm_cases(limits), *decode_cases(), *prefill_cases(), *mixture_cases(),
                 *latent_cases(), *sampling_cases(), *logits_cases()):
        if args.only not in case.kernel:
            continue
        r = measure(case, limits)
        print(json.dumps(asdict(r)) if args.json else f"{r.kernel:<22} {r.case:<30} {r.microseconds:9.1f} us "
              f"{r.rate:8.1f} {r.unit:<8} {r.percent:5.1f} %", flush=True)


if __name__ == "__main__":
    main()
