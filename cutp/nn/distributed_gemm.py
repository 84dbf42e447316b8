"""Row-parallel products whose all-reduce runs under the next product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from cutp import settings
from cutp.array.scratch import on_device, scratch
from cutp.comm.device_group import DeviceGroup, PendingSum

# Chunks of fewer rows lose more in the product than the overlap gains; more chunks than this gain nothing. A GPU reads
# the whole weight for every chunk, which fewer rows do not pay for.
_MIN_CHUNK_ROWS, _MIN_DEVICE_CHUNK_ROWS = 32, 512
_MAX_CHUNKS = 4


@dataclass(frozen=True)
class DistributedGemmConfig:
    """enable_matmul_allreduce: split row-parallel products into chunks of rows and overlap their all-reduces."""

    enable_matmul_allreduce: bool = False

    @staticmethod
    def generate() -> DistributedGemmConfig:
        """The configuration that `CUTP_MATMUL_ALLREDUCE` asks for: 1 on, 0 or unset off."""
        return DistributedGemmConfig(settings.matmul_allreduce())


def matmul_allreduce(layers: Sequence[Callable[[np.ndarray], np.ndarray]], xs: Sequence[np.ndarray],
                     group: DeviceGroup) -> list[np.ndarray]:
    """The sum over the group of layer_i(x_i), [T, out] on every local device.

    layers: one row-parallel layer a local device; xs: its inputs [T, in_local]. The rows are split into chunks; chunk
    i's sum is under way while chunk i + 1 is computed. Equal to the plain sum up to the rounding of products of another
    number of rows.
    """
    rows = xs[0].shape[0]
    least = _MIN_DEVICE_CHUNK_ROWS if on_device(xs[0]) else _MIN_CHUNK_ROWS
    count = max(1, min(_MAX_CHUNKS, rows // least))
    if count == 1:
        return group.all_reduce([layer(x) for layer, x in zip(layers, xs, strict=True)])
    bounds = [rows * i // count for i in range(count + 1)]
    pending: list[PendingSum] = []
    total = None
    for start, stop in pairwise(bounds):
        ys = [layer(x[start:stop]) for layer, x in zip(layers, xs, strict=True)]
        if total is None:
            empty = scratch().empty if on_device(ys[0]) else np.empty
            total = empty((rows, *ys[0].shape[1:]), ys[0].dtype)
        pending.append(group.all_reduce_async(ys, out=total[start:stop]))
    for one in pending:
        one.wait()
    return [total] * len(xs)
