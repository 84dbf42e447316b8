"""Reading weights in pieces, several at a time: to the host and to a device, from every kind of checkpoint."""

import threading
import time

import ml_dtypes
import numpy as np
import pytest

from cutp.checkpoint.checkpoint import Checkpoint
from cutp.checkpoint.config import load_config
from cutp.checkpoint.safetensors import write_safetensors
from cutp.comm.device_group import DeviceGroup
from cutp.errors import CheckpointError, ConfigError
from cutp.models import weight_reader
from cutp.models.load import check_weights, load_weights
from cutp.models.registry import find_family
from cutp.models.weight_reader import Fill, fill_weights
from cutp.models.weight_source import WholeTensor, clipped
from cutp.nn.module import Weight
from cutp.nn.sharding import EvenSegment, HeadSegment, ShardingStrategy
from cutp.nn.storage import DeviceStorage, Padding
from tests.device_arrays import EmulatedMemory

BF16, F16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32)
CASES = ["odd_ffn", "odd_vocab", "phi3_defaults", "gemma2_low_caps", "mixtral_window", "gpt_oss_mxfp4_uneven",
         "gpt_oss_defaults", "deepseek_v3_biases"]


def read(directory, dtype, ranks=1, rank=0, memory=None, progress=None):
    """(the model with its weights, its LoadReport, the bytes read)."""
    config = load_config(directory)
    family = find_family(config)
    model = family.build(config, DeviceGroup.planned(ranks, rank), dtype, 64)
    with Checkpoint(directory) as checkpoint:
        check_weights(model, checkpoint, family)
        if memory is None:
            report = load_weights(model, checkpoint, family, progress)
        else:
            with DeviceStorage(memory).use():
                report = load_weights(model, checkpoint, family, progress)
        return model, report, checkpoint.bytes_read


def without_padding(weight):
    """What a device holds of `weight`, as the host would hold it."""
    found = weight.data.host
    if weight.padding is not None:
        axis, parts = weight.padding
        runs = np.split(found, parts, axis)
        length = weight.local_shape[axis] // parts
        assert all((run.take(range(length, run.shape[axis]), axis).astype(F32) == 0).all() for run in runs)
        found = np.concatenate([run.take(range(length), axis) for run in runs], axis)
    return found.astype(F32)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_a_device_gets_what_the_host_gets(tiny, case, dtype, monkeypatch):
    monkeypatch.setattr(weight_reader, "PIECE_BYTES", 1000)
    for rank in range(2):
        host, _, _ = read(tiny(case), dtype, 2, rank)
        device, _, _ = read(tiny(case), dtype, 2, rank, EmulatedMemory())
        for (name, weight), (_, other) in zip(host.named_weights(), device.named_weights(), strict=True):
            assert other.data.dtype == (other.device_dtype or other.dtype), name
            np.testing.assert_array_equal(without_padding(other), weight.data, name)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("piece", [100, 5000, 1 << 24])
def test_pieces_of_any_size_by_any_number_of_threads(tiny, piece, threads, monkeypatch):
    whole, report, count = read(tiny("odd_ffn"), F32)
    monkeypatch.setattr(weight_reader, "PIECE_BYTES", piece)
    monkeypatch.setenv("CUTP_LOAD_THREADS", str(threads))
    done = []
    other, again, _ = read(tiny("odd_ffn"), F32, progress=done.append)
    for (name, weight), (_, found) in zip(whole.named_weights(), other.named_weights(), strict=True):
        np.testing.assert_array_equal(found.data, weight.data, name)
    assert report.bytes == again.bytes == count
    assert sum(done) == sum(weight.local_bytes for _, weight in other.named_weights())
    assert len(done) > len(list(other.named_weights())) or piece > 5000


def test_the_report(tiny):
    _, report, count = read(tiny("odd_ffn"), F32)
    assert report.to_dict() == {"bytes": count, "seconds": report.seconds, "gb_per_second": report.gb_per_second}
    assert report.seconds > 0 and report.gb_per_second == pytest.approx(count / 1e9 / report.seconds)


@pytest.mark.parametrize("stored", [F32, F16, BF16, np.dtype(np.float64)])
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_dtypes_are_converted_on_the_way(tmp_path, stored, dtype):
    values = np.random.default_rng(0).standard_normal((50, 24)).astype(stored)
    write_safetensors(tmp_path / "model.safetensors", {"w": values})
    expected = values.astype(dtype)
    with Checkpoint(tmp_path) as checkpoint:
        for memory in (None, EmulatedMemory()):
            weight = Weight((50, 24), dtype, clip=None)
            fill = Fill(weight, lambda rows, buffer, w=weight: WholeTensor("w").read(checkpoint, w, rows, buffer))
            if memory is None:
                fill_weights([fill], 2)
                np.testing.assert_array_equal(weight.data, expected.astype(F32))
                continue
            with DeviceStorage(memory).use():
                fill_weights([fill], 2)
            assert weight.data.dtype == dtype
            np.testing.assert_array_equal(weight.data.host, expected)


@pytest.mark.parametrize("strategy", [
    None, ShardingStrategy.replicate(3), ShardingStrategy.rowwise(3), ShardingStrategy.columnwise(3),
    ShardingStrategy.gate_up(3, axis=0), ShardingStrategy.segmented(3, 0, [HeadSegment(3, 4), EvenSegment(38)]),
    ShardingStrategy.segmented(3, 1, [HeadSegment(3, 4), EvenSegment(12)])])
def test_rows_of_a_share(tmp_path, strategy):
    values = np.arange(50 * 24, dtype=F32).reshape(50, 24)
    write_safetensors(tmp_path / "model.safetensors", {"w": values})
    buffer = np.empty(1 << 13, np.uint8)
    with Checkpoint(tmp_path) as checkpoint:
        for rank in range(3):
            weight = Weight((50, 24), F32, strategy=strategy, rank=rank)
            share = WholeTensor("w").read(checkpoint, weight)
            assert share.shape == weight.local_shape
            for start in range(0, len(share), 7):
                found = WholeTensor("w").read(checkpoint, weight, (start, min(start + 5, len(share))), buffer)
                np.testing.assert_array_equal(found, share[start : start + 5])
                assert np.shares_memory(found, buffer)


def test_ranges_are_clipped():
    ranges = [(3, 5), (7, 7), (10, 14)]
    assert clipped(ranges, 0, 6) == [(3, 5), (10, 14)]
    assert clipped(ranges, 1, 3) == [(4, 5), (10, 11)]
    assert clipped(ranges, 2, 6) == [(10, 14)] and clipped(ranges, 5, 6) == [(13, 14)] and clipped(ranges, 0, 0) == []


def test_several_reads_are_in_flight():
    together = threading.Barrier(4, timeout=30)

    def source(rows, buffer):
        together.wait()  # needs four readers at once
        return np.ones((2, 2), F32)

    fills = [Fill(Weight((2, 2), F32), source) for _ in range(8)]
    fill_weights(fills, 4)
    assert all((fill.weight.data == 1).all() for fill in fills)


def test_memory_is_bounded_by_the_readers(monkeypatch):
    """However large the weights are, a reader holds one piece and its buffers."""
    monkeypatch.setattr(weight_reader, "PIECE_BYTES", 1 << 12)
    sizes, lanes = [], []

    class Counting(EmulatedMemory):
        def uploader(self, nbytes):
            lanes.append(nbytes)
            return super().uploader(nbytes)

    def source(rows, buffer):
        sizes.append((rows[1] - rows[0]) * 64 * 2)
        return np.ones((rows[1] - rows[0], 64), BF16)

    with DeviceStorage(Counting()).use():
        fill_weights([Fill(Weight((1000, 64), BF16), source)], 3)
    assert max(sizes) <= 1 << 12 and sum(sizes) == 1000 * 64 * 2 and lanes == [1 << 12] * 3


def test_a_row_larger_than_a_piece(monkeypatch):
    monkeypatch.setattr(weight_reader, "PIECE_BYTES", 64)
    weight = Weight((3, 100), BF16)
    with DeviceStorage(EmulatedMemory()).use():
        fill_weights([Fill(weight, lambda rows, buffer: np.full((rows[1] - rows[0], 100), rows[0], BF16))], 2)
    np.testing.assert_array_equal(weight.data.host[:, 0].astype(int), [0, 1, 2])


def test_pieces_are_measured_as_they_are_held(monkeypatch):
    monkeypatch.setattr(weight_reader, "PIECE_BYTES", 64)
    weight = Weight((100,), BF16, device_dtype=F32)
    with DeviceStorage(EmulatedMemory()).use():
        fill_weights([Fill(weight, lambda rows, buffer: np.arange(*rows).astype(BF16))], 2)
    np.testing.assert_array_equal(weight.data.host, np.arange(100))


def test_zeros_are_there_before_anything_is_uploaded():
    """They are written on one stream, and uploads run on others."""
    calls = []

    class Noting(EmulatedMemory):
        def zeros(self, shape, dtype):
            calls.append("zeros")
            return super().zeros(shape, dtype)

        def synchronize(self):
            calls.append("synchronize")

        def uploader(self, nbytes):
            calls.append("uploader")
            return super().uploader(nbytes)

    fills = [Fill(Weight((3, 3), BF16, padding=Padding(0)), lambda rows, buffer: np.ones((3, 3), BF16))
             for _ in range(2)]
    with DeviceStorage(Noting()).use():
        fill_weights(fills, 1)
    assert calls == ["zeros", "zeros", "synchronize", "uploader"]


def test_small_pieces_read_no_more(tiny, monkeypatch):
    """Rows of interleaved and quantized experts lie among others, and are read once."""
    for case in ("gpt_oss_mxfp4_uneven", "gpt_oss_defaults", "deepseek_v3_biases"):
        _, whole, _ = read(tiny(case), BF16, 2, 1)
        monkeypatch.setattr(weight_reader, "PIECE_BYTES", 500)
        _, pieces, _ = read(tiny(case), BF16, 2, 1, EmulatedMemory())
        monkeypatch.undo()
        assert pieces.bytes < 1.02 * whole.bytes, case


def test_the_first_error_ends_the_others():
    started = []

    def source(number):
        def make(rows, buffer):
            started.append(number)
            if number == 2:
                raise CheckpointError("the file ended")
            time.sleep(0.01)
            return np.ones((1, 1), F32)

        return make

    with pytest.raises(CheckpointError, match="the file ended"):
        fill_weights([Fill(Weight((1, 1), F32), source(i)) for i in range(1000)], 3)
    assert len(started) < 500  # a few, but many more where the thread that fails is not on a core at once
    assert not any(thread.name.startswith("cutp-load") for thread in threading.enumerate())


def test_an_error_of_the_caller_ends_the_readers():
    def progress(count):
        raise KeyboardInterrupt

    fills = [Fill(Weight((1, 1), F32), lambda rows, buffer: time.sleep(0.01) or np.ones((1, 1), F32))
             for _ in range(1000)]
    with pytest.raises(KeyboardInterrupt):
        fill_weights(fills, 2, progress)
    assert not any(thread.name.startswith("cutp-load") for thread in threading.enumerate())
    assert sum(fill.weight.data[0, 0] == 1 for fill in fills) < 500


def test_nothing_to_read():
    fill_weights([], 8)
    weight = Weight((0, 4), F32)
    fill_weights([Fill(weight, lambda rows, buffer: pytest.fail("read"), in_pieces=False),
                  Fill(weight, lambda rows, buffer: pytest.fail("read"))], 8)
    assert weight.data.shape == (0, 4)


@pytest.mark.parametrize("text", ["0", "-1", "many", "1.5", "257"])
def test_a_number_of_threads_that_cannot_be(tiny, monkeypatch, text):
    monkeypatch.setenv("CUTP_LOAD_THREADS", text)
    with pytest.raises(ConfigError, match="CUTP_LOAD_THREADS"):
        read(tiny("odd_ffn"), F32)
