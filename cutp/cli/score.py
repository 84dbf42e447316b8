"""`cutp score`: log-probabilities of the tokens of given texts."""

from __future__ import annotations

import argparse
import json
import math
import os

from cutp.cli.options import MODEL_HELP, add_engine_options, open_llm

HELP = """log-probability of every token of every text

Input lines are {"id": ..., "text": "..."} or {"id": ..., "token_ids": [...]}; output lines, in the same order, are
{"id", "token_ids", "logprobs": [null, -1.2, ...], "perplexity"}."""
EXAMPLE = "example: mpirun -n 2 cutp score MODEL texts.jsonl -o scores.jsonl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("input", metavar="INPUT.jsonl", help="texts or token ids, one JSON object a line")
    parser.add_argument("-o", "--output", required=True, metavar="OUTPUT.jsonl", help="where the results go")
    add_engine_options(parser)


def run(args: argparse.Namespace) -> None:
    from cutp.comm.launch import launcher_rank

    if launcher_rank() in (None, 0):
        _check_output(args.output)
    with open_llm(args) as llm:
        records = None
        with llm.comm.host.agree("reading the input"):
            if llm.is_root:
                records = read_records(args.input)
        outputs = llm.score([record["prompt"] for record in records] if records is not None else None)
        with llm.comm.host.agree("writing the output"):
            if llm.is_root:
                _write(args.output, records, outputs)


def read_records(name: str) -> list[dict]:
    """[{"id", "prompt"}] of every line of a JSONL file; RequestError names the file and the line that is wrong."""
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
        value = json.loads(line)
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


def _check_output(name: str) -> None:
    """RequestError now, before minutes of work, when the output could not be written."""
    from cutp.errors import RequestError

    directory = os.path.dirname(os.path.abspath(name))
    if os.path.isdir(name) or not os.path.isdir(directory) or not os.access(directory, os.W_OK):
        raise RequestError(f"the output {name} cannot be written", hint="name a file in a writable directory")


def _write(name: str, records: list[dict], outputs) -> None:
    """Writes all lines or none: a file beside the output takes its name once it is complete."""
    from cutp.errors import RequestError

    temporary = f"{name}.part"
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            for record, output in zip(records, outputs, strict=True):
                perplexity = output.perplexity
                line = {"id": record["id"], "token_ids": output.token_ids, "logprobs": output.logprobs,
                        "perplexity": perplexity if perplexity is None or math.isfinite(perplexity) else None}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        os.replace(temporary, name)
    except OSError as error:
        raise RequestError(f"the output {name} cannot be written: {error.strerror}") from None
