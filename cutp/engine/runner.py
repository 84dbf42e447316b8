"""Runs chunks of requests through the model: builds the ragged batch, picks the rows that need logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from cutp.comm.communicator import Communicator
from cutp.comm.partition import split_range
from cutp.engine.block_tables import BlockTables
from cutp.engine.pending_tokens import PendingTokens
from cutp.engine.sampler import Sampler
from cutp.engine.scheduler import Chunk
from cutp.kv_cache.paged import PagedKVCache
from cutp.nn.distributed_transformer import DistributedTransformer
from cutp.nn.ragged_batch import RaggedBatch
from cutp.ops.logprobs import target_logprobs, top_logprobs

# Logits held at once while a prompt is scored: 2**24 float32 values, 64 MB, whatever the vocabulary.
MAX_LOGITS = 1 << 24

Scored = tuple[float, bool, list[tuple[int, float]]]


class ModelRunner:
    """The model, its cache and its communicator: one forward pass at a time."""

    def __init__(self, model: DistributedTransformer, cache: PagedKVCache, comm: Communicator):
        self.model = model
        self.cache = cache
        self.comm = comm

    @contextmanager
    def step(self) -> Iterator[None]:
        """Everything of one step happens inside."""
        yield

    def close(self) -> None:
        """Gives up what it holds beside the model and the cache."""

    @property
    def vocab_start(self) -> int:
        """The first token id of this rank's slice of the vocabulary."""
        return self.model.lm_head.starts[0]

    @property
    def vocab_stop(self) -> int:
        """One more than the last token id of the slice."""
        return split_range(self.model.vocab_size, self.comm.size, self.comm.rank)[1]
    def run(self, chunks: Sequence[Chunk], tables: BlockTables,
            layers: Sequence[int] = ()) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """(hidden states of all tokens of `chunks`, ragged, before the final norm; those of `layers`, [T, dim] each).

        Fills the cache. layers: in the numbering of `HiddenStatesOutput`.
        """
        last = len(self.model.layers)
        streams = dict.fromkeys(layer for layer in layers if layer != last)
        hidden = self.model.hidden_states(self._batch(chunks, tables), [self.cache], streams)
        if last in layers:
            streams[last] = self.model.normed(hidden)[0]
        return hidden, [streams[layer] for layer in layers]

    def start_decode(self, chunks: Sequence[Chunk], tables: BlockTables, sampler: Sampler,
                     before: PendingTokens | None = None) -> PendingTokens | None:
        """Starts a step that does nothing but add one token to each request, where this runner can do that ahead of
        the host; None otherwise, and nothing is done.

        before: a step that was started and whose tokens, the pending ones of `chunks`, are not known yet.
        """
        return None

    def logits(self, hidden: list[np.ndarray], rows: np.ndarray) -> np.ndarray:
        """This rank's slice of the logits of `rows`, float32 [R, V_local]."""
        return self.model.local_logits(hidden, rows)[0]

    def prompt_logprobs(self, hidden: list[np.ndarray], rows: np.ndarray, targets: np.ndarray,
                        top: int) -> list[Scored]:
        """(log p(targets[i]) at rows[i], whether it is the likeliest token, the `top` likeliest ones there), equal on
        all ranks.

        The logits are made and dropped a block at a time, whatever the number of rows and the vocabulary.
        """
        block = max(1, MAX_LOGITS // max(1, self.model.vocab_size // self.comm.size))
        scored: list[Scored] = []
        for i in range(0, len(rows), block):
            logits = self.logits(hidden, rows[i : i + block])
            values, greedy = target_logprobs(logits, self.vocab_start, targets[i : i + block], self.comm)
            likeliest: list[list[tuple[int, float]]] = [[]] * len(values)
            if top:
                ids, tops = top_logprobs(logits, self.vocab_start, top, self.comm)
                likeliest = [[(token, value) for token, value in zip(*row, strict=True) if token >= 0]
                             for row in zip(ids.tolist(), tops.tolist(), strict=True)]
            scored.extend(zip(values.tolist(), greedy.tolist(), likeliest, strict=True))
        return scored

    def _batch(self, chunks: Sequence[Chunk], tables: BlockTables) -> RaggedBatch:
        tokens: list[int] = []
        starts, offsets, reach = [], [0], []
        for chunk in chunks:
            tokens.extend(chunk.request.tokens(chunk.start, chunk.stop))
            starts.append(chunk.start)
            offsets.append(len(tokens))
            reach.append(chunk.request.max_total)
        return RaggedBatch(
            tokens=np.array(tokens, np.int64),
            input_row_offsets=np.array(offsets, np.int64),
            cache_lengths=np.array(starts, np.int64),
            lookup_table=tables.lookup_table([chunk.request for chunk in chunks]),
            page_size=self.cache.params.page_size,
            rope_lengths=np.array(reach, np.int64),
        )
