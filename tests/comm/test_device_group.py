"""Groups of devices in one process, over a communicator, and planned; their two collectives."""

import ml_dtypes
import numpy as np
import pytest

from cutp.array.device import DeviceRef
from cutp.comm.communicator import Communicator
from cutp.comm.device_group import DeviceGroup
from cutp.comm.threads import run_threads
from cutp.errors import ConfigError

CPU = DeviceRef.CPU()


def test_of_a_list():
    devices = [DeviceRef.CPU(), DeviceRef.CPU(3)]
    group = DeviceGroup.of(devices)
    assert list(group) == devices and len(group) == group.size == 2 and group[1] == DeviceRef.CPU(3)
    assert group.local_ranks == (0, 1) and group.local_devices == tuple(devices) and group.comm is None
    assert DeviceGroup.of(group) is group


def test_of_a_communicator():
    def rank_main(comm):
        group = DeviceGroup.of(comm)
        assert group.comm is comm and group.local_devices == (CPU,)
        return list(group), group.local_ranks

    assert run_threads(3, rank_main) == [([CPU] * 3, (rank,)) for rank in range(3)]


def test_planned():
    group = DeviceGroup.planned(4, 2)
    assert group.size == 4 and group.local_ranks == (2,) and len(group.local_devices) == 1


def test_errors():
    with pytest.raises(ConfigError, match="at least one device"):
        DeviceGroup([])
    with pytest.raises(ConfigError, match="2 devices were given for a communicator of 1 ranks"):
        DeviceGroup([CPU, CPU], Communicator.single())
    group = DeviceGroup([CPU, CPU])
    for collective in (group.all_reduce, group.all_gather):
        with pytest.raises(ValueError, match="1 arrays were given for 2 local shards"):
            collective([np.zeros(3)])


def shards(n, dtype):
    return [np.random.default_rng(rank).standard_normal((3, 4)).astype(np.float32).astype(dtype) for rank in range(n)]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("n", (1, 2, 3, 4, 8))
def test_all_reduce(n, dtype):
    xs = shards(n, dtype)
    expected = np.zeros((3, 4), np.float32)
    for x in xs:
        expected = expected + x.astype(np.float32)
    before = [x.copy() for x in xs]
    results = DeviceGroup([CPU] * n).all_reduce(xs)
    assert len(results) == n
    for y in results:
        assert y.dtype == dtype
        np.testing.assert_array_equal(y, expected.astype(dtype))
    np.testing.assert_array_equal(xs, before)


def test_all_reduce_adds_in_rank_order():
    values = [1e8, 1.0, -1e8, 1.0]  # 1e8 + 1 is 1e8 in float32
    [y, *_] = DeviceGroup([CPU] * 4).all_reduce([np.array([v], np.float32) for v in values])
    assert y[0] == 1.0


def test_16_bit_sums_are_rounded_once():
    [y, *_] = DeviceGroup([CPU] * 3).all_reduce([np.array([v], ml_dtypes.bfloat16) for v in (256, 1, 1)])
    assert y[0] == 258


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("n", (1, 2, 3))
def test_a_communicator_gives_the_same_bits(n, dtype):
    xs = shards(n, dtype)
    alone = DeviceGroup([CPU] * n)
    [total, *_], [joined, *_] = alone.all_reduce(xs), alone.all_gather(xs)

    def rank_main(comm):
        group = DeviceGroup.of(comm)
        return group.all_reduce([xs[comm.rank]]), group.all_gather([xs[comm.rank]])

    for [summed], [gathered] in run_threads(n, rank_main, timeout=20):
        np.testing.assert_array_equal(summed, total)
        np.testing.assert_array_equal(gathered, joined)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_all_gather_of_uneven_shards(axis):
    whole = np.random.default_rng(0).standard_normal((7, 7))
    parts = np.split(whole, [3, 3, 5], axis=axis)
    results = DeviceGroup([CPU] * 4).all_gather(parts, axis=axis)
    assert len(results) == 4
    for y in results:
        np.testing.assert_array_equal(y, whole)
