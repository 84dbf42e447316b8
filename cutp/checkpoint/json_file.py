"""Strict JSON from files that nobody vouches for: one place that turns every way to be broken into one sentence."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cutp.errors import CheckpointError

# Largest JSON side file (config, index, tokenizer) that is read into memory; real ones stay under 20 MB.
MAX_JSON_BYTES = 100_000_000


def parse_json_object(data: bytes, where: str, error: type[CheckpointError] = CheckpointError) -> dict[str, Any]:
    """The JSON object in `data`; `where` names the source in messages, for example "config.json in /models/x".

    Duplicate keys, NaN and Infinity, bytes that are not UTF-8, nesting too deep to parse and anything that is not
    an object raise `error`.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise error(f"{where} is not UTF-8 (byte {e.start})", hint="the file is damaged; fetch it again") from None
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise error(f"{where} is nested too deeply", hint="the file is damaged or hostile") from None
    except json.JSONDecodeError as e:
        message = f"{where} is not valid JSON: {e.msg} at line {e.lineno} column {e.colno}"
        raise error(message, hint="the file is damaged; fetch it again") from None
    except ValueError as e:  # our two hooks, and integers of more digits than Python converts
        raise error(f"{where} is not acceptable JSON: {e}", hint="the file is damaged; fetch it again") from None
    if not isinstance(value, dict):
        raise error(f"{where} holds a JSON {type(value).__name__}, not an object", hint="the file is damaged")
    return value


def read_json_object(path: Path, error: type[CheckpointError] = CheckpointError) -> dict[str, Any]:
    """The JSON object in the file at `path`; raises `error` naming the file when it cannot be had."""
    return parse_json_object(read_small_file(path, error=error), str(path), error)


def read_small_file(
    path: Path, max_bytes: int = MAX_JSON_BYTES, error: type[CheckpointError] = CheckpointError
) -> bytes:
    """All bytes of a regular file of at most `max_bytes` bytes."""
    try:
        status = path.stat()
        # A pipe or device would block or never end, so only regular files are opened.
        if not stat.S_ISREG(status.st_mode):
            raise error(f"{path} is not a regular file")
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as e:
        raise error(f"{path} cannot be read: {e.strerror or e}") from None
    if len(data) > max_bytes:
        raise error(f"{path} is larger than {max_bytes} bytes", hint="no real file of this kind is; it is damaged")
    return data


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"duplicate key {key!r}")
        result[key] = value
    return result


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
