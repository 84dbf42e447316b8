"""A two-layer transformer built by hand on 2 of 4 ranks, while the others do something else.

    mpirun -n 4 python mpi_examples/handmade_transformer.py

Ranks 0 and 1 hold half of the model each and generate token ids with random weights; ranks 2 and 3 estimate pi
meanwhile. Nothing here is started by cutp: it takes the communicator it is given.
"""

import numpy as np
from mpi4py import MPI

from cutp import Communicator
from cutp.nn import (
    MLP,
    AttentionWithRope,
    ColumnParallelLinear,
    DeviceGroup,
    DistributedTransformer,
    DistributedTransformerBlock,
    KVCacheParams,
    RaggedBatch,
    RMSNorm,
    RotaryEmbedding,
    TensorParallelAttentionWithRope,
    VocabParallelEmbedding,
    allocate_caches,
)

DIM, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCAB, LAYERS = 64, 6, 2, 16, 101, 515, 2
FLOAT32 = np.dtype(np.float32)


def build(devices: DeviceGroup) -> DistributedTransformer:
    """The model over `devices`, without weights. Heads, channels and vocabulary need not divide evenly."""
    rope = RotaryEmbedding(HEAD_DIM, max_seq_len=256)

    def block():
        attention = AttentionWithRope(DIM, HEADS, KV_HEADS, HEAD_DIM, FLOAT32, rope)
        return DistributedTransformerBlock(TensorParallelAttentionWithRope(attention, devices), MLP(DIM, FFN, FLOAT32),
                                           RMSNorm(DIM, FLOAT32), RMSNorm(DIM, FLOAT32), devices)

    embedding = VocabParallelEmbedding(VOCAB, DIM, FLOAT32, devices)
    head = ColumnParallelLinear(DIM, VOCAB, FLOAT32, devices, tied_weight=embedding)
    kv_params = KVCacheParams(FLOAT32, HEADS, KV_HEADS, HEAD_DIM, LAYERS, page_size=16)
    return DistributedTransformer(DIM, HEADS, [block() for _ in range(LAYERS)], RMSNorm(DIM, FLOAT32), head, embedding,
                                  kv_params, devices, rope)


def random_arrays(model: DistributedTransformer) -> dict[str, np.ndarray]:
    """A whole array for every weight, equal on all ranks; `load` takes this rank's part of each."""
    rng = np.random.default_rng(0)
    shapes = {name: weight.shape for name, weight in model.named_weights()}
    return {name: np.ones(shape, np.float32) if len(shape) == 1 else
            (rng.standard_normal(shape) / np.sqrt(shape[1])).astype(np.float32) for name, shape in shapes.items()}


def generate(comm: MPI.Intracomm, steps: int = 12) -> list[list[int]]:
    """Greedy continuations of two prompts."""
    with Communicator.from_mpi(comm) as ranks:
        devices = DeviceGroup.of(ranks)
        model = build(devices)
        model.load(random_arrays(model))
        caches = allocate_caches(model.kv_params, 16, devices)
        sequences, new, cached = [[5, 3, 8], [1, 4]], [[5, 3, 8], [1, 4]], [0, 0]
        for _ in range(steps):
            batch = RaggedBatch.of(new, model.kv_params.page_size, cached, max_total=64)
            (logits,) = model(batch, caches)
            cached = [len(sequence) for sequence in sequences]
            new = [[int(token)] for token in logits.argmax(axis=1)]
            sequences = [sequence + token for sequence, token in zip(sequences, new, strict=True)]
        return sequences


def estimate_pi(comm: MPI.Intracomm, samples: int = 1_000_000) -> float:
    """The share of random points of a square that lie in its inscribed circle, times 4."""
    points = np.random.default_rng(comm.rank).random((samples, 2))
    inside = np.array([np.count_nonzero((points**2).sum(axis=1) < 1.0)], np.int64)
    total = np.empty_like(inside)
    comm.Allreduce(inside, total)
    return 4.0 * int(total[0]) / (samples * comm.size)


def main() -> None:
    world = MPI.COMM_WORLD
    group = world.Split(color=0 if world.rank < 2 else 1, key=world.rank)
    if world.rank < 2:
        sequences = generate(group)
        if group.rank == 0:
            print(f"ranks 0 to {group.size - 1}: {sequences}")
    else:
        pi = estimate_pi(group)
        if group.rank == 0:
            print(f"ranks 2 to {1 + group.size}: pi is about {pi:.3f}")
    group.Free()


if __name__ == "__main__":
    main()
