"""How much memory scoring one long text takes beyond the loaded model.

    python tests/cli/scoring_memory.py --tokens 100000 --vocab 128256

Makes a checkpoint (2 layers, width 64), scores random tokens through `cutp score`, and prints one JSON line: bytes of
the process at its largest once a short text was scored, by how much the long one then raised that, and the seconds it
took. Needs Linux.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from cutp.cli.main import main as cutp  # noqa: E402
from tests.tiny_models.checkpoint import attention_shapes, decoder_shapes, mlp_shapes, save  # noqa: E402


def write_model(directory: Path, vocab: int, context: int) -> Path:
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocab, "hidden_size": 64,
              "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
              "max_position_embeddings": context, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
              "hidden_act": "silu", "torch_dtype": "float32"}
    def layer(_):
        return {"input_layernorm.weight": (64,), "post_attention_layernorm.weight": (64,),
                **attention_shapes(config), **mlp_shapes(config)}

    rng = np.random.default_rng(0)
    shapes = decoder_shapes(config, layer)
    return save(config, {name: rng.standard_normal(shape, np.float32) / 8 for name, shape in shapes.items()}, directory)


def score(model: Path, tokens: np.ndarray) -> None:
    (model / "in.jsonl").write_text(json.dumps({"id": 1, "token_ids": tokens.tolist()}) + "\n")
    try:
        cutp(["score", str(model), str(model / "in.jsonl"), "-o", str(model / "out.jsonl")])
    except SystemExit as ended:
        if ended.code:
            raise
    [line] = (model / "out.jsonl").read_text().splitlines()
    assert len(json.loads(line)["logprobs"]) == len(tokens)


def peak_bytes() -> int:
    """The most memory this program has had. ru_maxrss will not do: it begins at that of the program that started it."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--vocab", type=int, default=128_256)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        model = write_model(Path(directory) / "model", args.vocab, args.tokens)
        tokens = np.random.default_rng(1).integers(0, args.vocab, args.tokens)
        score(model, tokens[:16])
        loaded, began = peak_bytes(), time.perf_counter()
        score(model, tokens)
        seconds = time.perf_counter() - began
    print(json.dumps({"tokens": args.tokens, "vocab": args.vocab, "loaded_bytes": loaded,
                      "added_bytes": peak_bytes() - loaded, "seconds": round(seconds, 1)}))


if __name__ == "__main__":
    main()
