"""The lines of the input files: JSON lines or plain text, gzip or not, given by name or by pattern."""

from __future__ import annotations

import glob
import gzip
import io
import stat
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from cutp.errors import RequestError

# A longer line is one bad record; it is never held in memory.
MAX_LINE_BYTES = 64 << 20
FORMATS = ("auto", "jsonl", "text")
_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_BLANK = b" \t\r\n"
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class InputFile:
    """One file of records. is_text: every line is a prompt; else every line is a JSON object."""

    path: Path
    is_text: bool

    @property
    def name(self) -> str:
        return self.path.name


@dataclass(frozen=True)
class Line:
    """One line that is not blank; `data` is None when it is longer than MAX_LINE_BYTES."""

    name: str
    number: int
    data: bytes | None
    is_text: bool

    @property
    def where(self) -> str:
        return f"line {self.number} of {self.name}"


def find_files(names: Sequence[str], line_format: str = "auto") -> list[InputFile]:
    """The input files in the order of `names`; what a pattern matches, in the order of the names.

    line_format "auto" goes by the name (.txt, .jsonl, .ndjson, .json, each perhaps with .gz), else by the first line.
    Raises RequestError for a name or pattern that gives no regular file, and for a file that is given twice.
    """
    files: dict[Path, InputFile] = {}
    for name in names:
        path = Path(name).expanduser()
        found = [path] if path.exists() else [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
        if not found:
            raise RequestError(f"the input {name} is not there")
        for each in found:
            real = each.resolve()
            if real in files:
                raise RequestError(f"the input {each} is given twice")
            files[real] = InputFile(each, _is_text(each, line_format))
    return list(files.values())


def read_lines(file: InputFile, digest: Any = None) -> Iterator[Line]:
    """The lines of `file` that are not blank, numbered from 1 with the blank ones counted.

    digest: a hashlib object that is fed all bytes of the file, uncompressed. Raises RequestError when the file cannot
    be read to its end.
    """
    number = 0
    try:
        with _open(file.path) as stream:
            for number, data in enumerate(_raw_lines(stream, digest), 1):
                if data is None or data.strip(_BLANK):
                    yield Line(file.name, number, data, file.is_text)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise RequestError(f"the input {file.path} is damaged after line {number}: {error}") from None
    except OSError as error:
        raise RequestError(f"the input {file.path} cannot be read: {error.strerror or error}") from None


def _raw_lines(stream: BinaryIO, digest: Any) -> Iterator[bytes | None]:
    start = True
    while data := stream.readline(MAX_LINE_BYTES + 1):
        if digest is not None:
            digest.update(data)
        if len(data) > MAX_LINE_BYTES:
            while not data.endswith(b"\n") and (data := stream.readline(MAX_LINE_BYTES)):
                if digest is not None:
                    digest.update(data)
            yield None
        else:
            yield data.removeprefix(_BOM) if start else data
        start = False


def _open(path: Path) -> BinaryIO:
    """The file's bytes, uncompressed. It is read twice, so that a pipe cannot serve."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise RequestError(f"the input {path} is not a regular file", hint="the input is read twice: write it to disk")
    file = path.open("rb")
    if file.peek(2)[:2] != b"\x1f\x8b":
        return file
    return io.BufferedReader(_Gzip(file), 1 << 20)


class _Gzip(gzip.GzipFile):
    """Closes the file it reads from, which GzipFile leaves open."""

    def __init__(self, file: BinaryIO):
        super().__init__(fileobj=file, mode="rb")
        self._compressed = file

    def close(self) -> None:
        super().close()
        self._compressed.close()


def _is_text(path: Path, line_format: str) -> bool:
    if line_format != "auto":
        return line_format == "text"
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    if suffix == ".txt":
        return True
    if suffix in _JSON_SUFFIXES:
        return False
    first = next(read_lines(InputFile(path, False)), None)
    return first is not None and (first.data is None or not first.data.lstrip(_BLANK).startswith(b"{"))
