"""Writes hidden.npz: the hidden states that Hugging Face transformers gives of tiny checkpoints (output_hidden_states).

    pip install torch transformers safetensors
    python tests/golden/make_hidden_golden.py

For every case and prompt an array CASE.PROMPT.states, float32 [layers + 1, T, hidden]: the embeddings as the first
layer takes them, what comes out of each layer but the last, and the normed result of the last.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from hf_golden import load, versions  # noqa: E402

from tests import tiny_llama, tiny_models  # noqa: E402

# Plain; embeddings that are multiplied, and norms after each branch; branches that are multiplied.
CASES = ("gqa", "gemma2_defaults", "granite_defaults")
MAX_TOKENS = 20


def main() -> None:
    torch.set_num_threads(1)
    arrays = {}
    for case in CASES:
        source = tiny_models if case in tiny_models.CASES else tiny_llama
        with tempfile.TemporaryDirectory() as directory:
            model = load(source.write_checkpoint(case, directory))
            for index, prompt in enumerate(source.prompts(case)[:3]):
                prompt = prompt[:MAX_TOKENS]
                with torch.no_grad():
                    states = model(torch.tensor([prompt]), use_cache=False, output_hidden_states=True).hidden_states
                arrays[f"{case}.{index}.prompt"] = np.array(prompt, np.int32)
                arrays[f"{case}.{index}.states"] = torch.stack([state[0].float() for state in states]).numpy()
    path = HERE / "hidden.npz"
    np.savez_compressed(path, index=json.dumps({"versions": versions(), "cases": CASES}), **arrays)
    print(f"{path.name}: {len(CASES)} cases, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
