"""Runs chunks of requests through the model: builds the ragged batch, picks the rows that need logits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cutp.comm.communicator import Communicator
from cutp.engine.scheduler import Chunk
from cutp.kv_cache.paged import PagedKVCache
from cutp.nn.distributed_transformer import DistributedTransformer
from cutp.nn.ragged_batch import RaggedBatch
from cutp.ops.logprobs import target_logprobs

# Logits held at once while a prompt is scored: 2**24 float32 values, 64 MB, whatever the vocabulary.
_MAX_LOGITS = 1 << 24


class ModelRunner:
    """The model, its cache and its communicator: one forward pass at a time."""

    def __init__(self, model: DistributedTransformer, cache: PagedKVCache, comm: Communicator):
        self.model = model
        self.cache = cache
        self.comm = comm

    @property
    def vocab_start(self) -> int:
        return self.model.lm_head.starts[0]

    def run(self, chunks: Sequence[Chunk]) -> list[np.ndarray]:
        """The hidden states of all tokens of `chunks`, ragged, before the final norm; fills the cache."""
        return self.model.hidden_states(self._batch(chunks), [self.cache])

    def logits(self, hidden: list[np.ndarray], rows: np.ndarray) -> np.ndarray:
        """This rank's slice of the logits of `rows`, float32 [R, V_local]."""
        return self.model.local_logits(hidden, rows)[0]

    def target_logprobs(self, hidden: list[np.ndarray], rows: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """log p(targets[i]) at rows[i], float32 [R]; the logits are made and dropped a block at a time."""
        block = max(1, _MAX_LOGITS // max(1, self.model.vocab_size // self.comm.size))
        parts = [target_logprobs(self.logits(hidden, rows[i : i + block]), self.vocab_start, targets[i : i + block],
                                 self.comm)[0] for i in range(0, len(rows), block)]
        return np.concatenate(parts) if parts else np.empty(0, np.float32)

    def _batch(self, chunks: Sequence[Chunk]) -> RaggedBatch:
        lengths = [chunk.stop - chunk.start for chunk in chunks]
        lookup_table = np.zeros((len(chunks), max(len(chunk.request.pages) for chunk in chunks)), np.int64)
        for row, chunk in zip(lookup_table, chunks, strict=True):
            row[: len(chunk.request.pages)] = chunk.request.pages
        return RaggedBatch(
            tokens=np.concatenate([chunk.request.tokens(chunk.start, chunk.stop) for chunk in chunks]).astype(np.int64),
            input_row_offsets=np.concatenate([[0], np.cumsum(lengths)]),
            cache_lengths=np.array([chunk.start for chunk in chunks]),
            lookup_table=lookup_table,
            page_size=self.cache.params.page_size,
            rope_lengths=np.array([chunk.request.max_total for chunk in chunks]),
        )
