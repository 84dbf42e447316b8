"""Decoding by CUDA graphs: the model and the draw of the next tokens, captured once a batch size, replayed each step.

The inputs of a step (last tokens, positions, slots, lengths, sampling parameters) lie side by side in one static
buffer, which one copy fills; the block tables lie in another, of which only rows that changed are copied.
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
from cutp.ops.sampling_cuda import SamplingArrays, SamplingBuffers, buffer_shapes, greedy, passes_needed, sample

_GREEDY = -1
_FIELDS = {"tokens": np.int64, "positions": np.int64, "slots": np.int64, "seed": np.uint64, "sample_index": np.int64,
           "position": np.int64, "kv_lengths": np.int32, "top_k": np.int32, "temperature": np.float32,
           "top_p": np.float32, "min_score": np.float32}
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
        size = sum(np.dtype(kind).itemsize for kind in _FIELDS.values()) * self._rows
        # Two of each on the host: one may still be on its way while the next is filled.
        self._hosts = [memory.pinned(size) for _ in range(2)]
        self._host_fields = [self._views(host) for host in self._hosts]
        self._host_tokens = [memory.pinned(8 * self._rows).view(np.int64) for _ in range(2)]
        self._turn = 0
        self._inputs = memory.empty(size, np.uint8)
        self._fields = self._views(self._inputs)
        self._host_table = np.zeros((self._rows, max_pages), np.int32)
        self._table = memory.empty(self._host_table.shape, np.int32)
        self._table[...] = 0
        self._tokens = memory.empty(self._rows, np.int64)
        self._buffers: dict[int, SamplingBuffers] = {}
        self._graphs: dict[tuple[int, int], Graph] = {}

    def start(self, requests: Sequence[Request], tables: BlockTables,
              before: PendingTokens | None = None) -> PendingTokens:
        """Starts a step of these requests, one pending token each, which go into the cache.

        before: the step before, of the same requests, whose tokens are the pending ones and may not have arrived.
        """
        self._turn = 1 - self._turn
        kind = self._fill(requests, tables, before is not None)
        count, size = len(requests), batch_size(len(requests))
        if before is not None:
            self._fields["tokens"][:count] = self._tokens[:count]
        graph = self._graphs.get((size, kind))
        if graph is not None:
            graph.launch()
        else:
            with self._runner.scratch.frame():
                self._launch(size, kind)  # loads the kernels, and computes this step
            if self._use_graphs:
                self._graphs[size, kind] = self._captured(size, kind)
        host = self._host_tokens[self._turn][:count]
        return PendingTokens(list(requests), host, self._runner.memory.download(host, self._tokens[:count]),
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

    def _fill(self, requests: Sequence[Request], tables: BlockTables, tokens_follow: bool) -> int:
        """Uploads the inputs of a step; returns the kind of draw it needs. tokens_follow: the tokens are not known."""
        count, size = len(requests), batch_size(len(requests))
        fields, page_size = self._host_fields[self._turn], self._runner.cache.params.page_size
        rows = self._sampler.rows(requests)
        lengths = rows.position  # what is known, the pending token included
        table = tables.lookup_table(requests)
        last = lengths - 1
        if not tokens_follow:
            fields["tokens"][:count] = [request.tokens(request.length - 1, request.length)[0] for request in requests]
        fields["positions"][:count] = last
        fields["slots"][:count] = table[np.arange(count), last // page_size].astype(np.int64) * page_size \
            + last % page_size
        fields["kv_lengths"][:count] = lengths
        with np.errstate(divide="ignore"):
            fields["min_score"][:count] = np.log(rows.min_p.astype(np.float64))
        for name in _SAMPLING:
            if name != "min_score":
                fields[name][:count] = getattr(rows, name)
        # Padding: rows that are not in use for any kernel.
        for name, value in (("tokens", 0), ("positions", 0), ("slots", -1), ("kv_lengths", 0), ("temperature", -1.0)):
            fields[name][count:size] = value
        self._runner.memory.upload(self._inputs, self._hosts[self._turn])
        self._upload_table(table)
        drawn = (rows.temperature > 0).any()
        return passes_needed(rows) if drawn else _GREEDY

    def _upload_table(self, table: np.ndarray) -> None:
        count, width = table.shape
        changed = np.flatnonzero((self._host_table[:count, :width] != table).any(axis=1))
        self._host_table[:count, :width] = table
        for row in changed:
            self._runner.memory.upload(self._table[row, :width], self._host_table[row, :width])

    def _launch(self, size: int, kind: int) -> None:
        """One step of the first `size` rows on the current stream: model and draw."""
        runner, fields = self._runner, {name: values[:size] for name, values in self._fields.items()}
        batch = DeviceBatch(
            tokens=fields["tokens"], positions=fields["positions"], slots=fields["slots"],
            lookup_table=self._table[:size], page_size=runner.cache.params.page_size, shape=runner.shape,
            workspace=runner.workspace, decode_count=size, kv_lengths=fields["kv_lengths"],
        )
        batch.prepare(runner.frequencies, runner.dtype)
        logits = runner.model.all_local_logits(runner.model.hidden_states(batch, [runner.cache]))[0]
        arrays = SamplingArrays(**{name: fields[name] for name in _SAMPLING})
        buffers = self._sampling_buffers(size, logits.shape[1])
        arguments = logits, runner.vocab_start, arrays, buffers, runner.scores.gather
        if kind == _GREEDY:
            greedy(*arguments, tokens=self._tokens[:size], pdl=True)
        else:
            sample(*arguments, tokens=self._tokens[:size], passes=kind, pdl=True)

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
        return views

