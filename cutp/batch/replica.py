"""One replica of the model at work on its records: requests in, result lines out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cutp.batch.journal import Journal
from cutp.batch.records import PLAIN, Record
from cutp.batch.results import ResultWriter, error_line
from cutp.errors import CapacityError, CutpError, OutputError, RequestError

if TYPE_CHECKING:
    from cutp.engine.llm import LLM
    from cutp.engine.outputs import GenerationOutput


class ReplicaWorker:
    """Feeds one LLM and writes what it finishes.

    Every rank of the replica has one and makes the same calls; only its first rank knows the records and has the files
    (`results`, `errors`), so there `done`, `failed` and `outstanding` count. An error in writing is kept in `error`,
    for all ranks to hear of at their next meeting; from then on nothing is written any more.
    """

    def __init__(self, llm: LLM, writer: ResultWriter, results: Journal | None, errors: Journal | None):
        self._llm = llm
        self._writer = writer
        self._results = results
        self._errors = errors
        self._open: dict[int, tuple[Record, list[GenerationOutput]]] = {}
        self.done = 0
        self.failed = 0
        self.error: CutpError | None = None

    @property
    def outstanding(self) -> int:
        return len(self._open)

    def add(self, count: int, records: Sequence[Record]) -> None:
        """Takes `count` records, which are known on the first rank. One that cannot be served becomes an error line."""
        for index in range(count):
            record = records[index] if records else None
            try:
                if record is None:
                    self._llm.add_request()
                    continue
                self._llm.add_request(record.prompt, record.params, request_id=record.index, chat=record.chat)
                self._open[record.index] = (record, [])
            except (RequestError, CapacityError) as error:
                if record is not None:
                    self._fail(record, error)

    def step(self) -> None:
        """One forward pass; writes the lines of the records that it completes."""
        for event in self._llm.step():
            if event.output is None or event.index not in self._open:
                continue
            record, outputs = self._open[event.index]
            outputs.append(event.output)
            if len(outputs) == record.params.n:
                del self._open[event.index]
                outputs.sort(key=lambda output: output.sample_index)
                if self._write(self._results, self._writer.line(record, outputs)):
                    self.done += 1

    def write_error(self, line: dict) -> None:
        """Writes one error record."""
        if self._write(self._errors, line):
            self.failed += 1

    def sync(self) -> None:
        """Forces all lines to disk."""
        for journal in (self._results, self._errors):
            if journal is not None and self.error is None:
                try:
                    journal.sync()
                except OutputError as error:
                    self.error = error

    def _fail(self, record: Record, error: CutpError) -> None:
        # The engine calls the only prompt of a call "prompt 0".
        message = f"{record.where}: {error.message.replace('prompt 0', 'the prompt', 1)}"
        named = type(error)(message, hint=error.hint)
        self.write_error(error_line(record.id, record.kind != PLAIN, None, named))

    def _write(self, journal: Journal | None, line: dict) -> bool:
        if self.error is not None:
            return False
        try:
            journal.append(line)
        except OutputError as error:
            self.error = error
            return False
        return True
