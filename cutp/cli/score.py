"""`cutp score`: log-probabilities of the tokens of given texts."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shlex

import cutp
from cutp.cli.options import MODEL_HELP, add_engine_options, open_llm

HELP = """log-probability of every token of every text

Input lines are {"id": ..., "text": "..."} or {"id": ..., "token_ids": [...]}; output lines, in the same order, are
{"id", "token_ids", "logprobs": [null, -1.2, ...], "perplexity"}."""
_TALES = os.path.join(os.path.dirname(cutp.__file__), "bundled", "tales")
EXAMPLE = ("""example: echo '{"id": 1, "text": "Once upon a time"}' > texts.jsonl && """
           f"mpirun -n 2 cutp score {shlex.quote(_TALES)} texts.jsonl -o scores.jsonl").replace("%", "%%")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("input", metavar="INPUT.jsonl", help="texts or token ids, one JSON object a line")
    parser.add_argument("-o", "--output", required=True, metavar="OUTPUT.jsonl", help="where the results go")
    add_engine_options(parser)


def run(args: argparse.Namespace) -> None:
    from cutp.comm import world

    with world() as comm:
        prompts = places = None
        with comm.host.agree("reading the input"):
            if comm.rank == 0:
                _check_output(args.output)
                records = read_records(args.input)
                prompts, places = [[record[key] for record in records] for key in ("prompt", "where")]
        with open_llm(args, comm) as llm:
            outputs = llm.score(prompts, names=places)
        with comm.host.agree("writing the output"):
            if comm.rank == 0:
                _write(args.output, records, outputs)


def read_records(name: str) -> list[dict]:
    """[{"id", "prompt", "where"}] of every line of a JSONL file; RequestError names the file and the wrong line."""
    from cutp.errors import RequestError

    records = []
    try:
        with open(name, "rb") as file:
            for number, line in enumerate(file, 1):
                records.append(_parse(line, f"line {number} of {name}"))
    except OSError as error:
        raise RequestError(f"the input {name} cannot be read: {error.strerror}") from None
    if not records:
        raise RequestError(f"the input {name} is empty")
    return records


def _parse(line: bytes, where: str) -> dict:
    from cutp.errors import RequestError

    try:
        value = json.loads(line, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where} is not JSON: {error}") from None
    if not isinstance(value, dict) or "id" not in value:
        raise RequestError(f'{where} is not an object with an "id"')
    if ("text" in value) == ("token_ids" in value):
        raise RequestError(f'{where} needs either "text" or "token_ids"')
    if "text" in value:
        if not isinstance(value["text"], str) or not value["text"]:
            raise RequestError(f'{where}: "text" must be a string that is not empty')
        return {"id": value["id"], "prompt": value["text"], "where": where}
    ids = value["token_ids"]
    if not isinstance(ids, list) or not ids or not all(type(t) is int for t in ids):
        raise RequestError(f'{where}: "token_ids" must be a list of integers that is not empty')
    return {"id": value["id"], "prompt": ids, "where": where}


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _is_device(name: str) -> bool:
    """Whether `name` is there and no regular file, such as /dev/stdout: it must be written to, never replaced."""
    return os.path.exists(name) and not os.path.isfile(name)


def _check_output(name: str) -> None:
    """RequestError now, before minutes of work, when the output could not be written."""
    from cutp.errors import RequestError

    directory = os.path.dirname(os.path.realpath(name))
    place = name if _is_device(name) else directory
    if os.path.isdir(name) or not os.path.isdir(directory) or not os.access(place, os.W_OK):
        raise RequestError(f"the output {name} cannot be written", hint="name a file in a writable directory")


def _write(name: str, records: list[dict], outputs) -> None:
    """Writes all lines or none: a file beside the output takes its name once it is complete."""
    from cutp.errors import RequestError

    temporary = name if _is_device(name) else f"{os.path.realpath(name)}.part"
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            for record, output in zip(records, outputs, strict=True):
                perplexity = output.perplexity
                line = {"id": record["id"], "token_ids": output.token_ids, "logprobs": output.logprobs,
                        "perplexity": perplexity if perplexity is None or math.isfinite(perplexity) else None}
                file.write(json.dumps(line) + "\n")
        if temporary != name:
            os.replace(temporary, os.path.realpath(name))
    except OSError as error:
        if temporary != name:
            with contextlib.suppress(OSError):
                os.remove(temporary)
        raise RequestError(f"the output {name} cannot be written: {error.strerror}") from None
