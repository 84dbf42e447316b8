"""Holds cutp against Hugging Face transformers: log-probabilities of a wide model, greedy tokens of `tales`.

    pip install torch transformers safetensors          # beside cutp[cuda13]
    python tests/gpu/hf_parity.py                       # on a GPU: the shape of Llama-3.1-8B cut to 4 layers
    python tests/gpu/hf_parity.py --device cpu --tiny   # the same comparison, small, anywhere

Two right implementations differ in bfloat16 by rounding alone. How much that is, Hugging Face says itself: its float32
results of the same weights are taken for true, its own two kinds of attention (eager and sdpa) give the yardstick.
Exits with 1 unless, over the log-probabilities of all tokens of random texts,

    mean |cutp - float32|  <=  1.15 of the larger mean of eager and sdpa
    max  |cutp - float32|  <=  1.5 of the larger maximum of the two
    mean |cutp - eager|    <=  1.6 of the larger mean (1.41 is what independent errors have)

and the greedy tokens of `tales` are Hugging Face's: in float32 all, in bfloat16 up to the first place where its own two
best tokens lie within 0.25.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cutp import LLM, SamplingParams  # noqa: E402
from cutp.checkpoint.files import resolve_model  # noqa: E402

MEAN_FACTOR, MAX_FACTOR, PAIR_FACTOR = 1.15, 1.5, 1.6
NEAR_TIE = 0.25  # two steps of a bfloat16 number near 16, as large as logits are
NEW_TOKENS = 60
TEXTS = ["Once upon a time", "The little dog", "Tom and his sister went to the park because", "It was raining, so"]

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "vocab_size": 128256,
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 4, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192},
    "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16",
}
TINY = {"vocab_size": 2000, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8,
        "num_key_value_heads": 2, "head_dim": 64}

# Standard deviation of a product's result for an input of unit size.
GAINS = {"q_proj": 1.4, "k_proj": 1.4, "o_proj": 1.5, "down_proj": 2.0, "lm_head": 2.5}


transformers.logging.disable_progress_bar()


def write_checkpoint(directory: Path, config: dict, device: str) -> None:
    """Random weights whose rows differ in size, with scores and logits that spread as in a trained model."""
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator(device).manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    def matrix(name: str, rows: int, columns: int) -> torch.Tensor:
        gain = GAINS.get(name.split(".")[-2], 1.0)
        return normal(rows, columns) * (0.3 * normal(rows, 1)).exp() * (gain / columns**0.5)

    hidden, ffn, vocab = (config[name] for name in ("hidden_size", "intermediate_size", "vocab_size"))
    q, kv = (config[name] * config["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    for layer in range(config["num_hidden_layers"]):
        sizes = {"self_attn.q_proj": (q, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
                 "self_attn.o_proj": (hidden, q), "mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden),
                 "mlp.down_proj": (hidden, ffn), "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
        shapes |= {f"model.layers.{layer}.{name}.weight": size for name, size in sizes.items()}
    shapes["lm_head.weight"] = (vocab, hidden)
    tensors = {}
    for name, shape in shapes.items():
        if len(shape) == 1:
            values = 1 + 0.2 * normal(*shape)
        else:
            values = normal(*shape) if "embed" in name else matrix(name, *shape)
        tensors[name] = values.to(torch.bfloat16).cpu()
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def hugging_face(directory: Path, device: str, dtype: torch.dtype, attention: str):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation=attention)
    return model.to(device).eval()


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@torch.no_grad()
def hf_logprobs(directory: Path, device: str, dtype: torch.dtype, attention: str, texts: list[list[int]]) -> np.ndarray:
    """Log-probabilities of all tokens but the first of each text, float64."""
    model = hugging_face(directory, device, dtype, attention)
    found = []
    for ids in texts:
        tokens = torch.tensor(ids, device=device)
        logits = model(tokens[None], use_cache=False).logits[0, :-1]
        every = torch.log_softmax(logits.float(), -1)
        found.append(every.gather(1, tokens[1:, None])[:, 0].cpu().numpy())
        del logits, every
    del model
    release()
    return np.concatenate(found).astype(np.float64)


def cutp_logprobs(directory: Path, device: str, texts: list[list[int]], max_len: int) -> np.ndarray:
    with LLM(directory, device=device, dtype="bfloat16", max_len=max_len) as llm:
        scores = llm.score(texts)
    return np.concatenate([score.logprobs[1:] for score in scores]).astype(np.float64)


def compare_logprobs(directory: Path, device: str, texts: list[list[int]], seconds: dict[str, float]) -> list[str]:
    """Prints the differences; returns what is out of bounds."""
    results = {}
    for name, make in {
        "cutp": lambda: cutp_logprobs(directory, device, texts, max(map(len, texts)) + 1),
        "hf eager": lambda: hf_logprobs(directory, device, torch.bfloat16, "eager", texts),
        "hf sdpa": lambda: hf_logprobs(directory, device, torch.bfloat16, "sdpa", texts),
        "hf float32": lambda: hf_logprobs(directory, device, torch.float32, "eager", texts),
    }.items():
        began = time.perf_counter()
        results[name] = make()
        seconds[name] = time.perf_counter() - began
    true = results["hf float32"]
    print(f"{len(true)} log-probabilities, mean {true.mean():.3f}, greatest {true.max():.3f}")
    found = {}
    for one, other in (("cutp", "hf eager"), ("cutp", "hf sdpa"), ("hf eager", "hf sdpa"), ("cutp", "hf float32"),
                       ("hf eager", "hf float32"), ("hf sdpa", "hf float32")):
        difference = np.abs(results[one] - results[other])
        found[one, other] = difference.mean(), difference.max()
        print(f"  {one:>9} - {other:<11} mean {difference.mean():.5f}  max {difference.max():.4f}  "
              f"signed mean {(results[one] - results[other]).mean():+.5f}")
    mean, greatest = (max(found[kind, "hf float32"][i] for kind in ("hf eager", "hf sdpa")) for i in (0, 1))
    limits = [("mean |cutp - float32|", found["cutp", "hf float32"][0], MEAN_FACTOR * mean),
              ("max |cutp - float32|", found["cutp", "hf float32"][1], MAX_FACTOR * greatest),
              ("mean |cutp - eager|", found["cutp", "hf eager"][0], PAIR_FACTOR * mean)]
    return [f"{name} is {value:.5f}, above {limit:.5f}" for name, value, limit in limits if not value <= limit]


@torch.no_grad()
def hf_greedy(model, prompt: list[int], device: str) -> tuple[list[int], list[float]]:
    """Greedy tokens, a full pass each, and the lead of each over the second best."""
    tokens, gaps = list(prompt), []
    for _ in range(NEW_TOKENS):
        best = model(torch.tensor([tokens], device=device), use_cache=False).logits[0, -1].float().topk(2)
        tokens.append(int(best.indices[0]))
        gaps.append(float(best.values[0] - best.values[1]))
    return tokens[len(prompt) :], gaps


def compare_greedy(device: str, dtype: str) -> list[str]:
    directory = resolve_model(None)
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    with LLM(dtype=dtype, device=device) as llm:
        prompts = [llm.tokenize(text) for text in TEXTS]
        outputs = llm.generate(prompts, params)
    model = hugging_face(directory, device, getattr(torch, dtype), "eager")
    wrong, equal = [], 0
    for text, prompt, output in zip(TEXTS, prompts, outputs, strict=True):
        expected, gaps = hf_greedy(model, prompt, device)
        got = list(output.token_ids)
        if got == expected:
            equal += 1
            continue
        at = next(i for i, (a, b) in enumerate(zip(got, expected, strict=True)) if a != b)
        print(f"  tales {dtype}: {text!r} differs from token {at} on, where Hugging Face's best leads by "
              f"{gaps[at]:.4f}")
        if dtype == "float32" or gaps[at] > NEAR_TIE:
            wrong.append(f"tales {dtype}: the greedy tokens of {text!r} differ from token {at} on")
    print(f"tales {dtype}: {equal} of {len(TEXTS)} greedy continuations of {NEW_TOKENS} tokens are equal")
    del model
    release()
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="a small model instead of the 8B shape")
    parser.add_argument("--directory", type=Path, default=Path("/tmp/cutp-hf-parity"),
                        help="where the checkpoint is kept (3.9 GB); it is used again if it is there")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    seconds: dict[str, float] = {}
    config = LLAMA_8B | (TINY if args.tiny else {})
    directory = args.directory / ("tiny" if args.tiny else "llama-3.1-8b-4-layers")
    began = time.perf_counter()
    if not (directory / "model.safetensors").exists():
        write_checkpoint(directory, config, args.device)
    seconds["checkpoint"] = time.perf_counter() - began
    rng = np.random.default_rng(0)
    lengths = (40, 129) if args.tiny else (64, 257, 1000, 2048)
    texts = [rng.integers(0, config["vocab_size"], length).tolist() for length in lengths]
    wrong = compare_logprobs(directory, args.device, texts, seconds)
    began = time.perf_counter()
    for dtype in ("float32", "bfloat16"):
        wrong += compare_greedy(args.device, dtype)
    seconds["tales"] = time.perf_counter() - began
    print("seconds: " + ", ".join(f"{name} {value:.1f}" for name, value in seconds.items()))
    for line in wrong:
        print(f"FAIL: {line}")
    print("FAIL" if wrong else "OK")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
