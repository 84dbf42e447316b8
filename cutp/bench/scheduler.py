"""Times the scheduler's work of one step, with no model: `python -m cutp.bench.scheduler [--running 128] [--json]`.

All requests generate; a step is `schedule`, the lookup table of its requests and `advance`. This is host time that a
GPU waits for unless it is hidden behind the pass before.
"""

from __future__ import annotations

import argparse
import json
import random
from statistics import median
from time import perf_counter

from cutp.engine.request import Request
from cutp.engine.scheduler import Scheduler
from cutp.kv_cache.page_pool import PagePool
from cutp.kv_cache.params import PAGE_SIZE
from cutp.kv_cache.prefix_cache import PrefixCache

MAX_LEN = 8192
PARTS = ("schedule", "lookup_table", "advance")


def generating(running: int, prompt: int, max_len: int) -> Scheduler:
    """A scheduler whose `running` requests have computed prompts of about `prompt` tokens, no two pages equal."""
    pool = PagePool(running * -(-max_len // PAGE_SIZE), PAGE_SIZE)
    scheduler = Scheduler(pool, max_batch_tokens=8192, max_running=running, max_len=max_len,
                          prefix_cache=PrefixCache(pool, b"bench"))
    rng = random.Random(0)
    for index in range(running):
        length = prompt + rng.randrange(PAGE_SIZE)  # so that the requests reach new pages at different steps
        ids = [rng.randrange(100_000) for _ in range(length)]
        scheduler.add(Request(index, index, None, ids, max_len))
    while any(request.pending > 1 for request in (*scheduler.running, *scheduler.waiting)):
        step(scheduler)
    return scheduler


def step(scheduler: Scheduler) -> list[float]:
    """One step, and a token for every request that computed its last one; the seconds that each of PARTS took."""
    times = [perf_counter()]
    chunks = scheduler.schedule().chunks
    times.append(perf_counter())
    scheduler.tables.lookup_table([chunk.request for chunk in chunks])
    times.append(perf_counter())
    scheduler.advance(chunks)
    times.append(perf_counter())
    for chunk in chunks:
        if chunk.completes:
            chunk.request.generated.append(1)
    return [stop - start for start, stop in zip(times, times[1:], strict=False)]


def measure(running: int, prompt: int, steps: int) -> dict[str, float]:
    """Median microseconds a step of each of PARTS, and the median and the 99th percentile of their sum."""
    scheduler = generating(running, prompt, max(MAX_LEN, prompt + PAGE_SIZE + steps + 1))
    times = [step(scheduler) for _ in range(steps)]
    totals = sorted(sum(parts) * 1e6 for parts in times)
    result = {name: median(part) * 1e6 for name, part in zip(PARTS, zip(*times, strict=True), strict=True)}
    return result | {"step": median(totals), "p99": totals[len(totals) * 99 // 100]}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m cutp.bench.scheduler", description=__doc__.splitlines()[0])
    parser.add_argument("--running", type=int, nargs="+", default=[1, 8, 32, 128], help="requests that generate")
    parser.add_argument("--prompt", type=int, default=1024, help="tokens of each prompt")
    parser.add_argument("--steps", type=int, default=1000, help="steps to time")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    args = parser.parse_args()
    for running in args.running:
        result = measure(running, args.prompt, args.steps)
        if args.json:
            print(json.dumps({"running": running} | {name: round(value, 2) for name, value in result.items()}))
        else:
            parts = ", ".join(f"{name} {result[name]:.1f}" for name in PARTS)
            print(f"{running:4d} running: {result['step']:6.1f} us a step ({parts}), 99% below {result['p99']:.0f} us")


if __name__ == "__main__":
    main()
