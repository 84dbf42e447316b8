"""One pass over the whole input: how many records there are, which ids, and a digest of every file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cutp.batch.inputs import InputFile, Line, read_lines
from cutp.batch.records import key_of, read_identity
from cutp.errors import RequestError

KEY = np.dtype("S16")


@dataclass(frozen=True)
class Scan:
    """The records of the input, in order; 16 bytes of memory each, and no text.

    keys: `key_of` of every record, KEY [records]. files: {"name", "path", "text", "records", "sha256"} of every file.
    bad: lines without a usable id, of which the first is said in `first_bad`.
    """

    keys: np.ndarray
    files: list[dict[str, Any]]
    bad: int
    first_bad: RequestError | None

    @property
    def records(self) -> int:
        return len(self.keys)


def scan_input(files: Sequence[InputFile]) -> Scan:
    """Reads all lines once.

    Raises RequestError for an id that appears twice (naming both places), for input without a record, and for input
    where no line at all is a record, which is then not what was meant.
    """
    keys = bytearray()
    described, bad, first_bad = [], 0, None
    for file in files:
        digest = hashlib.sha256()
        before = len(keys)
        for line in read_lines(file, digest):
            key, error = line_key(line)
            keys += key
            if error is not None:
                bad, first_bad = bad + 1, first_bad or error
        described.append({"name": file.name, "path": str(file.path.resolve()), "text": file.is_text,
                          "records": (len(keys) - before) // KEY.itemsize, "sha256": digest.hexdigest()})
    scan = Scan(np.frombuffer(bytes(keys), KEY), described, bad, first_bad)
    if scan.records == 0:
        raise RequestError("the input has no records: " + ", ".join(f"{file.path} is empty" for file in files))
    if bad == scan.records:
        raise RequestError(f"no line of the input is a record: {first_bad.message}", hint=first_bad.hint)
    _check_unique(scan.keys, files)
    return scan


def line_key(line: Line) -> tuple[bytes, RequestError | None]:
    """The key of a line, and what is wrong with it; without an id its place stands for it."""
    try:
        return key_of(read_identity(line)[0]), None
    except RequestError as error:
        return key_of([line.name, line.number]), error


def places(files: Sequence[InputFile]) -> Iterator[tuple[InputFile, Line]]:
    """Every line of every file, in the order in which `scan_input` numbers the records."""
    for file in files:
        for line in read_lines(file):
            yield file, line


def _check_unique(keys: np.ndarray, files: Sequence[InputFile]) -> None:
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    again = np.flatnonzero(ordered[1:] == ordered[:-1])
    if not again.size:
        return
    first, second = order[again[0]], order[again[0] + 1]
    found = []
    for index, (file, line) in enumerate(places(files)):
        if index in (first, second):
            found.append((file, line))
        if len(found) == 2:
            break
    (one_file, one), (other_file, other) = found
    same_name = one_file is not other_file and one_file.name == other_file.name
    names = (str(one_file.path), str(other_file.path)) if same_name else (one.name, other.name)
    try:
        identity = repr(read_identity(one)[0])
    except RequestError:
        identity = "the same name and line number"
    count = f" (and {again.size - 1} more)" if again.size > 1 else ""
    raise RequestError(f"the id {identity} is in line {one.number} of {names[0]} and in line {other.number} of "
                       f"{names[1]}{count}", hint="ids must differ, because a result is found by its id")
