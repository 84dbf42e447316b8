"""Models built by hand as the documentation says: loading by name, continued requests, the example, pydoc."""

import subprocess
import sys
import textwrap

import ml_dtypes
import numpy as np
import pytest

import cutp.nn
from cutp.comm.threads import run_threads
from cutp.errors import ConfigError, MissingTensorError, ShapeMismatchError
from cutp.kv_cache import allocate_caches
from cutp.nn import MLP, Linear, RaggedBatch
from tests.mpirun import clean_environment
from tests.nn import decoder
from tests.nn.building import close, cpus, random_values
from tests.nn.decoder import EVERYTHING, Spec, all_by_hand, build, ends, forward

float32 = np.dtype(np.float32)


# Module.load

@pytest.mark.parametrize("n", (1, 2, 3, 6))
def test_load_gives_each_shard_its_part(n):
    model = build(EVERYTHING, cpus(n))
    values = random_values(model)
    model.load(values)
    close(forward(model)[0], all_by_hand(values, EVERYTHING).logits[ends()], 1e-4)
    for name, weight in model.named_weights():
        assert weight.value.shape == weight.local_shape, name


def test_load_over_a_communicator():
    values = random_values(build(Spec(), cpus(1)))

    def rank_main(comm):
        model = build(Spec(), comm)
        model.load(values)
        return forward(model)[0]

    for got in run_threads(3, rank_main, timeout=20):
        close(got, all_by_hand(values, Spec()).logits[ends()], 1e-4)


def test_load_takes_other_dtypes_lists_and_a_second_time():
    layer = MLP(2, 3, np.dtype(ml_dtypes.bfloat16))
    values = random_values(layer)
    layer.load({name: value.astype(np.float64).tolist() for name, value in values.items()})
    x = np.ones((1, 2), np.float32)
    before = layer(x)
    layer.load({name: value.astype(ml_dtypes.bfloat16) for name, value in values.items()})
    np.testing.assert_array_equal(layer(x), before)
    layer.load({name: 0 * value for name, value in values.items()})
    assert not layer(x).any()


def test_a_tied_weight_is_loaded_under_the_name_of_the_embedding():
    model = build(Spec(tied=True), cpus(2))
    names = {name for name, _ in model.named_weights()}
    assert "embed_tokens.weight" in names and "lm_head.weight" not in names
    values = random_values(model)
    model.load(values)
    close(forward(model)[0], all_by_hand(values, Spec(tied=True)).logits[ends()], 1e-4)
    with pytest.raises(ConfigError, match="no weight is called 'lm_head.weight'"):
        model.load(values | {"lm_head.weight": values["embed_tokens.weight"]})


@pytest.mark.parametrize("n", (1, 3))
def test_errors_of_load(n):
    model = build(Spec(), cpus(n))
    values = random_values(model)
    with pytest.raises(ConfigError, match=r"no weight is called 'layers\.2\.mlp\.up_proj\.weight'.*layers\.1\.mlp\.up"):
        model.load(values | {"layers.2.mlp.up_proj.weight": np.zeros((11, 10))})
    missing = dict(values)
    del missing["layers.1.self_attn.k_proj.weight"]
    with pytest.raises(MissingTensorError, match=r"'layers\.1\.self_attn\.k_proj\.weight'"):
        model.load(missing)
    for shape in ((12, 10), (11, 9), (110,), (10, 11)):
        with pytest.raises(ShapeMismatchError, match=r"'layers\.0\.mlp\.up_proj\.weight' has shape .*not \(11, 10\)"):
            model.load(values | {"layers.0.mlp.up_proj.weight": np.zeros(shape)})
    with pytest.raises(MissingTensorError):
        model.load({})


def test_a_weight_that_is_not_loaded_says_so():
    with pytest.raises(ConfigError, match=r"shape \(3, 2\) was used before it was loaded.*Module\.load"):
        Linear(2, 3, float32)(np.ones((1, 2), np.float32))


# RaggedBatch.of

REQUESTS = ([3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 9, 7])


@pytest.mark.parametrize("cuts", [(1,), (3,), (2, 3), (1, 2, 3, 4, 5, 6)], ids=str)
@pytest.mark.parametrize("max_total", (7, 9, 20))
@pytest.mark.parametrize("n", (1, 2))
def test_chunks_with_growing_cache_lengths_equal_one_shot(n, max_total, cuts):
    model = build(EVERYTHING, cpus(n))
    model.load(values := random_values(model))
    caches = allocate_caches(model.kv_params, 2 * -(-max_total // 3), cpus(n))
    for start, stop in zip((0, *cuts), (*cuts, 7), strict=True):
        chunk = [request[start:stop] for request in REQUESTS]
        (last,) = model(RaggedBatch.of(chunk, 3, [start] * 2, max_total), caches)
    close(last, all_by_hand(values, EVERYTHING, REQUESTS).logits[[6, 13]], 1e-4)


def test_requests_of_different_lengths_continue():
    model = build(Spec(), cpus(1))
    model.load(values := random_values(model))
    caches = allocate_caches(model.kv_params, 6, cpus(1))
    model(RaggedBatch.of([REQUESTS[0][:5], REQUESTS[1][:1]], 3, max_total=7), caches)
    (last,) = model(RaggedBatch.of([REQUESTS[0][5:], REQUESTS[1][1:]], 3, [5, 1], max_total=7), caches)
    close(last, all_by_hand(values, Spec(), REQUESTS).logits[[6, 13]], 1e-4)


def test_a_batch_by_hand():
    batch = RaggedBatch.of([[7, 8], [9]], 4, [3, 0], max_total=6)
    assert batch.tokens.tolist() == [7, 8, 9] and batch.input_row_offsets.tolist() == [0, 2, 3]
    assert batch.lookup_table.tolist() == [[0, 1], [2, 3]] and batch.rope_lengths.tolist() == [6, 6]
    assert batch.positions.tolist() == [3, 4, 0] and batch.slots.tolist() == [3, 4, 8]
    assert RaggedBatch.of([[7] * 9, [1]], 4).lookup_table.tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("args, message", [
    (([[1, 2], [3]], 4, [0]), "for each of the 2 requests"),
    (([[1, 2], [3]], 4, [0, 0, 0]), "for each of the 2 requests"),
    (([[1, 2], [3]], 4, [0, -1]), "number >= 0"),
    (([[1], [3]], 4, [2, 2]), "cache_lengths without max_total"),
    (([[1, 2], [3]], 4, [3, 0], 4), "a request of 5 tokens does not fit into max_total=4"),
])
def test_batches_that_cannot_be(args, message):
    with pytest.raises(ConfigError, match=message):
        RaggedBatch.of(*args)


# The documentation

SIZES = dict(dim=10, n_heads=4, n_kv_heads=2, head_dim=6, ffn=7, vocab_size=11, num_layers=2, num_pages=4)


def test_the_example_of_the_package_runs(monkeypatch):
    lines = cutp.nn.__doc__.splitlines()
    indented = [line for line in lines if line.startswith("    ") or not line.strip()]
    code = textwrap.dedent("\n".join(indented))
    assert "comm = Communicator.single()" in code
    loading = "model.load(arrays)"
    assert code.count(loading) == 1
    before, after = code.split(loading)
    space = dict(SIZES)
    exec(before, space)
    space["arrays"] = random_values(space["model"])
    exec(loading + after, space)
    logits = space["logits"]
    assert logits.shape == (2, 11) and logits.dtype == np.float32
    monkeypatch.setattr(decoder, "EPS", 1e-6)
    monkeypatch.setattr(decoder, "THETA", 10000.0)
    spec = Spec(vocab=11, hidden=10, heads=4, kv_heads=2, head_dim=6, width=7)
    close(logits, all_by_hand(space["arrays"], spec, [[5, 3, 8], [1, 4]]).logits[[2, 4]], 1e-4)


def test_pydoc_shows_what_models_are_built_from():
    done = subprocess.run([sys.executable, "-m", "pydoc", "cutp.nn"], capture_output=True, text=True, timeout=60,
                          env=clean_environment(), check=True)
    page = done.stdout
    for name in cutp.nn.__all__:
        assert name in page, name
    for name in ("DistributedTransformer", "DistributedTransformerBlock", "TensorParallelAttentionWithRope", "MLP",
                 "ColumnParallelLinear", "VocabParallelEmbedding", "ShardingStrategy", "RMSNorm", "RaggedBatch"):
        assert f"class {name}(" in page, name
    for words in ("Logits of the rows that `return_logits` names", "[T, dim]", "ConfigError", "model.load(arrays)"):
        assert words in page, words


def test_everything_public_has_a_docstring():
    for name in cutp.nn.__all__:
        assert getattr(cutp.nn, name).__doc__, name
