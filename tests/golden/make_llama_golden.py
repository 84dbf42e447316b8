"""Writes llama.npz: what Hugging Face transformers computes for tests/tiny_llama.py and for the bundled model.

    pip install torch transformers safetensors
    python tests/golden/make_llama_golden.py [CASE ...]

With case names, only those are computed and nothing is written (to try seeds). See golden_file.py for the layout.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import tiny_llama  # noqa: E402
from golden_file import write_golden  # noqa: E402
from hf_golden import case_golden, versions  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

BUNDLED = HERE.parents[1] / "cutp" / "bundled" / "tales"
BUNDLED_CASE = "bundled_tales"
TEXTS = ["Once upon a time", "The little dog", "Tom and his sister went to the park because", "It was raining, so"]


def main() -> None:
    torch.set_num_threads(1)
    only = sys.argv[1:]
    cases = {}
    for name in only or [*tiny_llama.CASES, BUNDLED_CASE]:
        if name == BUNDLED_CASE:
            tokenizer = Tokenizer.from_file(str(BUNDLED / "tokenizer.json"))
            cases[name] = case_golden(name, BUNDLED, [tokenizer.encode(text).ids for text in TEXTS])
            continue
        with tempfile.TemporaryDirectory() as directory:
            path = tiny_llama.write_checkpoint(name, directory)
            cases[name] = case_golden(name, path, tiny_llama.prompts(name))
    if not only:
        path = HERE / "llama.npz"
        write_golden(path, cases, versions())
        print(f"{path.name}: {len(cases)} cases, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
