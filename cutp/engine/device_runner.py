"""`ModelRunner` on a GPU: passes as `DevicePass` runs them, and plain decoding by graphs, ahead of the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cutp.array.scratch import Memory
from cutp.comm.communicator import Communicator
from cutp.engine.block_tables import BlockTables
from cutp.engine.decode_graphs import DecodeGraphs, batch_size
from cutp.engine.device_pass import DevicePass
from cutp.engine.device_sampler import DeviceSampler
from cutp.engine.pending_tokens import PendingTokens
from cutp.engine.scheduler import Chunk
from cutp.kv_cache.paged import PagedKVCache
from cutp.nn.distributed_transformer import DistributedTransformer


class DeviceRunner(DevicePass):
    """The model, its cache and its communicator on one GPU, for an engine.

    max_running: requests of one pass at most. max_pages, multiprocessors, batch_invariant: see `DevicePass`.
    use_graphs: whether plain decoding is captured; the results do not depend on it.
    """

    def __init__(self, model: DistributedTransformer, cache: PagedKVCache, comm: Communicator, memory: Memory,
                 stream: Any, *, max_running: int, max_pages: int, multiprocessors: int, use_graphs: bool = True,
                 batch_invariant: bool = False):
        # Captured batches are padded to their size.
        super().__init__(model, cache, comm, memory, stream, max_decodes=batch_size(max_running), max_pages=max_pages,
                         multiprocessors=multiprocessors, batch_invariant=batch_invariant)
        # Tables of such embeddings are made anew for every batch, which a captured graph cannot do.
        self._cannot_replay = any(rope.length_dependent for rope in self.shape.ropes)
        self._decode_limits = max_running, max_pages, use_graphs
        self._graphs: DecodeGraphs | None = None

    def start_decode(self, chunks: Sequence[Chunk], tables: BlockTables, sampler: DeviceSampler,
                     before: PendingTokens | None = None) -> PendingTokens | None:
        requests = [chunk.request for chunk in chunks]
        if before is not None and before.requests != requests:
            return None
        if self._cannot_replay or not all(map(_adds_one_token, chunks)) or not sampler.is_plain(requests):
            return None
        if self._graphs is None:
            self._graphs = DecodeGraphs(self, sampler, *self._decode_limits)
        return self._graphs.start(requests, tables, before)

    def close(self) -> None:
        """Gives up the captured graphs."""
        if self._graphs is not None:
            self._graphs.close()
            self._graphs = None


def _adds_one_token(chunk: Chunk) -> bool:
    """Whether the chunk is the last token of a request that generates and wants nothing else of it."""
    request, start, stop = chunk
    return stop - start == 1 and bool(request.generated) and chunk.completes
