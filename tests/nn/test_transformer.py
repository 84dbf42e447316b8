"""The whole decoder: a dense float64 model by hand, any number of devices, and what each logits mode returns."""

import dataclasses
import math
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import pytest

from cutp.comm.threads import run_threads
from cutp.errors import RequestError
from cutp.kv_cache import KVCacheParams
from cutp.nn.attention import AttentionWithRope, TensorParallelAttentionWithRope
from cutp.nn.distributed_transformer import (
    DistributedTransformer,
    DistributedTransformerBlock,
    distribute_value,
    forward_sharded_layers,
    take,
)
from cutp.nn.embedding import VocabParallelEmbedding
from cutp.nn.linear import ColumnParallelLinear
from cutp.nn.mlp import MLP
from cutp.nn.norm import RMSNorm
from cutp.nn.return_logits import ReturnLogits, logit_rows
from cutp.nn.rotary_embedding import RotaryEmbedding
from tests.nn.building import DEVICE_COUNTS, close, cpus, fill, make_batch, poisoned_caches

float32 = np.dtype(np.float32)
bfloat16 = np.dtype(ml_dtypes.bfloat16)
EPS, THETA = 1e-3, 50.0
PROMPTS = ([3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9])


@dataclass(frozen=True)
class Size:
    vocab: int = 13
    hidden: int = 10
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 4
    width: int = 11
    layers: int = 2
    tied: bool = False
    bias: bool = True
    dtype: np.dtype = float32


def build(size, devices, **options):
    rope = RotaryEmbedding(size.head_dim, max_seq_len=64, theta=THETA)

    def norm():
        return RMSNorm(size.hidden, size.dtype, EPS, multiply_before_cast=False)

    def block():
        attention = AttentionWithRope(size.hidden, size.heads, size.kv_heads, size.head_dim, size.dtype, rope,
                                      has_bias=size.bias)
        mlp = MLP(size.hidden, size.width, size.dtype, has_bias=size.bias)
        return DistributedTransformerBlock(TensorParallelAttentionWithRope(attention, devices), mlp, norm(), norm(),
                                           devices)

    embedding = VocabParallelEmbedding(size.vocab, size.hidden, size.dtype, devices)
    head = ColumnParallelLinear(size.hidden, size.vocab, size.dtype, devices,
                                tied_weight=embedding if size.tied else None)
    kv_params = KVCacheParams(size.dtype, size.heads, size.kv_heads, size.head_dim, size.layers, page_size=3)
    return DistributedTransformer(size.hidden, size.heads, (block() for _ in range(size.layers)), norm(), head,
                                  embedding, kv_params, devices, rope, **options)


def by_hand(values, size, tokens):
    """Logits of every token of one prompt, float64 [T, V], without cache, pages or shards."""
    w = {name: value.astype(np.float64) for name, value in values.items()}

    def norm(x, name):
        return x / np.sqrt((x * x).mean(axis=1, keepdims=True) + EPS) * w[f"{name}.weight"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    def heads(x, name, turn):
        y = linear(x, name).reshape(len(x), -1, size.head_dim)
        if turn:
            half = size.head_dim // 2
            angles = np.arange(len(x))[:, None] / THETA ** (np.arange(half) / half)
            rotated = (y[..., :half] + 1j * y[..., half:]) * np.exp(1j * angles)[:, None]
            y = np.concatenate([rotated.real, rotated.imag], axis=-1)
        return y

    h = w["embed_tokens.weight"][tokens]
    causal = np.tril(np.ones((len(tokens), len(tokens)), bool))
    for i in range(size.layers):
        attention, mlp = f"layers.{i}.self_attn", f"layers.{i}.mlp"
        x = norm(h, f"layers.{i}.input_layernorm")
        q, k, v = heads(x, f"{attention}.q_proj", True), heads(x, f"{attention}.k_proj", True), heads(
            x, f"{attention}.v_proj", False)
        y = np.empty_like(q)
        for head in range(size.heads):
            kv = head // (size.heads // size.kv_heads)
            weights = np.where(causal, np.exp(q[:, head] @ k[:, kv].T / math.sqrt(size.head_dim)), 0)
            y[:, head] = weights / weights.sum(axis=1, keepdims=True) @ v[:, kv]
        h = h + linear(y.reshape(len(tokens), -1), f"{attention}.o_proj")
        x = norm(h, f"layers.{i}.post_attention_layernorm")
        gate = linear(x, f"{mlp}.gate_proj")
        h = h + linear(gate / (1 + np.exp(-gate)) * linear(x, f"{mlp}.up_proj"), f"{mlp}.down_proj")
    return linear(norm(h, "norm"), "embed_tokens" if size.tied else "lm_head")


def all_by_hand(values, size):
    return np.concatenate([by_hand(values, size, prompt) for prompt in PROMPTS])


def logits(size, devices, local_ranks=None, values=None, **options):
    """The result of one pass over PROMPTS, and the weights."""
    model = build(size, devices, **options)
    values = fill(model, values)
    caches = poisoned_caches(model.kv_params, model.group.size, local_ranks)
    return model(make_batch(PROMPTS, [0, 0, 0]), caches), values


SIZES = {
    "biases, odd vocabulary": Size(),
    "tied": Size(tied=True, bias=False),
    "one key-value head": Size(kv_heads=1, bias=False, vocab=16),
    "multi-head": Size(kv_heads=8, head_dim=2),
    "9 heads, 3 key-value heads": Size(heads=9, kv_heads=3, width=16),
}


@pytest.mark.parametrize("n", DEVICE_COUNTS)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_devices_of_one_process(size, n):
    (last, every, offsets), values = logits(size, cpus(n), return_logits=ReturnLogits.ALL)
    assert last.dtype == every.dtype == np.float32
    expected = all_by_hand(values, size)
    close(every, expected, 1e-4)
    np.testing.assert_array_equal(offsets, [0, 5, 6, 13])
    np.testing.assert_array_equal(last, every[[4, 5, 12]])


@pytest.mark.parametrize("n", (1, 2, 3, 4))
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_communicators_equal_devices_of_one_process(size, n):
    (one_process,), values = logits(size, cpus(n))
    for (got,), _ in run_threads(n, lambda comm: logits(size, comm, [comm.rank], values), timeout=20):
        # Sums are formed in rank order on both ways, so even the bits agree.
        np.testing.assert_array_equal(got, one_process)


@pytest.mark.parametrize("n", (2, 3, 8))
def test_bfloat16_on_any_number_of_devices(n):
    size = dataclasses.replace(Size(), dtype=bfloat16)
    model = build(size, cpus(n))
    values = fill(model)
    hidden = model.hidden_states(make_batch(PROMPTS, [0, 0, 0]), poisoned_caches(model.kv_params, n))
    assert all(h.dtype == bfloat16 for h in hidden)
    (got,), _ = logits(size, cpus(n), values=values)
    assert got.dtype == np.float32
    exact = all_by_hand(values, size)[[4, 5, 12]]
    assert np.abs(got - exact).max() < 0.15
    (one,), _ = logits(size, cpus(1), values=values)
    assert np.abs(got - one).max() < 0.15


def test_residual_is_rounded_after_each_sum():
    block = build(Size(), cpus(1)).layers[0]
    block.self_attn = lambda _, xs, caches, batch: [np.ones_like(x) for x in xs]
    block.input_layernorm = block.post_attention_layernorm = [lambda x: x]
    block.mlp = [np.ones_like]
    [h] = block(0, [np.array([[256.0]], bfloat16)], [None], None)
    # 256 + 1 rounds to 256, twice; one sum of all three would be 258.
    assert h.dtype == bfloat16 and h[0, 0] == 256


@pytest.mark.parametrize("n", (1, 3))
def test_last_token(n):
    (result, values) = logits(Size(), cpus(n))
    [last] = result
    close(last, all_by_hand(values, Size())[[4, 5, 12]], 1e-4)


@pytest.mark.parametrize("n", (1, 2))
@pytest.mark.parametrize("count", [1, 2, 3])
def test_variable(n, count):
    prompts = ([3, 1, 4], [2, 6, 5, 3, 5, 8])
    model = build(Size(), cpus(n), return_logits=ReturnLogits.VARIABLE)
    values = fill(model)
    result = model(make_batch(prompts, [0, 0]), poisoned_caches(model.kv_params, n), count)
    last, several, offsets = result
    expected = [by_hand(values, Size(), prompt)[-count:] for prompt in prompts]
    assert several.shape == (2 * count, 13) and offsets.dtype == np.int64
    np.testing.assert_array_equal(offsets, [0, count, 2 * count])
    close(several, np.concatenate(expected), 1e-4)
    np.testing.assert_array_equal(last, several[[count - 1, 2 * count - 1]])


def test_variable_with_a_short_request_names_it():
    model = build(Size(), cpus(1), return_logits=ReturnLogits.VARIABLE)
    fill(model)
    with pytest.raises(RequestError, match="request 1 of the batch has 1 tokens, but logits of its last 2"):
        model(make_batch(PROMPTS, [0, 0, 0]), poisoned_caches(model.kv_params), 2)
    with pytest.raises(RequestError, match="at least one token"):
        model(make_batch(PROMPTS, [0, 0, 0]), poisoned_caches(model.kv_params), 0)


@pytest.mark.parametrize("mode", ReturnLogits)
@pytest.mark.parametrize("dtype", [np.int64, np.uint32])
def test_rows_of_a_request_without_tokens(mode, dtype):
    with pytest.raises(RequestError, match="request 1 of the batch has 0 tokens"):
        logit_rows(mode, np.array([0, 2, 2, 5], dtype))


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint32])
def test_rows(dtype):
    offsets = np.array([0, 2, 5], dtype)
    assert logit_rows(ReturnLogits.LAST_TOKEN, offsets, 7).tolist() == [1, 4]
    assert logit_rows(ReturnLogits.VARIABLE, offsets, 2).tolist() == [0, 1, 3, 4]
    assert logit_rows(ReturnLogits.ALL, offsets, 7).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("mode", ReturnLogits)
@pytest.mark.parametrize("scaling", [0.25, 8.0])
def test_logits_scaling_divides(mode, scaling):
    plain, values = logits(Size(), cpus(2), return_logits=mode)
    scaled, _ = logits(Size(), cpus(2), values=values, return_logits=mode, logits_scaling=scaling)
    for a, b in zip(plain[:2], scaled[:2], strict=True):
        np.testing.assert_array_equal(b, a / np.float32(scaling))


def test_local_logits_are_the_vocabulary_slices():
    model = build(Size(), cpus(3))
    fill(model)
    batch = make_batch(PROMPTS, [0, 0, 0])
    hidden = model.hidden_states(batch, poisoned_caches(model.kv_params, 3))
    rows = np.array([12, 0])
    parts = model.local_logits(hidden, rows)
    assert [part.shape for part in parts] == [(2, 5), (2, 4), (2, 4)]
    model.return_logits = ReturnLogits.ALL
    _, every, _ = model(batch, poisoned_caches(model.kv_params, 3))
    close(np.concatenate(parts, axis=1), every[rows])
    drawn = model.all_local_logits(hidden)
    assert {part.dtype for part in parts + drawn} == {np.dtype(np.float32)}
    close(np.concatenate(drawn, axis=1), every)


@pytest.mark.parametrize("n", (1, 3))
def test_decoding_with_the_cache_equals_the_whole_prompt(n):
    model = build(Size(), cpus(n))
    values = fill(model)
    caches = poisoned_caches(model.kv_params, n)
    prompt = PROMPTS[2]
    for start, stop in [(0, 3), (3, 4), (4, 6), (6, 7)]:
        [last] = model(make_batch([prompt[start:stop]], [start]), caches)
        close(last[0], by_hand(values, Size(), prompt)[stop - 1], 1e-4)


@pytest.mark.parametrize("n", (1, 3))
@pytest.mark.parametrize("tied", [False, True])
def test_names_are_those_of_a_checkpoint_without_its_prefix(n, tied):
    size = Size(tied=tied, layers=2)
    model = build(size, cpus(n))
    parts = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
             "mlp.up_proj", "mlp.down_proj"]
    block = {f"{part}.{kind}" for part in parts for kind in ("weight", "bias")}
    block |= {"input_layernorm.weight", "post_attention_layernorm.weight"}
    expected = {f"layers.{i}.{name}" for i in range(2) for name in block} | {"embed_tokens.weight", "norm.weight"}
    expected |= set() if tied else {"lm_head.weight"}
    names = [name for name, _ in model.named_weights()]
    assert set(names) == expected
    assert all(names.count(name) == n for name in expected)  # one a local shard; a tied weight is not listed twice


def test_properties():
    model = build(Size(), cpus(2))
    assert model.vocab_size == 13 and len(model.layers) == 2 and model.kv_params.num_layers == 2


def test_forward_sharded_layers():
    assert forward_sharded_layers([abs, lambda x: x + 1], [-3, 4]) == [3, 5]
    with pytest.raises(AssertionError, match="2 sharded layers were given 3 inputs"):
        forward_sharded_layers([abs, abs], [1, 2, 3])


def test_take():
    items = iter(range(5))
    assert take(items, 2) == [0, 1] and take(items, 0) == [] and take(items, 9) == [2, 3, 4] and take(items, 1) == []


def test_distribute_value():
    value = object()
    assert distribute_value(value, cpus(3)) == [value] * 3
    assert run_threads(2, lambda comm: distribute_value(comm.rank, comm)) == [[0], [1]]
