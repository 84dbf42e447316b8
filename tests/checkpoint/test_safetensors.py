"""The safetensors reader and writer against the reference library and against hostile headers."""

import json
import os
import random
import struct
import threading
import time
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from cutp.checkpoint import SafetensorsFile, write_safetensors
from cutp.checkpoint import safetensors as module
from cutp.checkpoint.safetensors_header import DTYPES
from cutp.errors import CheckpointError, ClosedError, MissingTensorError, TruncatedFileError

TWO = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def write_raw(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(**changes):
    return {"a": {**TWO, **changes}}


HOSTILE = {
    # name: (header, data bytes, declared header length or None, error class, word)
    "length zero": (b"", b"", 0, CheckpointError, "empty header"),
    "length over the cap": (b"{}", b"", 100_000_001, CheckpointError, "over the limit"),
    "length of all ones": (b"{}", b"", 2**64 - 1, CheckpointError, "over the limit"),
    "length beyond the file": (b"{}", b"", 3, TruncatedFileError, "has 10 bytes, header needs 11"),
    "not UTF-8": (b'{"\xff": 1}', b"", None, CheckpointError, "UTF-8"),
    "not JSON": (b'{"a": ', b"", None, CheckpointError, "not valid JSON"),
    "NaN": (b'{"a": NaN}', b"", None, CheckpointError, "NaN"),
    "a list": (b"[]", b"", None, CheckpointError, "start"),
    "leading space": (b" {}", b"", None, CheckpointError, "start"),
    "byte order mark": (b"\xef\xbb\xbf{}", b"", None, CheckpointError, "start"),
    "trailing junk": (b"{} x", b"", None, CheckpointError, "JSON"),
    "nested lists": (b'{"a":' + b"[" * 200_000, b"", None, CheckpointError, "deeply"),
    "nested objects": (b'{"a":' * 200_000, b"", None, CheckpointError, "deeply"),
    "huge integer": (b'{"a": ' + b"9" * 100_000 + b"}", b"", None, CheckpointError, "JSON"),
    "duplicate tensor": (
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b"x", None, CheckpointError, "duplicate key 'a'",
    ),
    "duplicate field": (
        b'{"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x", None, CheckpointError, "duplicate",
    ),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, b"", None, CheckpointError, "__metadata__"),
    "metadata list": ({"__metadata__": []}, b"", None, CheckpointError, "__metadata__"),
    "metadata null": ({"__metadata__": None}, b"", None, CheckpointError, "__metadata__"),
    "entry is a list": ({"a": [1]}, b"", None, CheckpointError, "not an object"),
    "entry is null": ({"a": None}, b"", None, CheckpointError, "not an object"),
    "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, b"x" * 8, None, CheckpointError, "dtype"),
    "unknown dtype": (entry(dtype="F31"), b"x" * 8, None, CheckpointError, "unknown dtype 'F31'"),
    "dtype number": (entry(dtype=3), b"x" * 8, None, CheckpointError, "unknown dtype"),
    "dtype list": (entry(dtype=["F32"]), b"x" * 8, None, CheckpointError, "unknown dtype"),
    "shape negative": (entry(shape=[-2]), b"x" * 8, None, CheckpointError, "shape"),
    "shape negative twice": (entry(shape=[-2, -1]), b"x" * 8, None, CheckpointError, "shape"),
    "shape float": (entry(shape=[2.0]), b"x" * 8, None, CheckpointError, "shape"),
    "shape bool": (entry(shape=[True, 2]), b"x" * 8, None, CheckpointError, "shape"),
    "shape string": (entry(shape="2"), b"x" * 8, None, CheckpointError, "shape"),
    "shape null": (entry(shape=None), b"x" * 8, None, CheckpointError, "shape"),
    "shape overflows": (entry(shape=[2**40, 2**40]), b"x" * 8, None, CheckpointError, "overflows"),
    "shape wraps to fit": (entry(shape=[2**61 + 1, 8]), b"x" * 8, None, CheckpointError, "overflows"),
    "empty shape overflows": (entry(shape=[0, 2**40, 2**40]), b"", None, CheckpointError, "overflows"),
    "enormous dimensions": (entry(shape=[10**4000] * 60), b"x" * 8, None, CheckpointError, "overflows"),
    "too many dimensions": (entry(shape=[1] * 70 + [2]), b"x" * 8, None, CheckpointError, "dimensions"),
    "offsets negative": (entry(data_offsets=[-8, 0]), b"x" * 8, None, CheckpointError, "data_offsets"),
    "offsets float": (entry(data_offsets=[0, 8.0]), b"x" * 8, None, CheckpointError, "data_offsets"),
    "offsets bool": (entry(data_offsets=[False, 8]), b"x" * 8, None, CheckpointError, "data_offsets"),
    "offsets of one": (entry(data_offsets=[8]), b"x" * 8, None, CheckpointError, "data_offsets"),
    "offsets reversed": (entry(data_offsets=[8, 0]), b"x" * 8, None, CheckpointError, "span a range"),
    "offsets enormous": (entry(data_offsets=[0, 2**64]), b"x" * 8, None, CheckpointError, "span a range"),
    "length mismatch": (entry(shape=[3]), b"x" * 8, None, CheckpointError, "needs 12 bytes"),
    "hole at start": (entry(data_offsets=[4, 12]), b"x" * 12, None, CheckpointError, "hole"),
    "hole between": ({"a": TWO, "b": {**TWO, "data_offsets": [9, 17]}}, b"x" * 17, None, CheckpointError, "hole"),
    "overlap": ({"a": TWO, "b": {**TWO, "data_offsets": [4, 12]}}, b"x" * 12, None, CheckpointError, "overlap"),
    "the same bytes twice": ({"a": TWO, "b": TWO}, b"x" * 8, None, CheckpointError, "overlap"),
    "data too short": (entry(), b"x" * 7, None, TruncatedFileError, "header needs"),
    "data too long": (entry(), b"x" * 9, None, CheckpointError, "1 more than"),
    "data without tensors": ({}, b"x", None, CheckpointError, "1 more than"),
    "terabytes claimed": (entry(shape=[2**40], data_offsets=[0, 2**42]), b"x", None, TruncatedFileError, "needs"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_header(tmp_path, name):
    header, data, length, error, word = HOSTILE[name]
    path = write_raw(tmp_path / "x.safetensors", header, data, length)
    tracemalloc.start()
    start = time.process_time()
    with pytest.raises(CheckpointError, match=word) as caught:
        SafetensorsFile(path)
    seconds, peak = time.process_time() - start, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert type(caught.value) is error
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert seconds < 5 and peak < 64 << 20


@pytest.mark.parametrize("size", [0, 1, 7])
def test_file_shorter_than_the_length_field(tmp_path, size):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"\0" * size)
    with pytest.raises(TruncatedFileError, match=f"has {size} bytes"):
        SafetensorsFile(path)


def test_paths_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "absent"):
        with pytest.raises(CheckpointError, match=str(path)):
            SafetensorsFile(path)


def test_bit_flips_give_nothing_but_checkpoint_errors(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"w": np.arange(6.0).reshape(2, 3), "b": np.zeros(3, np.float16)}, {"format": "np"})
    good = path.read_bytes()
    header_end = 8 + int.from_bytes(good[:8], "little")
    rng = random.Random(0)
    refused = 0
    for _ in range(1500):
        data = bytearray(good)
        for _ in range(rng.choice((1, 1, 2, 5))):
            data[rng.randrange(header_end)] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        try:
            with SafetensorsFile(path) as file:
                for name in file.names():
                    assert file.read(name).shape == file.info(name).shape
        except CheckpointError:
            refused += 1
    assert refused > 700


ARRAYS = {
    "scalar": np.array(3.5, np.float32),
    "empty": np.zeros((0, 4), np.float32),
    "f64": np.linspace(0, 1, 7),
    "i64": np.arange(-3, 3),
    "i16": np.arange(-3, 3, dtype=np.int16),
    "u16": np.arange(5, dtype=np.uint16),
    "u8": np.arange(3, dtype=np.uint8),  # leaves what follows at an odd offset
    "f16": np.arange(6, dtype=np.float16).reshape(2, 3),
    "bool": np.array([True, False, True]),
    "u64": np.array([2**64 - 1], np.uint64),
}


def test_reads_what_the_reference_library_writes(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file(ARRAYS, path, metadata={"format": "pt"})
    with SafetensorsFile(path) as file:
        assert file.metadata == {"format": "pt"}
        assert sorted(file.names()) == sorted(ARRAYS)
        for name, array in ARRAYS.items():
            read = file.read(name)
            assert read.dtype == array.dtype and read.shape == array.shape and read.flags.writeable
            np.testing.assert_array_equal(read, array)


def test_the_reference_library_reads_what_we_write(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {**ARRAYS, "turned": np.arange(6.0).reshape(2, 3).T}, {"format": "np"})
    loaded = safetensors.numpy.load_file(path)
    np.testing.assert_array_equal(loaded.pop("turned"), np.arange(6.0).reshape(2, 3).T)
    for name, array in ARRAYS.items():
        assert loaded[name].dtype == array.dtype and loaded[name].shape == array.shape
        np.testing.assert_array_equal(loaded[name], array)
    assert os.listdir(tmp_path) == ["x.safetensors"]  # no temporary file left


@pytest.mark.parametrize(
    ("kind", "reference", "dtype"),
    [
        ("BF16", "bfloat16", ml_dtypes.bfloat16),
        ("F8_E4M3", "float8_e4m3fn", ml_dtypes.float8_e4m3fn),
        ("F8_E5M2", "float8_e5m2", ml_dtypes.float8_e5m2),
    ],
)
def test_small_floats_keep_every_bit_pattern(tmp_path, kind, reference, dtype):
    bits = np.arange(65536, dtype=np.uint16) if kind == "BF16" else np.arange(256, dtype=np.uint8)
    raw, shape = bits.tobytes(), [4, bits.size // 4]
    theirs, ours = tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors"
    spec = safetensors.TensorSpec(dtype=reference, shape=shape, data_ptr=bits.ctypes.data, data_len=bits.nbytes)
    theirs.write_bytes(safetensors.serialize({"w": spec}))
    with SafetensorsFile(theirs) as file:
        read = file.read("w")
    assert read.dtype == np.dtype(dtype) and read.shape == tuple(shape) and read.tobytes() == raw
    write_safetensors(ours, {"w": read})
    ((name, found),) = safetensors.deserialize(ours.read_bytes())
    assert (name, found["dtype"], found["shape"], bytes(found["data"])) == ("w", kind, shape, raw)


def test_writer_refuses_other_dtypes_and_converts_byte_order(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(CheckpointError, match="complex"):
        write_safetensors(path, {"w": np.zeros(2, complex)})
    assert not path.exists()
    write_safetensors(path, {"w": np.arange(3, dtype=">f4")})
    with SafetensorsFile(path) as file:
        np.testing.assert_array_equal(file.read("w"), [0, 1, 2])


def test_bool_bytes_other_than_one(tmp_path):
    path = write_raw(
        tmp_path / "x", {"a": {"dtype": "BOOL", "shape": [3], "data_offsets": [0, 3]}}, b"\x00\x02\xff"
    )
    with SafetensorsFile(path) as file:
        assert file.read("a").view(np.uint8).tolist() == [0, 1, 1]


@st.composite
def slices(draw):
    shape = tuple(draw(st.lists(st.integers(0, 7), min_size=1, max_size=4)))
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    size = shape[axis]
    pairs = st.tuples(st.integers(0, size), st.integers(0, size)).map(lambda p: tuple(sorted(p)))
    return shape, axis, draw(st.lists(pairs, max_size=4)), draw(st.sampled_from(sorted(DTYPES)))


@settings(max_examples=250, deadline=None)
@given(slices(), st.sampled_from([1, 40, 1 << 24]), st.sampled_from([1, 1 << 17]))
def test_slices_equal_numpy(tmp_path_factory, case, chunk, run):
    shape, axis, ranges, kind = case
    dtype = DTYPES[kind]
    count = int(np.prod(shape))
    raw = np.arange(count * dtype.itemsize, dtype=np.uint8)
    array = (raw % 2).view(np.bool_) if kind == "BOOL" else raw.view(dtype)
    array = array.reshape(shape)
    path = tmp_path_factory.getbasetemp() / "slices.safetensors"
    write_safetensors(path, {"first": np.zeros(3, np.uint8), "w": array})
    old = module.CHUNK_BYTES, module._EXACT_RUN_BYTES
    module.CHUNK_BYTES, module._EXACT_RUN_BYTES = chunk, run
    try:
        with SafetensorsFile(path) as file:
            read = file.read("w", axis, ranges)
    finally:
        module.CHUNK_BYTES, module._EXACT_RUN_BYTES = old
    index = [i for a, b in ranges for i in range(a, b)]
    wanted = np.take(array.view(f"V{dtype.itemsize}"), index, axis=axis)
    assert read.dtype == dtype and read.shape == wanted.shape and read.tobytes() == wanted.tobytes()


def test_only_the_wanted_rows_are_read(tmp_path):
    path = tmp_path / "x.safetensors"
    array = np.arange(1000 * 256, dtype=np.float32).reshape(1000, 256)
    write_safetensors(path, {"w": array})
    with SafetensorsFile(path) as file:
        np.testing.assert_array_equal(file.read("w", 0, [(250, 375)]), array[250:375])
        assert file.bytes_read == 125 * 256 * 4
        file.read("w", 0, [(10, 11), (990, 992)])
        assert file.bytes_read == 128 * 256 * 4
        file.read("w")
        assert file.bytes_read == 1128 * 256 * 4


def test_one_item(tmp_path):
    path = tmp_path / "x.safetensors"
    array = np.arange(5 * 6 * 7, dtype=np.float32).reshape(5, 6, 7)
    write_safetensors(path, {"first": np.zeros(3), "w": array, "n": np.float32(1)})
    with SafetensorsFile(path) as file:
        for item in range(5):
            before = file.bytes_read
            np.testing.assert_array_equal(file.read("w", item=item), array[item])
            assert file.bytes_read - before == 6 * 7 * 4
        np.testing.assert_array_equal(file.read("w", 0, [(2, 4)], item=3), array[3, 2:4])
        np.testing.assert_array_equal(file.read("w", -1, [(5, 7), (0, 1)], item=4), array[4][:, [5, 6, 0]])
        for name, item in (("w", 5), ("w", -1), ("n", 0)):
            with pytest.raises(CheckpointError, match=f"{name!r}.*no item {item}"):
                file.read(name, item=item)
        with pytest.raises(CheckpointError, match="axis 2"):
            file.read("w", 2, [(0, 1)], item=0)


def test_some_rows(tmp_path):
    array = np.arange(5 * 4 * 7, dtype=np.float32).reshape(5, 4, 7)
    write_safetensors(tmp_path / "m.safetensors", {"w": array, "n": np.array(1.0)})
    with SafetensorsFile(tmp_path / "m.safetensors") as file:
        for start, stop in ((0, 5), (1, 4), (4, 5), (2, 2)):
            before = file.bytes_read
            np.testing.assert_array_equal(file.read("w", rows=(start, stop)), array[start:stop])
            assert file.bytes_read - before == (stop - start) * 4 * 7 * 4
            np.testing.assert_array_equal(file.read("w", 2, [(3, 5), (0, 1)], rows=(start, stop)),
                                          array[start:stop][:, :, [3, 4, 0]])
            np.testing.assert_array_equal(file.read("w", 1, [(2, 7)], item=start % 5, rows=(1, 3)),
                                          array[start % 5, 1:3, 2:7])
        for rows in ((-1, 2), (3, 2), (0, 6)):
            with pytest.raises(CheckpointError, match=f"'w' of shape .* has no rows {rows[0]}:{rows[1]}"):
                file.read("w", rows=rows)
        with pytest.raises(CheckpointError, match="'n' of shape .* has no rows"):
            file.read("n", rows=(0, 0))


def test_a_buffer_to_read_into(tmp_path):
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    write_safetensors(tmp_path / "m.safetensors", {"w": array})
    buffer = np.zeros(49, np.uint8)
    with SafetensorsFile(tmp_path / "m.safetensors") as file:
        for arguments in ((), (1, [(1, 3)]), (0, [(2, 3)])):
            expected = file.read("w", *arguments)
            found = file.read("w", *arguments, buffer=buffer)
            np.testing.assert_array_equal(found, expected)
            assert found.ctypes.data == buffer.ctypes.data and found.flags.writeable
        assert file.read("w", buffer=buffer[:48]).ctypes.data == buffer.ctypes.data
        small = file.read("w", buffer=buffer[:47])
        np.testing.assert_array_equal(small, array)
        assert not np.shares_memory(small, buffer)


def test_column_slice_memory_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", 1 << 20)
    path = tmp_path / "x.safetensors"
    array = np.arange(4096 * 2048, dtype=np.float32).reshape(4096, 2048)
    write_safetensors(path, {"w": array})  # 32 MiB, of which 2 MiB are read
    with SafetensorsFile(path) as file:
        tracemalloc.start()
        read = file.read("w", 1, [(512, 640)])
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    np.testing.assert_array_equal(read, array[:, 512:640])
    assert peak < (2 << 20) + (1 << 20) + (1 << 18)


def test_wide_column_slice_reads_only_the_slice(tmp_path):
    path = tmp_path / "x.safetensors"
    array = np.arange(8 * 262144, dtype=np.uint16).reshape(8, 262144)
    write_safetensors(path, {"w": array})
    with SafetensorsFile(path) as file:
        np.testing.assert_array_equal(file.read("w", -1, [(65536, 131072 + 65536)]), array[:, 65536 : 131072 + 65536])
        assert file.bytes_read == 8 * 131072 * 2


@pytest.mark.parametrize(
    ("axis", "ranges"),
    [(0, [(0, 3)]), (0, [(-1, 1)]), (1, [(2, 1)]), (2, [(0, 1)]), (-3, [(0, 1)]), (0, None), (None, [(0, 1)])],
)
def test_ranges_out_of_bounds(tmp_path, axis, ranges):
    write_safetensors(tmp_path / "x", {"w": np.zeros((2, 3))})
    with SafetensorsFile(tmp_path / "x") as file, pytest.raises(CheckpointError, match="'w'"):
        file.read("w", axis, ranges)


def test_names_closing_and_shrinking(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"w": np.zeros(1000)})
    file = SafetensorsFile(path)
    assert "w" in file and "v" not in file
    with pytest.raises(MissingTensorError, match="'v'"):
        file.read("v")
    os.truncate(path, 2000)
    with pytest.raises(TruncatedFileError, match="ended at byte 2000"):
        file.read("w")
    file.close()
    file.close()
    with pytest.raises(ClosedError):
        file.read("w")


def test_threads_read_at_the_same_time(tmp_path):
    path = tmp_path / "x.safetensors"
    array = np.random.default_rng(0).integers(0, 255, (64, 4096), dtype=np.uint8)
    write_safetensors(path, {"w": array})
    wrong = []
    with SafetensorsFile(path) as file:

        def work(i):
            for _ in range(50):
                if not np.array_equal(file.read("w", 0, [(i * 8, i * 8 + 8)]), array[i * 8 : i * 8 + 8]):
                    wrong.append(i)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong and file.bytes_read == 8 * 50 * 8 * 4096
