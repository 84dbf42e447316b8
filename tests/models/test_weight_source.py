"""Weights that a checkpoint stores in another form: what is read of them, and what is refused."""

import ml_dtypes
import numpy as np
import pytest

from cutp.checkpoint.checkpoint import Checkpoint
from cutp.checkpoint.mxfp4 import dequantize_mxfp4
from cutp.checkpoint.safetensors import write_safetensors
from cutp.errors import CheckpointError, MissingTensorError, ShapeMismatchError, UnsupportedModelError
from cutp.models.weight_source import StackedExpert, WholeTensor
from cutp.nn.module import Weight, cut
from cutp.nn.sharding import OwnerSegment, ShardingStrategy

EXPERTS, WIDTH, HIDDEN = 3, 48, 64
RNG = np.random.default_rng(0)


def stored(quantized):
    """(tensors on disk, {name: [experts, out, in] or [experts, out]}), rows of gate and up in turn."""
    shapes = {"gate_up_proj": (EXPERTS, 2 * WIDTH, HIDDEN), "down_proj": (EXPERTS, HIDDEN, WIDTH + 16)}
    tensors, whole = {}, {}
    for name, shape in shapes.items():
        tensors[f"{name}_bias"] = whole[f"{name}_bias"] = RNG.standard_normal(shape[:2]).astype(np.float32)
        if quantized:
            blocks = RNG.integers(0, 256, (*shape[:2], shape[2] // 32, 16), dtype=np.uint8)
            scales = RNG.integers(120, 130, blocks.shape[:3], dtype=np.uint8)
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            whole[name] = dequantize_mxfp4(blocks, scales)
        else:
            whole[name] = RNG.standard_normal(shape).astype(np.float32)
            tensors[name] = np.ascontiguousarray(whole[name].swapaxes(1, 2))
    return tensors, whole


@pytest.fixture(params=["float", "mxfp4"])
def kind(request, tmp_path):
    tensors, whole = stored(request.param == "mxfp4")
    write_safetensors(tmp_path / "model.safetensors", tensors)
    with Checkpoint(tmp_path) as checkpoint:
        yield request.param, checkpoint, whole


def weight_of(whole, name, expert):
    """The matrix with the rows of the gate first, as a weight wants it."""
    found = whole[name][expert]
    return np.concatenate([found[0::2], found[1::2]]) if name.startswith("gate_up") else found


def strategies(name, size):
    S = ShardingStrategy
    rows = {"gate_up_proj": 2 * WIDTH, "gate_up_proj_bias": 2 * WIDTH}.get(name, HIDDEN)
    yield S.replicate(size)
    yield S.segmented(size, 0, [OwnerSegment(rows, size - 1)])
    if name.startswith("gate_up"):
        yield S.gate_up(size, axis=0)
    elif name == "down_proj":
        yield S.columnwise(size)


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias"])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_every_share(kind, name, size):
    _, checkpoint, whole = kind
    for expert in range(EXPERTS):
        source = StackedExpert(name, expert, interleaved=name.startswith("gate_up"))
        expected = weight_of(whole, name, expert)
        assert all(one.startswith(name) and one in checkpoint for one in source.check(checkpoint, expected.shape))
        for strategy in strategies(name, size):
            for rank in range(size):
                weight = Weight(expected.shape, np.float32, strategy=strategy, rank=rank)
                if 0 in weight.local_shape:
                    continue  # is never read
                share = cut(expected, weight.axis, weight.ranges)
                np.testing.assert_array_equal(source.read(checkpoint, weight), share)
                rows = len(share) // 3, len(share) - len(share) // 4
                np.testing.assert_array_equal(source.read(checkpoint, weight, rows), share[slice(*rows)])


@pytest.mark.parametrize("rank, size", [(0, 1), (1, 2), (2, 3)])
def test_a_rank_reads_only_its_part(kind, rank, size):
    quantized, checkpoint, _ = kind
    bytes_per_row = HIDDEN // 2 + HIDDEN // 32 if quantized == "mxfp4" else 4 * HIDDEN
    weight = Weight((2 * WIDTH, HIDDEN), np.float32, strategy=ShardingStrategy.gate_up(size, axis=0), rank=rank)
    before = checkpoint.bytes_read
    StackedExpert("gate_up_proj", 1, interleaved=True).read(checkpoint, weight)
    read = checkpoint.bytes_read - before
    # Along inner axes short runs are picked out of a block that goes from the first to the last of them.
    if quantized == "mxfp4":
        assert read == weight.local_shape[0] * bytes_per_row
    else:
        assert read == ((HIDDEN - 1) * 2 * WIDTH + weight.local_shape[0]) * 4
    down = Weight((HIDDEN, WIDTH + 16), np.float32, strategy=ShardingStrategy.columnwise(size), rank=rank)
    before = checkpoint.bytes_read
    StackedExpert("down_proj", 1).read(checkpoint, down)
    read = checkpoint.bytes_read - before
    if quantized == "mxfp4":
        (start, stop), groups = (down.ranges or [(0, WIDTH + 16)])[0], (WIDTH + 16) // 32
        touched = -(-stop // 32) - start // 32
        assert read == ((HIDDEN - 1) * groups + touched) * 17
    else:
        assert read == down.local_shape[1] * HIDDEN * 4


@pytest.mark.parametrize("name, expert, shape, message", [
    ("gate_up_proj", 0, (2 * WIDTH + 2, HIDDEN), "gate_up_proj.*describes"),
    ("gate_up_proj", 0, (2 * WIDTH, HIDDEN + 32), "gate_up_proj.*describes"),
    ("down_proj", 0, (HIDDEN + 1, WIDTH + 16), "down_proj.*describes"),
    ("down_proj", EXPERTS, (HIDDEN, WIDTH + 16), "down_proj.*describes \\[4"),
    ("down_proj_bias", 0, (HIDDEN - 1,), "down_proj_bias.*describes \\[3, 63\\]"),
])
def test_other_shapes(kind, name, expert, shape, message):
    with pytest.raises(ShapeMismatchError, match=message):
        StackedExpert(name, expert).check(kind[1], shape)


def test_missing(kind):
    with pytest.raises(MissingTensorError, match="up_proj"):
        StackedExpert("up_proj", 0).check(kind[1], (4, 32))
    with pytest.raises(MissingTensorError, match="other"):
        WholeTensor("other").check(kind[1], (4, 32))


def test_rows_that_are_no_whole_blocks(tmp_path):
    write_safetensors(tmp_path / "model.safetensors", {"w_blocks": np.zeros((2, 4, 1, 16), np.uint8)})
    with Checkpoint(tmp_path) as checkpoint:
        with pytest.raises(ShapeMismatchError, match="w_blocks.*33 numbers.*blocks of 32"):
            StackedExpert("w", 0).check(checkpoint, (4, 33))
        with pytest.raises(MissingTensorError, match="w_scales"):
            StackedExpert("w", 0).check(checkpoint, (4, 32))


def test_other_dtypes(tmp_path):
    tensors = {"w": np.zeros((2, 4, 3), np.int32), "v_blocks": np.zeros((2, 4, 1, 16), np.int8),
               "v_scales": np.zeros((2, 4, 1), np.uint8)}
    write_safetensors(tmp_path / "model.safetensors", tensors)
    with Checkpoint(tmp_path) as checkpoint:
        with pytest.raises(UnsupportedModelError, match="'w'.*int32"):
            StackedExpert("w", 0).check(checkpoint, (3, 4))
        with pytest.raises(UnsupportedModelError, match="v_blocks.*int8.*uint8"):
            StackedExpert("v", 0).check(checkpoint, (4, 32))


def test_bfloat16_is_read_as_it_is(tmp_path):
    array = RNG.standard_normal((2, 3, 4)).astype(ml_dtypes.bfloat16)
    write_safetensors(tmp_path / "model.safetensors", {"w": array})
    with Checkpoint(tmp_path) as checkpoint:
        read = StackedExpert("w", 1).read(checkpoint, Weight((4, 3), ml_dtypes.bfloat16))
        assert read.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(read, array[1].T)


@pytest.mark.parametrize("item", [-1, 3])
def test_an_item_that_is_not_there(kind, item):
    with pytest.raises(CheckpointError, match=f"down_proj_bias.*no item {item}"):
        kind[1].read("down_proj_bias", item=item)
