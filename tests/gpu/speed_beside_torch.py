"""Speed of cutp's prefill attention beside cuDNN's, and of Hugging Face's model, on the GPU in use.

    pip install torch transformers                     # beside cutp[cuda13]
    python tests/gpu/speed_beside_torch.py attention   # TFLOP/s, causal, random shuffled pages
    python tests/gpu/speed_beside_torch.py model       # Llama-3.1-8B's shape: prefill, compiled decoding at 1k context

Run `cutp bench --shape llama-3.1-8b --prompt-len 1024,4096,16384` beside it: what a GPU gives differs by a few percent
from one to the next, and with its temperature.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cutp.array import cuda  # noqa: E402
from cutp.array.dtypes import bfloat16  # noqa: E402
from cutp.bench.limits import normal  # noqa: E402
from cutp.bench.shapes import shape_directory  # noqa: E402
from cutp.bench.timing import microseconds  # noqa: E402
from cutp.ops.prefill_attention_cuda import prefill_attention, prefill_work_list  # noqa: E402

PAGE = 64
_REST = 0.5  # seconds before each measurement: a GPU at its power limit lowers its clock within some 0.1 s
_RAGGED = np.random.default_rng(7).integers(100, 901, 64).tolist()
# name -> new tokens of each request, tokens cached before them, query heads, key-value heads, head dim
CASES: dict[str, tuple[list[int], list[int], int, int, int]] = {
    "1k": ([1024], [0], 32, 8, 128),
    "4k": ([4096], [0], 32, 8, 128),
    "16k": ([16384], [0], 32, 8, 128),
    "2k after 30k": ([2048], [30720], 32, 8, 128),
    "8k, D = 64": ([8192], [0], 32, 8, 64),
    "8k, D = 256": ([8192], [0], 16, 8, 256),
    "64 prompts of 100 to 900": (_RAGGED, [0] * 64, 32, 8, 128),
    "64 equal prompts": ([sum(_RAGGED) // 64] * 64, [0] * 64, 32, 8, 128),
}


def flop(new: list[int], cached: list[int], heads: int, head_dim: int) -> float:
    """Multiplications and additions of both products, of what a causal mask leaves."""
    pairs = sum(n * c + n * (n + 1) / 2 for n, c in zip(new, cached, strict=True))
    return 4.0 * pairs * heads * head_dim


def ours(new: list[int], cached: list[int], heads: int, kv_heads: int, head_dim: int) -> Callable[[], None]:
    cupy = cuda.cupy()
    pages_of = [-(-(n + c) // PAGE) for n, c in zip(new, cached, strict=True)]
    numbers = np.random.default_rng(3).permutation(sum(pages_of)).astype(np.int32)
    table = np.zeros((len(new), max(pages_of)), np.int32)
    for row, count, end in zip(table, pages_of, np.cumsum(pages_of), strict=True):
        row[:count] = numbers[end - count : end]
    starts = np.concatenate([[0], np.cumsum(new)]).astype(np.int32)
    pages = normal((sum(pages_of), 2, kv_heads, PAGE, head_dim))
    q, out = normal((int(starts[-1]), heads, head_dim)), cupy.empty((int(starts[-1]), heads, head_dim), bfloat16)
    work = cupy.asarray(prefill_work_list(new, cached, heads // kv_heads, head_dim=head_dim, dtype=bfloat16,
                                          row_offsets=starts[:-1]))
    lookup_table, offsets, lengths = cupy.asarray(table), cupy.asarray(starts), cupy.asarray(np.array(cached, np.int32))
    return lambda: prefill_attention(q, pages, lookup_table, offsets, lengths, work, head_dim**-0.5, out=out, pdl=True)


def cudnn(tokens: int, heads: int, kv_heads: int, head_dim: int) -> float:
    """Seconds of one causal attention of a prompt."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = (torch.randn(1, n, tokens, head_dim, device="cuda", dtype=torch.bfloat16)
               for n in (heads, kv_heads, kv_heads))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return seconds(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True,
                                                                                enable_gqa=True), 10, 3)


def seconds(call: Callable[[], object], launches: int = 1, repeats: int = 5) -> float:
    """Median time of `call`, after a run that is not counted."""
    times = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(launches):
            call()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) / launches)
    return median(times[1:])


def attention() -> None:
    for name, (new, cached, heads, kv_heads, head_dim) in CASES.items():
        amount = flop(new, cached, heads, head_dim)
        time.sleep(_REST)
        rate = amount / microseconds([ours(new, cached, heads, kv_heads, head_dim)], least_launches=10) / 1e6
        line = f"{name:<26} cutp {rate:6.1f} TFLOP/s"
        if len(new) == 1 and not cached[0]:
            time.sleep(_REST)
            line += f"   cuDNN {amount / cudnn(new[0], heads, kv_heads, head_dim) / 1e12:6.1f}"
        print(line, flush=True)


def model() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, StaticCache

    with shape_directory("llama-3.1-8b", None) as directory:
        config = AutoConfig.from_pretrained(directory)
    with torch.device("cuda"):
        net = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    steps, context = 16, 1024
    with torch.inference_mode():
        for tokens in (1024, 4096):
            ids = torch.randint(0, config.vocab_size, (1, tokens), device="cuda")
            took = seconds(lambda ids=ids: net(ids, use_cache=True, logits_to_keep=1))
            print(f"Hugging Face prefill {tokens}: {1e3 * took:.2f} ms", flush=True)
        cache = StaticCache(config=config, max_cache_len=2 * context)
        net(ids[:, :context], past_key_values=cache, cache_position=torch.arange(context, device="cuda"),
            logits_to_keep=1)
        compiled = torch.compile(net.forward, mode="reduce-overhead", fullgraph=True)
        token, position = torch.zeros((1, 1), dtype=torch.long, device="cuda"), torch.tensor([context], device="cuda")

        def decode() -> None:
            for _ in range(steps):
                out = compiled(token, past_key_values=cache, cache_position=position, position_ids=position[None])
                token.copy_(out.logits[:, -1:].argmax(-1))
                position.add_(1)
            position.fill_(context)

        for _ in range(3):
            decode()
        took = seconds(decode) / steps
        print(f"Hugging Face decode, compiled, 1 request at {context}: {1e3 * took:.3f} ms, {1 / took:.1f} tok/s")


if __name__ == "__main__":
    if sys.argv[1:] not in (["attention"], ["model"]):
        sys.exit(__doc__)
    {"attention": attention, "model": model}[sys.argv[1]]()
