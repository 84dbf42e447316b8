"""Batches of logits for kernels of sampling, penalties.cu and logprobs.cu, whole or on the shards of several ranks."""

import numpy as np

from cutp.comm.threads import run_threads

f32 = np.float32


def random_logits(seed, n, v):
    """[n, v], float32: rows of quite different spread, with ties and -inf; the last column is 0."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, v)) * rng.choice([0.3, 2, 6], (n, 1)) + rng.choice([-50, 0, 50], (n, 1))
    tied = rng.random(n) < 0.4
    x[tied] = np.round(x[tied] * 2) / 2
    x[rng.random((n, v)) < 0.02] = -np.inf
    x[:, -1] = 0
    return x.astype(f32)


def gather_over(comm, device):
    """The `gather` that kernels' callers take: every rank's array along a new first axis. No comm: one rank."""

    def gather(array):
        if comm is None:
            return array[None]
        return device.array(comm.all_gather(device.numpy(array)[None], axis=0))

    return gather


def on_shards(fn, x, borders):
    """fn(shard, start, comm) on every rank."""

    def body(comm):
        lo, hi = borders[comm.rank], borders[comm.rank + 1]
        return fn(np.ascontiguousarray(x[:, lo:hi]), int(lo), comm)

    return run_threads(len(borders) - 1, body, timeout=100)
