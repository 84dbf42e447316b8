"""Throughput of the engine with many requests at once.

    mpirun -n 2 python -m cutp.bench.serving [MODEL | --shape NAME] [--requests 128] [--prompt-len 512] [--gen-len 128]
                                             [--tp N] [--json]

Random prompts of equal length, all added at once, sampled at temperature 1 without an end token. Reported: output and
total tokens a second from the first step to the last, the longest and median time of a step, and the host's time to
schedule one. A first, short run is not counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import numpy as np

from cutp.bench.shapes import shape_directory
from cutp.comm import world
from cutp.engine.llm import LLM
from cutp.engine.sampling_params import SamplingParams
from cutp.errors import ConfigError


def measure(llm: LLM, requests: int, prompt_len: int, gen_len: int, seed: int = 0) -> dict[str, float]:
    """Runs `requests` random prompts to their end; collective. See the module for what is reported."""
    rng = np.random.default_rng(seed)
    prompts = rng.integers(0, llm.model.vocab_size, (requests, prompt_len))
    params = SamplingParams(max_tokens=gen_len, temperature=1.0, ignore_eos=True, seed=seed)
    for prompt in prompts:
        llm.add_request(prompt.tolist() if llm.is_root else None, params)
    before = llm.stats()
    steps, done = [], 0
    begin = time.perf_counter()
    while llm.has_unfinished:
        start = time.perf_counter()
        done += sum(event.output is not None for event in llm.step())
        steps.append(time.perf_counter() - start)
    seconds = time.perf_counter() - begin
    after = llm.stats()
    count = after["steps"] - before["steps"]
    return {
        "requests": done, "prompt_len": prompt_len, "gen_len": gen_len, "tp": llm.tp, "replicas": llm.replicas,
        "seconds": seconds, "output_tokens_per_s": done * gen_len / seconds,
        "total_tokens_per_s": done * (gen_len + prompt_len) / seconds, "steps": len(steps),
        "median_step_ms": 1e3 * statistics.median(steps), "longest_step_ms": 1e3 * max(steps),
        "schedule_ms_per_step": 1e3 * (after["schedule_seconds"] - before["schedule_seconds"]) / max(1, count),
        "preemptions": after["preemptions"] - before["preemptions"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m cutp.bench.serving", description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", help="a model directory (default: the bundled model)")
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--prompt-len", type=int, default=512)
    parser.add_argument("--gen-len", type=int, default=128)
    parser.add_argument("--shape", help="instead of a model: this shape with random weights (see cutp bench)")
    parser.add_argument("--tp", type=int)
    parser.add_argument("--dtype")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    if min(args.requests, args.prompt_len, args.gen_len) < 1:
        raise ConfigError("--requests, --prompt-len and --gen-len must be at least 1")
    with world() as comm, shape_directory(args.shape, None) as directory:
        options = {} if directory is None else {"random_weights": True, "max_len": args.prompt_len + args.gen_len,
                                                "kv_tokens": args.requests * (args.prompt_len + args.gen_len + 128)}
        llm = LLM(directory or args.model, comm, args.tp, args.device, args.dtype, **options)
        with llm:
            measure(llm, args.requests, min(16, args.prompt_len), min(4, args.gen_len), seed=1)
            result = measure(llm, args.requests, args.prompt_len, args.gen_len)
        if comm.rank == 0:
            if args.json:
                print(json.dumps(result))
            else:
                for name, value in result.items():
                    print(f"{name:24}{value:.6g}")


if __name__ == "__main__":
    main()
