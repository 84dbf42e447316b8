"""Decoding by CUDA graphs: the model and the draw of the next tokens, captured once a batch size, replayed each step.

The rows of a batch (last tokens, lengths, sampling parameters) lie on the device, side by side in one static buffer. A
step leaves there what the next one of the same requests begins with, and its tokens in memory of the host: between two
steps there is neither a copy nor anything to wait for. Other requests come by one copy. The block tables lie in another
buffer, of which only rows that changed are copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cutp.array.graph import Graph, capture
from cutp.engine.block_tables import BlockTables
from cutp.engine.device_pass import DevicePass
from cutp.engine.device_sampler import DeviceSampler
from cutp.engine.pending_tokens import PendingTokens
from cutp.engine.request import Request
from cutp.nn.device_batch import DeviceBatch
from cutp.ops.decode_rows_cuda import advance_rows, publish_tokens
from cutp.ops.sampling_cuda import SamplingArrays, SamplingBuffers, buffer_shapes, greedy, passes_needed, sample

_GREEDY = -1
# Of a row. position: that of the token to be drawn, which is also the number of tokens before it.
_FIELDS = {"tokens": np.int64, "seed": np.uint64, "sample_index": np.int64, "position": np.int64, "top_k": np.int32,
           "temperature": np.float32, "top_p": np.float32, "min_score": np.float32}
_TURN_BYTES = 4  # which of the two places for tokens comes next, behind the fields
_SAMPLING = ("temperature", "top_k", "top_p", "min_score", "seed", "sample_index", "position")


def batch_size(count: int) -> int:
    """The size of the captured batch that `count` requests run in: a power of two up to 16, a multiple of 16 beyond."""
    return 1 << (count - 1).bit_length() if count <= 16 else -(-count // 16) * 16


class DecodeGraphs:
    """Steps in which every request adds one token and its next one is drawn from plain logits.

    A step can be started before the tokens of the one before it have arrived on the host, with the same requests in the
    same rows: it finds them on the device.

    use_graphs: False runs the same launches one by one, with the same results.
    """

    def __init__(self, runner: DevicePass, sampler: DeviceSampler, max_running: int, max_pages: int,
                 use_graphs: bool = True):
        self._runner, self._sampler = runner, sampler
        self._use_graphs = use_graphs
        self._rows = batch_size(max_running)
        memory = runner.memory
        size = sum(np.dtype(kind).itemsize for kind in _FIELDS.values()) * self._rows + _TURN_BYTES
        # Two of each on the host: one may still be on its way while the next is filled.
        self._hosts = [memory.pinned(size) for _ in range(2)]
        self._host_fields = [self._views(host) for host in self._hosts]
        published, self._published = memory.mapped(2 * 8 * self._rows)
        self._host_tokens = published.view(np.int64).reshape(2, self._rows)
        self._published = self._published.view(np.int64).reshape(2, self._rows)
        self._turn, self._kind = 0, _GREEDY
        self._inputs = memory.empty(size, np.uint8)
        self._fields = self._views(self._inputs)
        self._positions, self._slots = (memory.empty(self._rows, np.int64) for _ in range(2))
        self._kv_lengths = memory.empty(self._rows, np.int32)
        self._host_table = np.zeros((self._rows, max_pages), np.int32)
        self._table = memory.empty(self._host_table.shape, np.int32)
        self._table[...] = 0
        self._buffers: dict[int, SamplingBuffers] = {}
        self._graphs: dict[tuple[int, int], Graph] = {}

    def start(self, requests: Sequence[Request], tables: BlockTables,
              before: PendingTokens | None = None) -> PendingTokens:
        """Starts a step of these requests, one pending token each, which go into the cache.

        before: the step before, of the same requests, whose tokens are the pending ones and may not have arrived.
        """
        self._turn = 1 - self._turn
        count, size = len(requests), batch_size(len(requests))
        if before is None:
            self._kind = self._fill(requests)
        self._upload_table(tables.lookup_table(requests))
        graph = self._graphs.get((size, self._kind))
        if graph is not None:
            graph.launch()
        else:
            with self._runner.scratch.frame():
                self._launch(size, self._kind)  # loads the kernels, and computes this step
            if self._use_graphs:
                self._graphs[size, self._kind] = self._captured(size, self._kind)
        return PendingTokens(list(requests), self._host_tokens[self._turn, :count], self._runner.memory.mark(),
                             self._runner.comm)

    def close(self) -> None:
        """Gives up the graphs."""
        for graph in self._graphs.values():
            graph.close()
        self._graphs.clear()

    def _captured(self, size: int, kind: int) -> Graph:
        with self._runner.scratch.frame(), capture(self._runner.stream) as graph:
            self._launch(size, kind)
        return graph

    def _fill(self, requests: Sequence[Request]) -> int:
        """Uploads the rows of a step; returns the kind of draw they need."""
        count, size = len(requests), batch_size(len(requests))
        fields = self._host_fields[self._turn]
        rows = self._sampler.rows(requests)
        fields["tokens"][:count] = [request.tokens(request.length - 1, request.length)[0] for request in requests]
        with np.errstate(divide="ignore"):
            fields["min_score"][:count] = np.log(rows.min_p.astype(np.float64))
        for name in _SAMPLING:
            if name != "min_score":
                fields[name][:count] = getattr(rows, name)
        fields["position"][:count] -= 1  # the step begins by counting the pending token
        # Padding: rows that are not in use for any kernel.
        fields["tokens"][count:size], fields["temperature"][count:size] = 0, -1.0
        fields["turn"][0] = self._turn
        self._runner.memory.upload(self._inputs, self._hosts[self._turn])
        drawn = (rows.temperature > 0).any()
        return passes_needed(rows) if drawn else _GREEDY

    def _upload_table(self, table: np.ndarray) -> None:
        count, width = table.shape
        changed = np.flatnonzero((self._host_table[:count, :width] != table).any(axis=1))
        self._host_table[:count, :width] = table
        for row in changed:
            self._runner.memory.upload(self._table[row, :width], self._host_table[row, :width])

    def _launch(self, size: int, kind: int) -> None:
        """One step of the first `size` rows on the current stream: model and draw, and what the next step needs."""
        runner, fields = self._runner, {name: self._fields[name][:size] for name in _FIELDS}
        batch = DeviceBatch(
            tokens=fields["tokens"], positions=self._positions[:size], slots=self._slots[:size],
            lookup_table=self._table[:size], page_size=runner.cache.params.page_size, shape=runner.shape,
            workspace=runner.workspace, decode_count=size, kv_lengths=self._kv_lengths[:size],
        )
        advance_rows(fields["position"], fields["temperature"], batch.lookup_table, batch.page_size,
                     positions=batch.positions, slots=batch.slots, kv_lengths=batch.kv_lengths, pdl=True)
        batch.prepare(runner.frequencies, runner.dtype)
        logits = runner.model.all_local_logits(runner.model.hidden_states(batch, [runner.cache]))[0]
        arrays = SamplingArrays(**{name: fields[name] for name in _SAMPLING})
        buffers = self._sampling_buffers(size, logits.shape[1])
        arguments = logits, runner.vocab_start, arrays, buffers, runner.scores.gather
        if kind == _GREEDY:
            greedy(*arguments, tokens=fields["tokens"], pdl=True)
        else:
            sample(*arguments, tokens=fields["tokens"], passes=kind, pdl=True)
        publish_tokens(fields["tokens"], self._fields["turn"], self._published, pdl=True)

    def _sampling_buffers(self, size: int, columns: int) -> SamplingBuffers:
        if size not in self._buffers:
            memory, shapes = self._runner.memory, buffer_shapes(size, columns)
            arrays = {name: memory.empty(*shape) for name, shape in shapes.items() if name != "histograms"}
            arrays["tickets"][...] = 0
            self._buffers[size] = SamplingBuffers(
                **arrays, histograms=tuple(memory.empty(*shape) for shape in shapes["histograms"]))
        return self._buffers[size]

    def _views(self, buffer: Any) -> dict[str, Any]:
        views, start = {}, 0
        for name, kind in _FIELDS.items():
            stop = start + np.dtype(kind).itemsize * self._rows
            views[name] = buffer[start:stop].view(kind)
            start = stop
        views["turn"] = buffer[start:].view(np.int32)
        return views

