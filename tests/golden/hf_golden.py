"""Expected results of a checkpoint directory, computed with Hugging Face transformers on the CPU.

Works for any decoder that AutoModelForCausalLM loads; the make_*_golden.py scripts supply checkpoints and prompts.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import transformers
from golden_file import CaseGolden, PromptGolden
from transformers import AutoModelForCausalLM, GenerationConfig

transformers.logging.disable_progress_bar()

NEW_TOKENS = 40
MIN_GAP = 1e-3  # a smaller lead could turn on the order of a float32 sum


class TooClose(Exception):
    """A greedy choice that the order of a float32 sum could turn; another seed or prompt is needed."""


def versions() -> dict[str, str]:
    return {"transformers": transformers.__version__, "torch": torch.__version__, "numpy": np.__version__}


def load(directory: Path, dtype: torch.dtype = torch.float32):
    """The model as HF reads it from disk. Always a fresh one, since rotary embeddings may keep state of a call."""
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation="eager", experts_implementation="eager", output_loading_info=True
    )
    wrong = {key: value for key, value in info.items() if value}
    if wrong:
        raise SystemExit(f"{directory}: the checkpoint does not fit the model: {wrong}")
    return model.eval()


def _logits(model, tokens: list[int]) -> torch.Tensor:
    """float32 [T, vocab]."""
    with torch.no_grad():
        return model(torch.tensor([tokens]), use_cache=False).logits[0].float()


def _logprobs(logits: torch.Tensor, tokens: list[int]) -> np.ndarray:
    every = torch.log_softmax(logits[:-1], -1)
    return every[torch.arange(len(tokens) - 1), torch.tensor(tokens[1:], dtype=torch.long)].numpy()


def _depends_on_length(model) -> bool:
    """Whether a rotary table of the model changes with the length of the sequence."""
    kinds = getattr(getattr(model.model, "rotary_emb", None), "rope_type", "default")
    return any(kind in ("dynamic", "longrope") for kind in (kinds.values() if isinstance(kinds, dict) else [kinds]))


def _fix_rotary_table(model, length: int) -> None:
    """Lets HF itself compute the frequencies for a sequence of `length`, then stops it from changing them again."""
    rotary = model.model.rotary_emb
    by_layer_type = [(kind,) for kind in rotary.rope_type] if isinstance(rotary.rope_type, dict) else [()]
    for layer_type in by_layer_type:
        rotary(torch.zeros(1), torch.arange(length)[None], *layer_type)
    # The value by which HF's wrapper decides whether to recompute.
    rotary.rope_type = {kind: "default" for (kind,) in by_layer_type} if by_layer_type != [()] else "default"


def _greedy(directory: Path, prompt: list[int]) -> tuple[list[int], float]:
    """Greedy tokens by a full forward pass each, and the smallest lead of the chosen token."""
    model = load(directory)
    depends_on_length = _depends_on_length(model)
    if depends_on_length:
        _fix_rotary_table(model, len(prompt) + NEW_TOKENS)
    tokens, gaps = list(prompt), []
    for _ in range(NEW_TOKENS):
        best = _logits(model, tokens)[-1].topk(2)
        gaps.append(float(best.values[0] - best.values[1]))
        tokens.append(int(best.indices[0]))
    if not depends_on_length:
        # With a table that never changes, HF's own cached generation must take the same road.
        model.generation_config = GenerationConfig(pad_token_id=0)
        ids = torch.tensor([prompt])
        generated = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False)
        if generated[0].tolist() != tokens:
            raise SystemExit(f"{directory}: generate() disagrees with the step by step loop")
    return tokens[len(prompt) :], min(gaps)


def prompt_golden(directory: Path, prompt: list[int]) -> PromptGolden:
    logits = _logits(load(directory), prompt)
    greedy, gap = _greedy(directory, prompt)
    return PromptGolden(
        prompt=np.array(prompt),
        logprobs=_logprobs(logits, prompt),
        next_logprobs=torch.log_softmax(logits[-1], -1).numpy(),
        greedy=np.array(greedy),
        min_gap=gap,
    )


def case_golden(name: str, directory: Path, prompts: list[list[int]]) -> CaseGolden:
    """All results of one checkpoint. Raises TooClose when the lead of a greedy token is too small."""
    results = [prompt_golden(directory, prompt) for prompt in prompts]
    differences = [
        np.abs(_logprobs(_logits(load(directory, torch.bfloat16), prompt), prompt) - result.logprobs)
        for prompt, result in zip(prompts, results, strict=True)
    ]
    case = CaseGolden(results, float(np.concatenate(differences).mean()))
    print(
        f"{name:24} gaps {' '.join(f'{r.min_gap:.4f}' for r in results)}  "
        f"distinct greedy tokens {' '.join(str(len(set(r.greedy.tolist()))) for r in results)}  "
        f"mean logprob {np.concatenate([r.logprobs for r in results]).mean():.2f}  "
        f"best {max(float(np.exp(r.next_logprobs.max())) for r in results):.2f}  "
        f"bf16 {case.bf16_mean_abs_diff:.4f}",
        flush=True,
    )
    if min(r.min_gap for r in results) <= MIN_GAP:
        raise TooClose(f"{name}: a greedy token leads by {MIN_GAP} or less")
    return case
