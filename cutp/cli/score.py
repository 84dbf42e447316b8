"""`cutp score`: log-probabilities of the tokens of given texts."""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
from contextlib import closing
from typing import TYPE_CHECKING, Any

import cutp
from cutp.cli.json_lines import Item, JsonLines, add_chunk_option
from cutp.cli.options import MODEL_HELP, add_engine_options, open_llm
from cutp.cli.whole_file import WholeFile

if TYPE_CHECKING:
    from cutp.engine.outputs import ScoreOutput

HELP = """log-probability of every token of every text, or of continuations of contexts

Input lines are {"id": ..., "text": "..."}, {"id": ..., "token_ids": [...]}, or {"id": ..., "context": ...,
"continuation": ...} with both as text or both as token ids. Output lines, in the same order, are
{"id", "token_ids", "logprobs": [null, -1.2, ...], "perplexity"}, or for a continuation
{"id", "context_token_ids", "token_ids", "logprobs", "logprob": sum, "is_greedy"}.
A line that cannot be scored ends the command without output."""
_TALES = os.path.join(os.path.dirname(cutp.__file__), "bundled", "tales")
EXAMPLE = ("""example: echo '{"id": 1, "text": "Once upon a time"}' > texts.jsonl && """
           f"mpirun -n 2 cutp score {shlex.quote(_TALES)} texts.jsonl -o scores.jsonl").replace("%", "%%")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("input", metavar="INPUT.jsonl", help="what to score, one JSON object a line; .gz is read too")
    parser.add_argument("-o", "--output", required=True, metavar="OUTPUT.jsonl", help="where the results go")
    add_chunk_option(parser)
    add_engine_options(parser)


def run(args: argparse.Namespace) -> None:
    from cutp.comm import world

    source = JsonLines(args.input, pairs=True, need_id=True)
    with world() as comm, closing(WholeFile(args.output)) as output:
        with comm.host.agree("reading the input"):
            if comm.rank == 0:
                output.check()
                source.check()
        with open_llm(args, comm) as llm:
            for chunk in source.chunks(comm, args.chunk_bytes):
                values = None if chunk is None else [item.value for item in chunk]
                scored = llm.score(values, names=chunk and [item.where for item in chunk])
                with comm.host.agree("writing the output"):
                    if chunk is not None:
                        output.write(b"".join(map(_line, chunk, scored)))
        with comm.host.agree("writing the output"):
            if comm.rank == 0:
                output.finish()


def _line(item: Item, scored: ScoreOutput) -> bytes:
    line: dict[str, Any] = {"id": item.id}
    if isinstance(item.value, tuple):
        line |= {"context_token_ids": scored.context_token_ids, "token_ids": scored.token_ids,
                 "logprobs": scored.logprobs, "logprob": scored.logprob, "is_greedy": scored.is_greedy}
    else:
        line |= {"token_ids": scored.token_ids, "logprobs": scored.logprobs, "perplexity": finite(scored.perplexity)}
    return json.dumps(line).encode() + b"\n"


def finite(value: float | None) -> float | None:
    """None for what JSON has no number for."""
    return value if value is None or math.isfinite(value) else None
