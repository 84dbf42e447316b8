"""Input of commands that work on texts: a JSON object a line, read in chunks."""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import os
import stat
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cutp.cli.options import positive_int

if TYPE_CHECKING:
    from cutp.comm import Communicator

# A longer line is refused; it is never held in memory.
MAX_LINE_BYTES = 64 << 20
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Item:
    """One line. value: text, token ids, or a pair (context, continuation) of these. where: what errors call it.
    size: bytes of the line."""

    id: Any
    value: str | list[int] | tuple[str, str] | tuple[list[int], list[int]]
    where: str
    size: int


class JsonLines:
    """The items of a JSONL file, gzip or not.

    pairs: whether "context" and "continuation" may stand for a text. need_id: whether every line must have an "id";
    else one without has its number. All errors are RequestError and name the file and the line.
    """

    def __init__(self, name: str, *, pairs: bool = False, need_id: bool = False):
        self._name = name
        self._pairs = pairs
        self._need_id = need_id

    def check(self) -> None:
        """Reads the whole input once, so that a bad line is found before minutes of work; not a pipe, which can be
        read only once."""
        if not _is_stream(self._name):
            for _ in self:
                pass

    def chunks(self, comm: Communicator, chunk_bytes: int) -> Iterator[list[Item] | None]:
        """Lists of items of about `chunk_bytes` of input, at least one item: on rank 0; on the others None as often.
        Collective, errors included."""
        items = None
        while True:
            chunk: list[Item] = []
            with comm.host.agree("reading the input"):
                if comm.rank == 0:
                    items = items or iter(self)
                    size = 0
                    while size < chunk_bytes and (item := next(items, None)) is not None:
                        chunk.append(item)
                        size += item.size
            if not comm.host.broadcast_json(bool(chunk)):
                return
            yield chunk if comm.rank == 0 else None

    def __iter__(self) -> Iterator[Item]:
        from cutp.errors import RequestError

        number = 0
        for number, line in enumerate(read_lines(self._name), 1):
            yield self._parse(line, number)
        if not number:
            raise RequestError(f"the input {self._name} is empty")

    def _parse(self, line: bytes, number: int) -> Item:
        from cutp.errors import RequestError

        where = f"line {number} of {self._name}"
        try:
            value = json.loads(line, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{where} is not JSON: {error}") from None
        if not isinstance(value, dict) or self._need_id and "id" not in value:
            raise RequestError(f"{where} is not an object" + ' with an "id"' * self._need_id)
        is_pair = self._pairs and ("context" in value or "continuation" in value)
        if is_pair + ("text" in value) + ("token_ids" in value) != 1:
            raise RequestError(f'{where} needs either "text" or "token_ids"'
                               + ', or "context" and "continuation"' * self._pairs)
        if is_pair:
            found: Any = _pair(value, where)
        else:
            key = "text" if "text" in value else "token_ids"
            found = _content(value[key], key, where, (str,) if key == "text" else (list,))
        return Item(value.get("id", number), found, where, len(line))


def read_lines(name: str) -> Iterator[bytes]:
    """The lines of a file, gzip or not. RequestError when it cannot be read."""
    from cutp.errors import RequestError

    number = 0
    try:
        with open(name, "rb") as raw:
            packed = raw.peek(2)[:2] == b"\x1f\x8b"
            with gzip.GzipFile(fileobj=raw) if packed else contextlib.nullcontext(raw) as file:
                while line := file.readline(MAX_LINE_BYTES + 1):
                    number += 1
                    if len(line) > MAX_LINE_BYTES:
                        raise RequestError(f"line {number} of {name} is longer than {MAX_LINE_BYTES} bytes")
                    yield line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise RequestError(f"the input {name} is damaged after line {number}: {error}") from None
    except OSError as error:
        raise RequestError(f"the input {name} cannot be read: {error.strerror or error}") from None


def add_chunk_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--chunk-bytes", type=positive_int, default=CHUNK_BYTES, metavar="N",
                        help="input that is held and worked on at once, in whole lines (default: 1048576)")


def _pair(value: dict, where: str) -> tuple:
    from cutp.errors import RequestError

    if "context" not in value or "continuation" not in value:
        raise RequestError(f'{where} needs both "context" and "continuation"')
    context, continuation = (_content(value[key], key, where, (str, list), may_be_empty=key == "context")
                             for key in ("context", "continuation"))
    if isinstance(context, str) != isinstance(continuation, str):
        raise RequestError(f'{where}: "context" and "continuation" must both be text or both be token ids')
    return context, continuation


def _content(content: Any, key: str, where: str, kinds: tuple[type, ...], *, may_be_empty: bool = False) -> Any:
    from cutp.errors import RequestError

    of_ids = not isinstance(content, list) or all(type(token) is int for token in content)
    if not isinstance(content, kinds) or not of_ids or not (content or may_be_empty):
        forms = " or ".join(_KINDS[kind] for kind in kinds)
        raise RequestError(f'{where}: "{key}" must be {forms}' + " that is not empty" * (not may_be_empty))
    return content


_KINDS = {str: "a string", list: "a list of integers"}


def _is_stream(name: str) -> bool:
    """Whether `name` is something that can be read only once, such as a pipe."""
    try:
        mode = os.stat(name).st_mode
    except OSError:
        return False  # reading it will tell what is wrong
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
