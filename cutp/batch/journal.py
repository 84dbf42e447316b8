"""Append-only files of JSON lines: one complete line a write, so that a kill can tear only the last one.

A line that is there whole is the mark that its record is done; there is no second place that could disagree with it.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cutp.errors import OutputError


class Journal:
    """A file of lines that this process alone appends to; it comes into being with its first line."""

    def __init__(self, path: Path):
        self.path = path
        self._fd: int | None = None
        self._end = 0
        self._unsynced = False

    def append(self, value: Any) -> None:
        """Writes `value` as one line. Raises OutputError, and leaves no part of the line, when it cannot."""
        data = to_line(value)
        try:
            if self._fd is None:
                # Exclusive: a file of this name that is there already belongs to another process.
                self._fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o666)
            self._unsynced = True
            written = 0
            while written < len(data):
                written += os.write(self._fd, data[written:])
            self._end += written
        except OSError as error:
            self._take_back()
            raise cannot_write(self.path, error) from None

    def sync(self) -> None:
        """Forces what was written to disk. Raises OutputError; a network file system reports a full disk only here."""
        if self._fd is not None and self._unsynced:
            try:
                os.fsync(self._fd)
            except OSError as error:
                raise cannot_write(self.path, error) from None
            self._unsynced = False

    def close(self) -> None:
        """Syncs and closes; safe to call twice."""
        try:
            self.sync()
        finally:
            if self._fd is not None:
                os.close(self._fd)
                self._fd = None

    def _take_back(self) -> None:
        """Removes what a failed write may have left. Where even that fails, the next run drops the torn line."""
        if self._fd is not None:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._end)


def to_line(value: Any) -> bytes:
    """One line of JSON, in UTF-8 where the text allows it."""
    try:
        return (json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate, which JSON can escape and UTF-8 cannot hold
        return (json.dumps(value, allow_nan=False) + "\n").encode("ascii")


def read_journal(path: Path) -> Iterator[tuple[int, int, dict | None]]:
    """(offset, length, value) of every line of a file; the value is None for a line that is no JSON object.

    A last line without its line feed is torn, and left out. Raises OutputError when the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            offset = 0
            for line in file:
                if not line.endswith(b"\n"):
                    return
                yield offset, len(line), _object(line)
                offset += len(line)
    except OSError as error:
        raise OutputError(f"{path} cannot be read: {error.strerror or error}") from None


def drop_torn_line(path: Path) -> int:
    """Removes what follows the last line feed of the file, and returns the number of bytes that were dropped.

    Raises OutputError when the file cannot be changed.
    """
    try:
        with path.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            keep = end
            while keep > 0:
                start = max(0, keep - (1 << 16))
                file.seek(start)
                found = file.read(keep - start).rfind(b"\n")
                if found >= 0:
                    keep = start + found + 1
                    break
                keep = start
        if keep < end:
            os.truncate(path, keep)
        return end - keep
    except OSError as error:
        raise cannot_write(path, error) from None


def write_atomically(path: Path, data: bytes) -> None:
    """The file holds either what it held before or all of `data`, whatever happens. Raises OutputError."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_directory(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise cannot_write(path, error) from None


def sync_directory(directory: Path) -> None:
    """Makes the names in a directory durable, where its file system can."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError:  # some network file systems refuse this for directories
        pass
    finally:
        os.close(fd)


def cannot_write(path: Path, error: OSError) -> OutputError:
    return OutputError(f"{path} cannot be written: {error.strerror or error}",
                       hint="the finished records are kept; make room or get permission, and start the job again")


def _object(line: bytes) -> dict | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
