"""The directory of a job, and what its files say: which records are done, which failed, and how often.

    manifest.json                    what the job is
    attempt-<a>.jsonl                one file for every start, see `attempts`
    part-<replica>.<a>.jsonl         results; a line that is there whole is the mark that its record is done
    errors.<replica>.<a>.jsonl       records that could not be served
    metrics.<replica>.<a>.jsonl      a line every so often
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cutp.batch.attempts import read_attempts
from cutp.batch.journal import cannot_write, drop_torn_line, read_journal
from cutp.batch.manifest import Manifest, read_manifest
from cutp.batch.records import key_of
from cutp.batch.scan import KEY
from cutp.errors import OutputError

_FILE = re.compile(r"(part-|errors\.|metrics\.)(\d+)\.(\d+)\.jsonl")
_KINDS = {"part": "part-", "errors": "errors.", "metrics": "metrics."}


class JobDirectory:
    """The files of one job; nothing is kept in memory but the path."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)

    @property
    def manifest_path(self) -> Path:
        return self.path / "manifest.json"

    def create(self) -> None:
        """Makes the directory. Raises OutputError when it cannot, or when it holds something else."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(self.path, error) from None
        if not self.manifest_path.exists() and (self.files("part") or self.files("errors")):
            raise OutputError(f"{self.path} holds results but no manifest.json",
                              hint="restore it, or choose another directory")

    def manifest(self) -> Manifest:
        """The manifest of a job that has begun; OutputError when there is none."""
        manifest = read_manifest(self.manifest_path)
        if manifest is None:
            raise OutputError(f"{self.path} is not the directory of a batch job: it has no manifest.json")
        return manifest

    def file(self, kind: str, replica: int, attempt: int) -> Path:
        """The file of one kind ("part", "errors", "metrics")."""
        return self.path / f"{_KINDS[kind]}{replica}.{attempt}.jsonl"

    def files(self, kind: str) -> list[tuple[int, Path]]:
        """(attempt, path) of all files of one kind, earlier starts first."""
        try:
            names = os.listdir(self.path)
        except OSError as error:
            raise OutputError(f"{self.path} cannot be read: {error.strerror or error}") from None
        found = [match for match in map(_FILE.fullmatch, names) if match and match[1] == _KINDS[kind]]
        found.sort(key=lambda match: (int(match[3]), int(match[2])))
        return [(int(match[3]), self.path / match[0]) for match in found]

    def drop_torn_lines(self, before: int, say: Callable[[str], None]) -> None:
        """Ends the files of earlier starts with a whole line, so that other programs can read them too."""
        for kind in _KINDS:
            for attempt, path in self.files(kind):
                dropped = drop_torn_line(path) if attempt < before else 0
                if dropped:
                    say(f"{path.name} ended in a torn line; {dropped} bytes are dropped")

    def results(self, say: Callable[[str], None] = lambda _: None) -> Iterator[tuple[bytes, Path, int, int]]:
        """(key, file, offset, length) of every result line. Of several with one key the first counts.

        say: told about a line in the middle of a file that is no result, so that its record runs again.
        """
        for _, path in self.files("part"):
            for number, (offset, length, value) in enumerate(read_journal(path), 1):
                identity = _identity(value)
                if identity is None:
                    say(f"line {number} of {path} is damaged and left out")
                else:
                    yield key_of(identity), path, offset, length

    def done_keys(self, say: Callable[[str], None] = lambda _: None) -> np.ndarray:
        """Keys of the records that are done, sorted, each once: KEY [n]."""
        return np.unique(np.frombuffer(b"".join(key for key, *_ in self.results(say)), KEY))

    def errors(self) -> Iterator[tuple[bytes, int, dict[str, Any]]]:
        """(key, attempt, error line) of every error record."""
        for attempt, path in self.files("errors"):
            for _, _, value in read_journal(path):
                key = error_key(value)
                if key is not None:
                    yield key, attempt, value

    def failures(self, since: int = 1) -> Counter[bytes]:
        """How often each record failed, in starts from `since` on."""
        return Counter(key for key, attempt, _ in self.errors() if attempt >= since)

    def attempts(self):
        return read_attempts(self.path)


def error_key(value: dict[str, Any] | None) -> bytes | None:
    """The key of the record that an error line is about; None for a line that is no error record."""
    if value is None or not isinstance(value.get("error"), dict):
        return None
    identity = _identity(value)
    if identity is None:
        identity = [value.get("file"), value.get("line")]
    return key_of(identity)


def _identity(value: dict[str, Any] | None) -> str | int | None:
    identity = None if value is None else value.get("custom_id", value.get("id"))
    return identity if isinstance(identity, str) or type(identity) is int else None
