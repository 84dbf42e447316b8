"""The kernels of embedding.cu against their specification in NumPy, bit for bit."""

import numpy as np
import pytest

from cutp.errors import ConfigError
from cutp.ops import embedding as reference
from cutp.ops.embedding_cuda import embedding
from tests.emulation.emulator import needs_compiler
from tests.ops.kernel_results import (
    DTYPES,
    assert_same_bits,
    bfloat16,
    float16,
    float32,
    gpu_only,
    in_every_order,
    random_values,
    read_only,
)

INT32, INT64 = np.dtype(np.int32), np.dtype(np.int64)


def gathered(device, tokens, table, vocab_start, **options):
    out = device.poisoned((len(tokens), table.shape[1]), table.dtype)
    embedding(*read_only(device, tokens, table), vocab_start, out=out, **options)
    return device.numpy(out)


# One 16-byte vector, less than a warp, a whole warp, more, more threads than a block has.
@pytest.mark.parametrize("row_bytes", [16, 48, 512, 528, 4096, 16400])
@pytest.mark.parametrize("token_dtype", [INT32, INT64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_reference(device, dtype, token_dtype, row_bytes):
    table = random_values(row_bytes, (5, row_bytes // dtype.itemsize), dtype)
    table[1, 0], table[2, -1], table[3, 1] = np.nan, -np.inf, -0.0
    largest = np.iinfo(token_dtype)
    tokens = np.array([10, 14, 9, 15, 11, 12, 13, 12, -1, 0, largest.max, largest.min], token_dtype)
    expected = reference.embedding(tokens.astype(np.int64), table, 10, dtype)
    assert_same_bits(gathered(device, tokens, table, 10, pdl=True), expected)


@pytest.mark.parametrize("n_tokens", [0, 1, 2, 3, 4, 5, 9])
def test_any_number_of_tokens(device, n_tokens):
    table = random_values(1, (4, 16), float32)
    tokens = np.arange(n_tokens) % 6
    assert_same_bits(gathered(device, tokens, table, 1), reference.embedding(tokens, table, 1, float32))


def test_the_slices_of_all_ranks_sum_to_the_table(device):
    table = random_values(2, (11, 40), bfloat16)
    tokens = np.random.default_rng(2).integers(0, 11, 30)
    parts = [gathered(device, tokens, table[a:b], a) for a, b in ((0, 4), (4, 8), (8, 11))]
    np.testing.assert_array_equal(np.sum([p.astype(np.float32) for p in parts], 0), table[tokens].astype(np.float32))


def test_a_rank_without_rows(device):
    tokens, table = np.array([0, 5]), np.zeros((0, 16), np.float32)
    np.testing.assert_array_equal(gathered(device, tokens, table, 0), np.zeros((2, 16)))


def test_a_row_does_not_depend_on_the_others(device):
    table = random_values(3, (7, 24), bfloat16)
    tokens = np.array([3, 6, -1, 0, 2, 2])
    alone = np.concatenate([gathered(device, tokens[i : i + 1], table, 0) for i in range(len(tokens))])
    assert_same_bits(gathered(device, tokens, table, 0), alone)


@needs_compiler
def test_the_result_does_not_depend_on_the_order_of_threads():
    table, tokens = random_values(4, (7, 40), float16), np.array([3, 6, -1, 0, 2, 2, 7])

    def run():
        out = np.full((7, 40), np.nan, float16)
        embedding(tokens, table, 0, out=out)
        return [out]

    assert_same_bits(in_every_order(run)[0], reference.embedding(tokens, table, 0, float16))


@gpu_only
def test_a_table_of_more_than_2_to_the_31_elements(device):
    import cupy

    rows, dim = 2**31 // 4096 + 3, 4096
    table = cupy.zeros((rows, dim), np.float16)
    table[rows - 1], table[rows - 2] = cupy.arange(dim) % 2048, 5
    tokens = cupy.asarray(np.array([rows - 1, rows - 2, 1, rows]))
    out = cupy.full((4, dim), np.nan, np.float16)
    embedding(tokens, table, 0, out=out)
    np.testing.assert_array_equal(cupy.asnumpy(out), [np.arange(dim) % 2048, [5] * dim, [0] * dim, [0] * dim])


@pytest.mark.parametrize(("change", "message"), [
    ({"tokens": np.zeros(3, np.int16)}, "tokens has dtype int16; it needs int32, int64"),
    ({"tokens": np.zeros((3, 1), np.int64)}, r"tokens has shape \(3, 1\); it needs \[T\]"),
    ({"tokens": np.zeros(6, np.int64)[::2]}, "tokens of shape .* is not contiguous"),
    ({"table": np.zeros(16, np.float32)}, r"table has shape \(16,\); it needs \[V_local, d\]"),
    ({"table": np.zeros((5, 16), np.float64)}, "table has dtype float64; it needs bfloat16, float16, float32"),
    ({"table": np.zeros((5, 32), np.float32)[:, ::2]}, "table of shape .* is not contiguous"),
    ({"table": np.zeros((5, 10), np.float32), "out": np.zeros((3, 10), np.float32)},
     "rows of 10 float32 elements are 40 bytes; they need a multiple of 16 bytes"),
    ({"out": np.zeros((3, 12), np.float32)}, r"out has shape \(3, 12\); it needs \(3, 16\)"),
    ({"out": np.zeros((3, 16), np.float16)}, "out has dtype float16; it needs float32"),
])
def test_arguments_that_do_not_fit(change, message):
    given = {"tokens": np.zeros(3, np.int64), "table": np.zeros((5, 16), np.float32),
             "out": np.zeros((3, 16), np.float32), **change}
    with pytest.raises(ConfigError, match=f"embedding: {message}"):
        embedding(**given, vocab_start=0)
