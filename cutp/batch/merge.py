"""One file out of the results of all replicas and starts, every record once."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cutp.batch.directory import JobDirectory
from cutp.batch.inputs import find_files
from cutp.batch.journal import cannot_write
from cutp.batch.manifest import Manifest
from cutp.batch.scan import KEY, line_key, places
from cutp.errors import ConfigError, RequestError

ORDERS = ("input", "done")
_BLOCK = 1 << 20


def merge_results(directory: str, output: str, order: str = "input", *, partial: bool = False) -> tuple[int, int]:
    """Writes every result line of the job to `output`, once each; returns (lines written, records without a result).

    order: "input", for which the input files must still be there, or "done", as the results came. The file appears
    whole or not at all. Raises ConfigError when records are still to do, unless `partial`; RequestError when the input
    is gone or has changed; OutputError when a file cannot be read or written.
    """
    job = JobDirectory(directory)
    manifest = job.manifest()
    index = _Results(job)
    failed = {key for key, attempt, _ in job.errors() if attempt >= manifest.last_change}
    places_in_order = index.in_order() if order == "done" else index.of_keys(_input_keys(manifest))
    target = Path(output)
    temporary = target.with_name(f"{target.name}.{os.getpid()}.part")
    written = 0
    try:
        with contextlib.ExitStack() as stack:
            out = stack.enter_context(temporary.open("wb"))
            files = [stack.enter_context(path.open("rb")) for path in index.paths]
            for file, offset, length in places_in_order:
                files[file].seek(offset)
                out.write(files[file].read(length))
                written += 1
            out.flush()
            os.fsync(out.fileno())
        missing = max(0, manifest.records - written)
        left = missing - index.without_result(failed)
        if left > 0 and not partial:
            raise ConfigError(f"{left} of {manifest.records} records are still to do",
                              hint="finish the job first, or --partial for what is there")
        os.replace(temporary, target)
        return written, missing
    except OSError as error:
        raise cannot_write(target, error) from None
    finally:
        temporary.unlink(missing_ok=True)


class _Results:
    """Where each result line lies: about 40 bytes of memory a record, and no text."""

    def __init__(self, job: JobDirectory):
        self.paths = [path for _, path in job.files("part")]
        number = {path: index for index, path in enumerate(self.paths)}
        keys, rows = bytearray(), []
        for key, path, offset, length in job.results():
            keys += key
            rows.append((number[path], offset, length))
        self._keys = np.frombuffer(bytes(keys), KEY)
        self._rows = np.array(rows, np.int64).reshape(-1, 3)
        # Of several lines with one key the first counts: np.unique returns first occurrences.
        self._unique, self._first = np.unique(self._keys, return_index=True)

    def in_order(self) -> Iterator[tuple[int, int, int]]:
        """Places in the order in which the lines were written."""
        return (tuple(self._rows[index]) for index in np.sort(self._first))

    def of_keys(self, keys: Iterator[bytes]) -> Iterator[tuple[int, int, int]]:
        """Places of the lines of `keys`, those that are there, in that order."""
        for key in keys:
            at = np.searchsorted(self._unique, np.array(key, KEY))
            if at < len(self._unique) and self._unique[at] == np.array(key, KEY):
                yield tuple(self._rows[self._first[at]])

    def without_result(self, keys: set[bytes]) -> int:
        """How many of `keys` have no result."""
        wanted = np.array(sorted(keys), KEY)
        return len(wanted) - int(np.isin(wanted, self._unique).sum())


def _input_keys(manifest: Manifest) -> Iterator[bytes]:
    """Keys of the records in the order of the input, which must be what it was."""
    for described in manifest.inputs:
        path = Path(described["path"])
        if not path.exists():
            raise RequestError(f"the input {path} is not there any more", hint="put it back, or use --order done")
        [file] = find_files([str(path)], "text" if described["text"] else "jsonl")
        records = 0
        for _, line in places([file]):
            records += 1
            yield line_key(line)[0]
        if records != described["records"]:
            raise RequestError(f"the input {path} has changed", hint="put it back, or use --order done")
