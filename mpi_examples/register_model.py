"""A model architecture of one's own, registered from outside of cutp, generates from a checkpoint with its names.

    mpirun -n 3 python mpi_examples/register_model.py

The architecture has attention and feed-forward side by side, LayerNorms, and layers that take turns: a window with
rotary positions, then everything without positions. `build` says so once; dividing it over the ranks is not its
concern. The checkpoint is tiny and random, in the files that every Hugging Face model has.
"""

import json
import struct
import tempfile
from pathlib import Path

import numpy as np
from mpi4py import MPI

from cutp import LLM, Communicator, SamplingParams
from cutp.checkpoint import ModelConfig
from cutp.models.decoder import DecoderBuilder
from cutp.models.decoder_config import DecoderConfig
from cutp.models.registry import ModelFamily, register
from cutp.nn import DeviceGroup, LayerNorm

CONFIG = {"architectures": ["TurnsForCausalLM"], "model_type": "turns", "vocab_size": 131, "hidden_size": 60,
          "intermediate_size": 90, "num_hidden_layers": 4, "num_attention_heads": 5, "num_key_value_heads": 1,
          "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "window": 6}


def build(config, devices, dtype, page_size):
    """The model that `config` describes, over `devices`, without weights."""
    c = DecoderConfig.read(config)
    make = DecoderBuilder(c, devices, dtype, page_size, norm=lambda dim: LayerNorm(dim, dtype, c.rms_norm_eps))
    rope, window = make.rope(), config.positive_int("window")

    def layer(i):
        attention = make.attention(rope, window=window) if i % 2 == 0 else make.attention(None)
        return make.block(attention, make.mlp(), parallel=True)

    return make.model(layer, rope=rope)


def checkpoint_name(name: str) -> str:
    """layers.0.mlp.up_proj.weight -> decoder.layers.0.mlp.up_proj.weight; all weights have this prefix."""
    return f"decoder.{name}"


FAMILY = ModelFamily("TurnsForCausalLM", "turns", DecoderConfig.read, build, checkpoint_name)


def write_checkpoint(directory: Path) -> None:
    """config.json and model.safetensors, with random weights of the shapes that `build` asks for."""
    (directory / "config.json").write_text(json.dumps(CONFIG))
    model = build(ModelConfig(CONFIG), DeviceGroup.planned(1, 0), np.dtype(np.float32), 64)
    rng, header, data = np.random.default_rng(0), {}, b""
    for name, weight in model.named_weights():
        values = rng.standard_normal(weight.shape) * (2 / np.sqrt(weight.shape[-1]) if len(weight.shape) > 1 else 1)
        start, data = len(data), data + values.astype("<f4").tobytes()
        header[checkpoint_name(name)] = {"dtype": "F32", "shape": weight.shape, "data_offsets": [start, len(data)]}
    head = json.dumps(header).encode()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + data)


def generate(comm: Communicator, directory: Path) -> list[int]:
    register(FAMILY)  # on every rank, before the LLM is made
    with LLM(directory, comm=comm) as llm:
        [output] = llm.generate([[5, 3, 8]], SamplingParams(max_tokens=16, temperature=0.0))
        return list(output.token_ids)


def main() -> None:
    with Communicator.from_mpi(MPI.COMM_WORLD) as comm, tempfile.TemporaryDirectory() as own:
        # Rank 0's directory is for all; on several hosts it would have to be one that they share.
        directory = Path(comm.host.broadcast_json(own))
        if comm.rank == 0:
            write_checkpoint(directory)
        comm.barrier()
        tokens = generate(comm, directory)
        if comm.rank == 0:
            print(f"{comm.size} ranks: {tokens}")
        comm.barrier()


if __name__ == "__main__":
    main()
