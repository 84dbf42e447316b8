"""`cutp info`: what a model is and what it needs. Neither MPI nor a GPU is touched."""

from __future__ import annotations

import argparse
import json
from typing import Any

from cutp.cli.options import MODEL_HELP, positive_int

HELP = "architecture, parameters and memory of a model; needs no MPI and no GPU"
EXAMPLE = "example: cutp info --tp 4"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help=f"{MODEL_HELP} (default: the bundled tales model)")
    parser.add_argument("--tp", type=positive_int, default=1, metavar="N", help="tensor-parallel size (default: 1)")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(args: argparse.Namespace) -> None:
    from cutp.comm.launch import launcher_rank
    from cutp.models.describe import describe_model

    facts = describe_model(args.model, args.tp)
    if launcher_rank() not in (None, 0):
        return
    if args.json:
        print(json.dumps(facts))
        return
    shown = {
        "model": facts["path"],
        "architecture": facts["architecture"],
        "parameters": f"{facts['parameters']:,}",
        "dtype": facts["dtype"],
        "layers": facts["layers"],
        "hidden size": facts["hidden_size"],
        "heads": _heads(facts),
        "vocabulary": facts["vocab_size"],
        "context": f"{facts['context_length']} tokens",
        "rotary": facts["rope_type"],
        f"weights a rank (tp={args.tp})": _bytes(facts["weight_bytes_per_rank"]),
        f"KV cache a token and rank (tp={args.tp})": _bytes(facts["kv_bytes_per_token_per_rank"]),
        "valid tp": f"1 to {facts['valid_tp'][-1]}",
    }
    width = max(len(name) for name in shown)
    for name, value in shown.items():
        print(f"{name:<{width}}  {value}")


def _heads(facts: dict[str, Any]) -> str:
    if facts["latent_dim"] is not None:
        return f"{facts['attention_heads']}, which share a cached latent of {facts['latent_dim']} values a token"
    return f"{facts['attention_heads']} query, {facts['key_value_heads']} key-value, {facts['head_dim']} wide"


def _bytes(per_rank: list[int]) -> str:
    low, high = min(per_rank), max(per_rank)
    return f"{high:,} bytes" if low == high else f"{low:,} to {high:,} bytes"
