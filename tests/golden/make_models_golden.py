"""Writes FAMILY.npz: what Hugging Face transformers computes for the checkpoints of tests/tiny_models.

    pip install torch transformers safetensors accelerate    # accelerate: for the MXFP4 cases
    python tests/golden/make_models_golden.py FAMILY...          # one file a family is written
    python tests/golden/make_models_golden.py CASE...            # only computed and printed

When a greedy token has no clear lead, the next seeds are tried, the first good one is named, and the family's file is
not written. See golden_file.py for the layout.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from golden_file import CaseGolden, write_golden  # noqa: E402
from hf_golden import TooClose, case_golden, versions  # noqa: E402

from tests import tiny_models  # noqa: E402

SEEDS_TO_TRY = 20


def compute(case: str, seed: int) -> CaseGolden:
    with tempfile.TemporaryDirectory() as directory:
        path = tiny_models.write_checkpoint(case, directory, seed)
        return case_golden(case, path, tiny_models.prompts(case))


def compute_or_advise(case: str) -> CaseGolden | str:
    """The results of a case, or a sentence that names a better seed."""
    first = tiny_models.case(case).seed
    try:
        return compute(case, first)
    except TooClose as error:
        why = str(error)
    for seed in range(first + 1, first + SEEDS_TO_TRY):
        try:
            compute(case, seed)
            return f"{why} with seed {first}; seed {seed} is good"
        except TooClose:
            continue
    return f"{why} with seeds {first} to {seed}"


def main() -> None:
    torch.set_num_threads(1)
    advice = []
    for name in sys.argv[1:]:
        if name in tiny_models.CASES:
            done = compute_or_advise(name)
            advice += [done] if isinstance(done, str) else []
        elif name in tiny_models.FAMILIES:
            done = {case: compute_or_advise(case) for case in tiny_models.FAMILIES[name].cases}
            bad = [text for text in done.values() if isinstance(text, str)]
            advice += bad
            if not bad:
                path = HERE / f"{name}.npz"
                write_golden(path, done, versions())
                print(f"{path.name}: {len(done)} cases, {path.stat().st_size} bytes")
        else:
            advice.append(f"{name} is neither a family ({', '.join(tiny_models.FAMILIES)}) nor a case")
    if advice:
        raise SystemExit("\n".join(advice))


if __name__ == "__main__":
    main()
