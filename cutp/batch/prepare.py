"""Rank 0's work before and beside the model: the input, the directory, and the records that are still to do."""

from __future__ import annotations

import dataclasses
import json
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from cutp.batch.attempts import OwnAttempt
from cutp.batch.directory import JobDirectory
from cutp.batch.inputs import Line, find_files
from cutp.batch.manifest import Manifest, model_digest, now, read_manifest, tokenizer_digest, versions
from cutp.batch.records import JobDefaults, Record, make_record, read_identity
from cutp.batch.scan import Scan, places, scan_input
from cutp.checkpoint.files import resolve_model
from cutp.errors import ConfigError, RequestError

# Told of a line that is no record: (id, None where there is none; whether it is an OpenAI line; line; error).
OnBadLine = Callable[[str | int | None, bool, Line, RequestError], None]


@dataclass(frozen=True)
class JobOptions:
    """What a job is told. params: sampling parameters that were given, without the seed. engine: dtype and the like."""

    model: str
    inputs: list[str]
    directory: str
    params: dict[str, Any]
    seed: int | None = None
    chat: bool = False
    line_format: str = "auto"
    engine: dict[str, Any] = dataclasses.field(default_factory=dict)
    max_fails: int = 1
    stop_on_error: bool = False
    accept_changes: bool = False
    time_limit: str | None = None
    margin: str | None = None
    interval: float = 30.0


@dataclass
class PreparedJob:
    """A job that has its directory and knows what is left.

    records: all of the input; done, settled: records with a result, and records that failed too often to be tried
    again. pending: whether each record of the input is to be run now, bool [records].
    """

    options: JobOptions
    manifest: Manifest
    attempt: OwnAttempt
    pending: np.ndarray
    done: int
    settled: int

    @property
    def records(self) -> int:
        return len(self.pending)

    def read_records(self, on_bad_line: OnBadLine) -> Iterator[Record]:
        """The records to run, in the order of the input; lines that were added since the job started are left out.

        Raises RequestError when the input cannot be read again, or has become shorter.
        """
        defaults = JobDefaults(self.options.params, self.options.chat, self.manifest.seed)
        files = find_files(self.options.inputs, self.options.line_format)
        index = -1
        for index, (_, line) in enumerate(places(files)):
            if index >= self.records:
                return
            if self.pending[index]:
                identity, openai = None, False
                try:
                    identity, content = read_identity(line)
                    openai = isinstance(content, dict) and "custom_id" in content
                    yield make_record(index, line, identity, content, defaults)
                except RequestError as error:
                    on_bad_line(identity, openai, line, error)
        if index != self.records - 1:
            raise RequestError("the input has changed while the job ran")


def prepare_job(options: JobOptions, facts: dict[str, Any], say: Callable[[str], None]) -> PreparedJob:
    """Reads the input once, takes the directory, and finds what is left to do.

    facts: what the file of this start says beside who it is. Raises RequestError for the input, ConfigError for a job
    that differs from the one in the directory, OutputError for the directory, CheckpointError for the model.
    """
    scan = scan_input(find_files(options.inputs, options.line_format))
    if options.stop_on_error and scan.first_bad is not None:
        raise scan.first_bad
    wanted = _manifest(options, scan)
    directory = JobDirectory(options.directory)
    directory.create()
    # Before a number is taken: what is refused leaves no trace.
    _continued(read_manifest(directory.manifest_path), wanted, options, 0)
    attempt = OwnAttempt(directory.path, {**facts, "versions": versions()}, say)
    try:
        before = read_manifest(directory.manifest_path)
        manifest = _continued(before, wanted, options, attempt.number)
        if manifest != before:
            manifest.write(directory.manifest_path)
        directory.drop_torn_lines(attempt.number, say)
        is_done = np.isin(scan.keys, directory.done_keys(say))
        since = attempt.number if options.stop_on_error else manifest.last_change
        failures = directory.failures(since)
        often = [key for key, count in failures.items() if count >= options.max_fails]
        settled = np.isin(scan.keys, np.array(often, scan.keys.dtype)) & ~is_done
    except BaseException as error:
        attempt.finish({"error": str(error)})
        raise
    return PreparedJob(options, manifest, attempt, ~is_done & ~settled, int(is_done.sum()), int(settled.sum()))


def _manifest(options: JobOptions, scan: Scan) -> Manifest:
    path = resolve_model(options.model)
    parameters = {**options.params, "chat": options.chat, "format": options.line_format, **options.engine}
    seed = secrets.randbits(63) if options.seed is None else options.seed
    return Manifest(scan.files, model_digest(path), tokenizer_digest(path), json.loads(json.dumps(parameters)), seed,
                    now(), versions())


def _continued(before: Manifest | None, wanted: Manifest, options: JobOptions, attempt: int) -> Manifest:
    """The manifest of this start: that of the job which began here, unless a change is accepted."""
    if before is None:
        return wanted
    if options.seed is None:
        wanted = dataclasses.replace(wanted, seed=before.seed)
    differences = before.differences(wanted)
    if not differences:
        return before
    if not options.accept_changes:
        raise ConfigError(f"{options.directory} holds another job: {'; '.join(differences)}",
                          hint="choose another directory, or --accept-changes to keep its results and go on")
    return before.changed_to(wanted, attempt)
