"""One forward pass on a GPU: batches are uploaded, layers compute in scratch memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import Any

import numpy as np

from cutp.array.scratch import Memory, Scratch
from cutp.comm.communicator import Communicator
from cutp.engine.block_tables import BlockTables
from cutp.engine.device_scores import DeviceScores
from cutp.engine.runner import MAX_LOGITS, ModelRunner, Scored
from cutp.engine.scheduler import Chunk
from cutp.kv_cache.paged import PagedKVCache
from cutp.nn.device_batch import RotaryTables, attention_shape, upload_batch
from cutp.nn.distributed_transformer import DistributedTransformer
from cutp.ops.dispatch import row_invariant


class DevicePass(ModelRunner):
    """The model, its cache and its communicator on one GPU. Everything is started on `stream`.

    max_decodes: requests of one pass that add one token, at most. max_pages: pages of one request at most.
    multiprocessors: of the GPU. batch_invariant: the bits of a request do not depend on the requests beside it, nor on
    how its prompt is divided into chunks.
    """

    def __init__(self, model: DistributedTransformer, cache: PagedKVCache, comm: Communicator, memory: Memory,
                 stream: Any, *, max_decodes: int, max_pages: int, multiprocessors: int, batch_invariant: bool = False):
        super().__init__(model, cache, comm)
        self.memory = memory
        self.stream = stream
        self.scratch = Scratch(memory)
        self.dtype = cache.blocks[0].dtype
        self.shape = attention_shape((layer.self_attn.shards[0] for layer in model.layers), cache.params)
        self.workspace = self.shape.workspace(memory, max_decodes, max_pages, cache.params.page_size, multiprocessors,
                                              self.dtype, batch_invariant)
        self.batch_invariant = batch_invariant
        self.frequencies = RotaryTables(memory)
        self.scores = DeviceScores(memory, comm)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Everything of one step happens inside: what it computes stays until its end."""
        with self.stream, self.scratch.use(), row_invariant(self.batch_invariant):
            yield

    def run(self, chunks: Sequence[Chunk], tables: BlockTables, layers: Sequence[int] = ()) -> tuple[list, list]:
        last = len(self.model.layers)
        streams = dict.fromkeys(layer for layer in layers if layer != last)
        tokens: list[int] = []
        for chunk in chunks:
            tokens.extend(chunk.request.tokens(chunk.start, chunk.stop))
        # A prompt's last token may be a chunk of its own, but all of a prompt goes through one kernel.
        generating = takewhile(lambda chunk: bool(chunk.request.generated), chunks)
        decodes = sum(1 for _ in generating) if self.batch_invariant else None
        batch = upload_batch(
            self.memory, self.shape, self.workspace, tokens,
            np.array([chunk.stop - chunk.start for chunk in chunks]), np.array([chunk.start for chunk in chunks]),
            tables.lookup_table([chunk.request for chunk in chunks]), self.cache.params.page_size,
            np.array([chunk.request.max_total for chunk in chunks]), decodes,
        )
        batch.prepare(self.frequencies, self.dtype)
        hidden = self.model.hidden_states(batch, [self.cache], streams)
        if last in layers:
            streams[last] = self.model.normed(hidden)[0]
        return hidden, [self.scores.fetched(streams[layer]) for layer in layers]

    def logits(self, hidden: list, rows: np.ndarray) -> Any:
        return self.model.local_logits(hidden, self.scores.uploaded(rows, np.int64))[0]

    def prompt_logprobs(self, hidden: list, rows: np.ndarray, targets: np.ndarray, top: int) -> list[Scored]:
        block = max(1, MAX_LOGITS // max(1, self.model.vocab_size // self.comm.size))
        scored: list[Scored] = []
        for i in range(0, len(rows), block):
            with self.scratch.frame():
                logits = self.logits(hidden, rows[i : i + block])
                scored += self.scores.logprobs(logits, self.vocab_start, targets[i : i + block], top)
        return scored
