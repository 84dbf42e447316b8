"""The emulation of hopper.cuh: that each kind of misuse is reported, with what and where."""

import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from cutp.array.tensor_map import TensorMap
from tests.emulation.emulator import EmulatedKernel, EmulationError, needs_compiler

pytestmark = needs_compiler
HERE = Path(__file__).resolve().parent
SEEDS = range(6)
SHARED_BYTES = 1024 + 64 * 128 + 1024
bfloat16 = np.dtype(ml_dtypes.bfloat16)


def run(name, args=(), block=128, **options):
    EmulatedKernel(HERE / "faults_hopper.cu", name).launch(1, block, args, SHARED_BYTES, **options)


def assert_fails(message, name, args=(), seeds=SEEDS, **options):
    for seed in seeds:
        with pytest.raises(EmulationError, match=re.escape(message)):
            run(name, args, order_seed=seed, **options)


def rows(count=8):
    return np.arange(1, count * 64 + 1, dtype=np.float32).reshape(count, 64).astype(bfloat16)


def boxes(weight=False):
    return TensorMap(rows(), (8, 64), weight=weight)


def sums():
    return np.zeros((128, 4), np.float32)


# ---- barriers


@pytest.mark.parametrize(("name", "message"), [
    ("no_barrier_there", "barrier_wait at byte 8 of dynamic shared memory, where there is no barrier"),
    ("barrier_without_fence", "the barrier at byte 0 of dynamic shared memory has not seen barrier_init_fence"),
    ("barrier_with_fence_of_another", "has not seen barrier_init_fence"),
    ("overwritten_barrier", "the barrier at byte 0 of dynamic shared memory has been overwritten"),
    ("barrier_made_twice", "thread (0, 0, 0): barrier_init at byte 0 of dynamic shared memory, where there is a "
                           "barrier already"),
    ("barrier_for_nobody", "barrier_init for 0 arrivals"),
    ("barrier_between_words", "barrier_init at shared address 1028, which is not 8-byte aligned"),
    ("arrival_too_many", "barrier_arrive: the barrier at byte 0 of dynamic shared memory has had all of its 2 arrivals "
                         "in this phase"),
    ("odd_parity", "barrier_wait for parity 2"),
])
def test_barriers(name, message):
    assert_fails(message, name)


def test_a_barrier_that_others_may_not_see_yet():
    assert_fails("barrier_wait: the barrier at byte 0 of dynamic shared memory was made by thread (0, 0, 0), with no "
                 "__syncthreads since", "barrier_without_meeting", seeds=[0])
    for seed in SEEDS:
        run("barrier_without_meeting", block=32, order_seed=seed)


def test_a_barrier_that_never_ends_its_phase():
    assert_fails("barrier_that_lacks: block (0, 0, 0), thread (32, 0, 0): waits for the barrier at byte 0 of dynamic "
                 "shared memory, whose phase 0 lacks 1 of 3 arrivals and 0 bytes; of the threads of the block, ",
                 "barrier_that_lacks", [np.int32(2), np.int32(0)])
    assert_fails("lacks 0 of 3 arrivals and 384 bytes; of the threads of the block, 127 wait at __syncthreads, 1 wait "
                 "at barrier_wait", "barrier_that_lacks", [np.int32(3), np.int32(128)], seeds=[0])
    run("barrier_that_lacks", [np.int32(3), np.int32(0)])


def test_a_phase_that_a_waiting_thread_misses():
    assert_fails("phase 1 of the barrier at byte 0 of dynamic shared memory ended before a thread that waited for "
                 "phase 0 could go on", "missed_phase", seeds=[1])


# ---- copies


def test_where_boxes_go():
    run("copy_to", [boxes(), np.int32(128)])
    assert_fails("tensor_copy to shared address 2112, which is not 128-byte aligned", "copy_to",
                 [boxes(), np.int32(64)])
    assert_fails("tensor_copy of 1024 bytes at byte 9344 of dynamic shared memory, which has 10240 bytes", "copy_to",
                 [boxes(), np.int32(9344 - 1024)])
    assert_fails("tensor_copy to byte 1024 of dynamic shared memory, where one from thread (", "copies_by_a_warp",
                 [boxes()], block=32, seeds=[0, 1, 3, 4])


@pytest.mark.parametrize("seed", SEEDS)
def test_a_box_is_not_there_before_the_wait(seed):
    before, after = np.zeros(64, np.float32), np.zeros(64, np.float32)
    run("look_before_arrival", [boxes(), before, after], block=64, order_seed=seed)
    np.testing.assert_array_equal(after, rows()[0].astype(np.float32))
    if seed % 3 != 2:  # with the random order, boxes may come early
        assert (before != after).all()


def test_bytes_that_a_barrier_expects():
    run("expects", [boxes(), np.int32(1024)])
    assert_fails("the barrier at byte 0 of dynamic shared memory received 512 bytes more than it expects", "expects",
                 [boxes(), np.int32(512)])
    assert_fails("lacks 0 of 2 arrivals and 1024 bytes", "expects", [boxes(), np.int32(2048)])
    assert_fails("the phase of the barrier at byte 0 of dynamic shared memory ends while 1024 bytes are under way that "
                 "it does not expect", "expects", [boxes(), np.int32(0)], seeds=[0, 1])


def test_ordinary_stores_where_boxes_arrive():
    assert_fails("the box that tensor_copy brings to byte 1024 of dynamic shared memory was written to meanwhile",
                 "store_under_way", [boxes()], seeds=[0, 1, 3, 4])
    assert_fails("tensor_copy to byte 1024 of dynamic shared memory, which was stored to without async_shared_fence",
                 "copy_over_stores", [boxes(), np.int32(0)])
    run("copy_over_stores", [boxes(), np.int32(1)])


def test_maps():
    assert_fails("tensor_copy with 3 coordinates, but the array of the map has 2 axes", "three_coordinates", [boxes()])
    assert_fails("tensor_copy from element 60 of a row, no multiple of 8", "from_element",
                 [boxes(), np.int32(60)])
    assert_fails("tensor_copy from element -4 of a row, no multiple of 8", "from_element", [boxes(), np.int32(-4)])
    assert_fails("tensor_map_prefetch: not a TensorMap that was passed as an argument", "not_a_parameter", [boxes()])
    for given in (rows(), np.zeros((), "V128"), None):
        with pytest.raises(EmulationError, match=f"argument 0 is a TensorMap, but {type(given).__name__} was given"):
            run("nobody_waits", [given])
    with pytest.raises(EmulationError, match="argument 0 is a pointer, but TensorMap was given"):
        run("right_product", [boxes()])


def test_boxes_of_what_the_kernel_before_wrote():
    for wait, fence, message in ((0, 1, "tensor_copy of a TensorMap that is no weight before pdl_wait"),
                                 (1, 0, "tensor_copy after pdl_wait without async_global_fence between them")):
        assert_fails(message, "copy_before_wait", [boxes(), np.int32(wait), np.int32(fence)], pdl=True)
        run("copy_before_wait", [boxes(), np.int32(wait), np.int32(fence)])
        run("copy_before_wait", [boxes(weight=True), np.int32(wait), np.int32(fence)], pdl=True)
    run("copy_before_wait", [boxes(), np.int32(1), np.int32(1)], pdl=True)


def test_a_kernel_that_ends_before_its_boxes_arrive():
    assert_fails("thread (0, 0, 0): the kernel ends while a box is on its way to byte 1024 of dynamic shared memory",
                 "nobody_waits", [boxes()], seeds=[0, 1, 3, 4])


# ---- wgmma


@pytest.mark.parametrize("seed", SEEDS)
def test_products_without_mistake(seed):
    out = sums()
    run("right_product", [out], order_seed=seed)
    assert (out == 32).all()


@pytest.mark.parametrize(("name", "message"), [
    ("product_without_fence", "wgmma without a wgmma_fence before it"),
    ("product_without_second_fence", "wgmma without wgmma_fence since its accumulators were in use"),
    ("product_on_other_registers", "wgmma on accumulators that have not passed through keep_registers"),
    ("product_on_changed_registers", "wgmma on accumulators that were written to after keep_registers"),
    ("scaled_before_wait", "accumulator 0 was written to while wgmma worked on it"),
    ("different_products", "wgmma_wait: thread (0, 0, 0) and thread (64, 0, 0) of one warpgroup have not started the "
                           "same products"),
    ("fewer_products", "wgmma_wait: thread (0, 0, 0) and thread (96, 0, 0) of one warpgroup have not started the same"),
    ("other_shape", "wgmma on 8 accumulators of which 4 are in use"),
    ("operand_without_fence", "wgmma: B includes byte 9216 of dynamic shared memory, which was stored to without "
                              "async_shared_fence"),
])
def test_products(name, message):
    assert_fails(message, name, [sums()])


@pytest.mark.parametrize("name", ["result_before_wait", "result_of_an_unfinished_group", "result_without_commit"])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_result_is_not_there_before_the_wait(name, seed):
    out = sums()
    run(name, [out], order_seed=seed)
    assert np.isnan(out).all() if seed % 2 == 0 else (out > 1e37).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_operands_are_read_late(seed):
    out = sums()
    run("operand_changed_too_early", [out], order_seed=seed)
    assert (out != 32).all()


@pytest.mark.parametrize("seed", [0, 1, 3, 4])
def test_operands_that_have_not_arrived(seed):
    out = sums()
    run("operand_under_way", [boxes(), out], order_seed=seed)
    assert np.isnan(out).all() if seed % 2 == 0 else (out > 1e37).all()


def test_threads_that_do_not_go_together():
    assert_fails("leaves the kernel without waiting for its wgmma products", "leaves_before_wait")
    assert_fails("leaves the kernel with wgmma results that have not passed through keep_registers", "leaves_results")
    assert_fails("of the same warpgroup waits at wgmma_wait (", "different_waits", [sums()])
    assert_fails("waits at wgmma_wait for 32 other threads of its warpgroup; of the threads of the block, ",
                 "some_do_not_wait", [sums()])
    assert_fails("wgmma by a warpgroup of 96 threads", "right_product", [sums()], block=96)


@pytest.mark.parametrize(("byte", "panel", "group", "transposed", "bits", "message"), [
    (128, 16, 1024, 0, 0, "wgmma: B begins at byte 1152 of dynamic shared memory, in the middle of a group of 8 rows"),
    (112, 16, 1024, 0, 0, "wgmma: B begins at byte 112 of rows of 128 bytes"),
    (32, 16, 1024, 1, 0, "wgmma: B begins at byte 32 of rows of 128 bytes"),
    (0, 16, 512, 0, 0, "wgmma: the distances of B are no multiples of 1024 bytes"),
    (0, 128, 1024, 1, 0, "wgmma: the distances of B are no multiples of 1024 bytes"),
    (0, 16, 1024, 0, 1 << 62, "wgmma: the descriptor of B is not one of matrix_descriptor"),
    (0, 16, 1024, 0, 1 << 49, "wgmma: the descriptor of B is not one of matrix_descriptor"),
    (0, 16, 1024, 0, 0, "B of 16 bytes at byte 10240 of dynamic shared memory, which has 10240 bytes"),
])
def test_operands(byte, panel, group, transposed, bits, message):
    args = [np.int32(byte), np.int32(panel), np.int32(group), np.int32(transposed), np.uint64(bits)]
    assert_fails(message, "operand_at", args)
    assert_fails("matrix_descriptor of byte 0 of static shared memory", "static_operand")


# ---- budgets and named barriers


def test_register_budgets():
    run("budgets", [np.int32(0)], block=384)
    assert_fails("the register budgets of its warpgroups are 520 in all, but the kernel begins with 168 for each of 3",
                 "budgets", [np.int32(1)], block=384)
    assert_fails("waits at registers_decrease for 32 other threads of its warpgroup", "budget_of_three_warps")
    assert_fails("of the same warpgroup waits at registers_", "budgets_of_one_warpgroup")


@pytest.mark.parametrize(("args", "message"), [
    ((0, 64, 64, 1), "there is no barrier 0, only 1 to 15"),
    ((16, 64, 64, 1), "there is no barrier 16, only 1 to 15"),
    ((1, 48, 64, 1), "barrier 1 for 48 threads, in a block of 64"),
    ((1, 64, 32, 1), "barrier 1 for "),
    ((1, 64, 64, 0), "waits at named_barrier_sync for barrier 1, to which 32 of 64 threads have come"),
])
def test_named_barriers(args, message):
    assert_fails(message, "named_barriers", [*map(np.uint32, args[:3]), np.int32(args[3])], block=64)


def test_a_thread_that_comes_twice_to_a_named_barrier():
    args = [np.uint32(3), np.uint32(64), np.uint32(64), np.int32(2)]
    assert_fails("named_barrier_arrive: the thread comes to barrier 3 a second time before the others have come",
                 "named_barriers", args, block=64, seeds=[1])
    args[3] = np.int32(1)
    for seed in SEEDS:
        run("named_barriers", args, block=64, order_seed=seed)
