"""Writes sampling.npz: what Hugging Face transformers' logits processors do to logits.

    pip install torch transformers
    python tests/golden/make_sampling_golden.py

Contents of the file, for N cases of one row each:
    cases      JSON: [{"prompt", "output", "ends", "params"}], params as of SamplingParams, bad_words as token ids
    versions   JSON: {"transformers", "torch"}
    logits     float32 [N, V], as a model would give them
    changed    float32 [N, V], after sequence bias, repetition penalty, bad words and min-new-tokens
    kept       bool [N, V], the tokens that temperature, top-k, top-p and min-p leave
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

VOCAB = 48
CASES = 80


def random_case(rng: np.random.Generator) -> dict:
    """A case with each parameter in use at odds of about one half; token ids are low, so that bad words come up."""
    def maybe(make):
        return make() if rng.random() < 0.5 else None

    params = {
        "temperature": float(rng.choice([0.4, 0.8, 1.0, 1.7])),
        "top_k": maybe(lambda: int(rng.choice([1, 3, 12, 40]))),
        "top_p": maybe(lambda: float(rng.choice([0.2, 0.7, 0.95]))),
        "min_p": maybe(lambda: float(rng.choice([0.01, 0.1, 0.4]))),
        "repetition_penalty": maybe(lambda: float(rng.choice([0.8, 1.1, 1.7]))),
        "min_tokens": maybe(lambda: int(rng.integers(1, 8))),
        "logit_bias": maybe(lambda: {int(t): float(rng.normal() * 4) for t in rng.choice(VOCAB, 4, replace=False)}),
        "bad_words": maybe(lambda: [rng.integers(0, 5, rng.integers(1, 4)).tolist() for _ in range(8)]),
    }
    return {"prompt": rng.integers(0, 6, rng.integers(4, 9)).tolist(),
            "output": rng.integers(0, 6, rng.integers(0, 7)).tolist(),
            "ends": sorted({int(t) for t in rng.integers(6, VOCAB, 2)}),
            "params": {name: value for name, value in params.items() if value is not None}}


def processors(case: dict) -> tuple[LogitsProcessorList, LogitsProcessorList]:
    """Those that change logits, in the order of `generate`; and those that choose."""
    params, change, choose = case["params"], LogitsProcessorList(), LogitsProcessorList()
    if "logit_bias" in params:
        change.append(SequenceBiasLogitsProcessor([[[t], bias] for t, bias in params["logit_bias"].items()]))
    if "repetition_penalty" in params:
        change.append(RepetitionPenaltyLogitsProcessor(params["repetition_penalty"]))
    if "bad_words" in params:
        change.append(NoBadWordsLogitsProcessor(params["bad_words"]))
    if "min_tokens" in params:
        change.append(MinNewTokensLengthLogitsProcessor(len(case["prompt"]), params["min_tokens"], case["ends"]))
    choose.append(TemperatureLogitsWarper(params["temperature"]))
    for name, kind in (("top_k", TopKLogitsWarper), ("top_p", TopPLogitsWarper), ("min_p", MinPLogitsWarper)):
        if name in params:
            choose.append(kind(params[name]))
    return change, choose


def main() -> None:
    rng = np.random.default_rng(0)
    cases = [random_case(rng) for _ in range(CASES)]
    logits = (rng.standard_normal((CASES, VOCAB)) * 2).astype(np.float32)
    changed, kept = np.empty_like(logits), np.empty(logits.shape, bool)
    for i, case in enumerate(cases):
        change, choose = processors(case)
        ids = torch.tensor([case["prompt"] + case["output"]])
        scores = change(ids, torch.tensor(logits[i : i + 1]).clone())
        changed[i] = scores[0].numpy()
        kept[i] = torch.isfinite(choose(ids, scores.clone())[0]).numpy()
    np.savez_compressed(
        Path(__file__).with_name("sampling.npz"), logits=logits, changed=changed, kept=kept, cases=json.dumps(cases),
        versions=json.dumps({"transformers": transformers.__version__, "torch": torch.__version__}))


if __name__ == "__main__":
    main()
