"""Device groups over device arrays: sums under the next product, and what one process cannot do."""

import numpy as np
import pytest

from cutp.array.device import DeviceRef
from cutp.array.scratch import Scratch, scratch
from cutp.comm.device_group import DeviceGroup
from cutp.errors import ConfigError
from cutp.nn.distributed_gemm import matmul_allreduce
from tests.comm.test_nccl_collectives import Memory, check, cupy, run  # noqa: F401  (fixtures)


@pytest.mark.parametrize("rows", [1, 1023, 1024, 1700, 4100])
def test_products_overlap_with_sums(cupy, run, rows):  # noqa: F811
    def body(comm, gpu):
        group = DeviceGroup([DeviceRef.GPU(r) for r in range(comm.size)], comm)
        rng = np.random.default_rng(1)
        xs = [rng.standard_normal((rows, 3)).astype(np.float32) for _ in range(comm.size)]
        seen = []

        def layer(x):
            y = scratch().empty(x.shape, np.float32)
            y[...] = x
            seen.append(len(x))
            return y

        x = cupy.upload(xs[comm.rank])
        with Scratch(Memory(cupy)).use():
            (total,) = matmul_allreduce([layer], [x], group)
            check(cupy, total, xs[0] + xs[1], f"{rows} rows")
        assert sum(seen) == rows and len(seen) == max(1, min(4, rows // 512))

    run(2, body)


def test_gathering_and_summing(cupy, run):  # noqa: F811
    def body(comm, gpu):
        group = DeviceGroup([DeviceRef.GPU(r) for r in range(2)], comm)
        parts = [np.full((2, 3 - r), r, np.float32) for r in range(2)]
        (got,) = group.all_gather([cupy.upload(parts[comm.rank])])
        check(cupy, got, np.concatenate(parts, 1), "unequal by one")
        (got,) = group.all_reduce([cupy.upload(np.ones(3))])
        check(cupy, got, np.full(3, 2.0), "sum")

    run(2, body)


def test_one_shard_is_the_result(cupy, run):  # noqa: F811
    def body(comm, gpu):
        for group in (DeviceGroup([DeviceRef.GPU()], comm), DeviceGroup([DeviceRef.GPU()])):
            x = cupy.upload(np.ones((2, 2)))
            assert group.all_gather([x])[0] is x and group.all_reduce([x])[0] is x

    run(1, body)


def test_several_shards_in_one_process_need_a_communicator(cupy, run):  # noqa: F811
    def body(comm, gpu):
        group = DeviceGroup([DeviceRef.GPU(0), DeviceRef.GPU(1)])
        xs = [cupy.upload(np.ones(2)), cupy.upload(np.ones(2))]
        for call in (group.all_reduce, group.all_gather, group.all_reduce_async):
            with pytest.raises(ConfigError, match="one GPU, but this device group has 2 shards.*mpirun"):
                call(xs)

    run(1, body)
