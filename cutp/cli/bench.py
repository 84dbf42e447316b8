"""`cutp bench`: how fast a model, or a model's shape with made-up weights, runs here."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from cutp.cli.options import MODEL_HELP, add_engine_options, open_llm, positive_int

HELP = """prefill and decode speed of a model, against what this GPU reads and computes in the same run

Every case runs once to warm up and then several times; figures are medians. Decoding counts whole steps of the engine,
the host's part included."""
EXAMPLE = "example: mpirun -n 1 cutp bench --prompt-len 64 --gen-len 8 --batch 1,4 --repeats 1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help=f"{MODEL_HELP} (default: the bundled tales model)")
    parser.add_argument("--shape", metavar="NAME", help="instead of MODEL: this model's shape with random weights "
                        "(llama-3.1-8b, llama-3.1-70b, qwen3-8b, ...; a wrong name lists them)")
    parser.add_argument("--layers", type=positive_int, metavar="N", help="with --shape: only its first N layers")
    parser.add_argument("--random-weights", action="store_true", help="read only MODEL's config.json")
    parser.add_argument("--prompt-len", type=_numbers, default=[1024], metavar="N,...", help="prompt tokens (1024)")
    parser.add_argument("--gen-len", type=positive_int, default=64, metavar="N", help="tokens to generate (64)")
    parser.add_argument("--batch", type=_numbers, default=[1], metavar="N,...", help="requests at once (1)")
    parser.add_argument("--repeats", type=positive_int, default=5, metavar="N", help="runs that count (5)")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--plot", metavar="FILE", help="draw tokens a second by batch size (needs matplotlib)")
    add_engine_options(parser)


def run(args: argparse.Namespace) -> None:
    begin = time.time()
    import cutp.bench.model as bench
    from cutp.bench.report import host_line, plot, start_up
    from cutp.bench.shapes import shape_directory
    from cutp.comm import world
    from cutp.errors import ConfigError
    from cutp.kv_cache.params import PAGE_SIZE

    if args.shape is not None and args.model is not None:
        raise ConfigError("a MODEL and a --shape were given", hint="give one of them")
    if args.layers is not None and args.shape is None:
        raise ConfigError("--layers belongs to --shape")
    with world() as comm, shape_directory(args.shape, args.layers) as directory:
        if directory is not None:
            args.model, args.random_weights = directory, True
        # The first prompts of a large batch generate while the last ones are computed.
        longest = max(args.prompt_len) + args.gen_len + 64 + max(args.batch)
        if args.max_len is None and args.shape is not None:
            args.max_len = longest
        options = {}
        if args.kv_memory is None:
            options["kv_tokens"] = max(args.batch) * (longest + 2 * PAGE_SIZE)
        with open_llm(args, comm, random_weights=args.random_weights, **options) as llm:
            phases = start_up(llm, begin)
            limits = bench.limits(llm)
            cases = []
            for prompt_len in args.prompt_len:
                for batch in args.batch:
                    case = bench.measure(llm, prompt_len, args.gen_len, batch, args.repeats)
                    if limits:
                        case["decode_percent_of_read"] = 100 * case["decode_gbps"] / limits["read_gbps"]
                        case["prefill_percent_of_matmul"] = 100 * case["prefill_tflops"] / limits["matmul_tflops"]
                    cases.append(case)
                    if llm.is_root and not args.json:
                        if len(cases) == 1:
                            print(host_line(llm, args.shape or str(llm.path), phases, limits), flush=True)
                        print(_line(case), flush=True)
            if llm.is_root:
                if args.json:
                    print(json.dumps({"model": args.shape or str(llm.path), "phases": phases, "limits": limits,
                                      "cases": cases}))
                if args.plot:
                    plot(cases, args.plot)


def _line(case: dict[str, Any]) -> str:
    def percent(key: str) -> str:
        return f" ({case[key]:.1f} %)" if key in case else ""

    return (f"batch {case['batch']:<4d} prompt {case['prompt_len']:<6d} "
            f"prefill {case['prefill_ms']:9.2f} ms {case['prefill_tflops']:6.1f} TFLOP/s"
            f"{percent('prefill_percent_of_matmul')}  decode {case['decode_ms']:7.3f} ms "
            f"{case['decode_tokens_per_s']:8.1f} tok/s {case['decode_gbps']:7.1f} GB/s"
            f"{percent('decode_percent_of_read')}")


def _numbers(text: str) -> list[int]:
    return [positive_int(part) for part in text.split(",")]
