"""The layout of a model golden file (llama.npz, ...): written by the make_*_golden.py scripts, read by tests.

Needs NumPy only.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True, eq=False)
class PromptGolden:
    """Expected float32 results for one prompt of T tokens, computed alone (batch size 1).

    Fields:
        prompt: int32 [T].
        logprobs: float32 [T - 1], log-probability of token t + 1 given tokens 0 .. t.
        next_logprobs: float32 [vocab], the whole distribution after the last prompt token.
        greedy: int32 [40], greedy continuation; an end-of-sequence token does not stop it.
        min_gap: the smallest lead, in logits, of a greedy token over the second best.

    With a rotary embedding that depends on the length, `logprobs` and `next_logprobs` use the table for T tokens,
    `greedy` the table for T + 40 tokens from its first step on.
    """

    prompt: np.ndarray
    logprobs: np.ndarray
    next_logprobs: np.ndarray
    greedy: np.ndarray
    min_gap: float


@dataclass(frozen=True, eq=False)
class CaseGolden:
    """One checkpoint's results.

    Fields:
        prompts: one entry per prompt.
        bf16_mean_abs_diff: mean |bfloat16 - float32| of `logprobs` over all prompts when HF itself runs the same
            checkpoint in bfloat16; the yardstick for other bfloat16 implementations.
    """

    prompts: list[PromptGolden]
    bf16_mean_abs_diff: float


_FIELDS = {"prompt": np.int32, "logprobs": np.float32, "next_logprobs": np.float32, "greedy": np.int32}


def write_golden(path: Path, cases: dict[str, CaseGolden], versions: dict[str, str]) -> None:
    """Writes a compressed .npz: arrays named CASE.PROMPT.FIELD, and "index", a JSON text with all the rest."""
    index: dict = {"versions": versions, "cases": {}}
    arrays = {}
    for name, case in cases.items():
        gaps = [p.min_gap for p in case.prompts]
        index["cases"][name] = {"bf16_mean_abs_diff": case.bf16_mean_abs_diff, "min_gaps": gaps}
        for i, prompt in enumerate(case.prompts):
            for field, dtype in _FIELDS.items():
                arrays[f"{name}.{i}.{field}"] = np.asarray(getattr(prompt, field), dtype)
    np.savez_compressed(path, index=json.dumps(index), **arrays)


def read_golden(path: Path) -> dict[str, CaseGolden]:
    """Case name -> results."""
    with np.load(path) as file:
        cases = {}
        for name, entry in json.loads(str(file["index"]))["cases"].items():
            prompts = [
                PromptGolden(**{field: file[f"{name}.{i}.{field}"] for field in _FIELDS}, min_gap=gap)
                for i, gap in enumerate(entry["min_gaps"])
            ]
            cases[name] = CaseGolden(prompts, entry["bf16_mean_abs_diff"])
        return cases
