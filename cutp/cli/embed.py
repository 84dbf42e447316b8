"""`cutp embed`: one vector a text, in a NumPy file."""

from __future__ import annotations

import argparse
import io
import os
import shlex
from contextlib import closing

import cutp
from cutp.cli.json_lines import JsonLines, add_chunk_option
from cutp.cli.options import MODEL_HELP, add_engine_options, open_llm
from cutp.cli.whole_file import WholeFile

HELP = """one vector a text, as a float32 array [texts, hidden size] in a .npy file

Input lines are {"text": "..."} or {"token_ids": [...]}; row i of the array belongs to line i, counted from 0.
A line that cannot be embedded ends the command without output."""
_TALES = os.path.join(os.path.dirname(cutp.__file__), "bundled", "tales")
EXAMPLE = ("""example: echo '{"text": "Once upon a time"}' > texts.jsonl && """
           f"mpirun -n 2 cutp embed {shlex.quote(_TALES)} texts.jsonl --out vectors.npy").replace("%", "%%")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("input", metavar="INPUT.jsonl", help="texts or token ids, one JSON object a line; .gz is read "
                                                             "too")
    parser.add_argument("-o", "--out", required=True, metavar="X.npy", help="where the array goes")
    parser.add_argument("--pool", default="mean", choices=("mean", "last"),
                        help="the mean of the tokens' states, or the last token's (default: mean)")
    parser.add_argument("--layer", type=int, default=-1, metavar="L",
                        help="0: the embeddings, n: after block n, -1: after the final norm (default: -1)")
    parser.add_argument("--no-normalize", action="store_true", help="do not scale the vectors to length 1")
    add_chunk_option(parser)
    add_engine_options(parser)


def run(args: argparse.Namespace) -> None:
    from cutp.comm import world

    source = JsonLines(args.input)
    with world() as comm, closing(WholeFile(args.out)) as output:
        with comm.host.agree("reading the input"):
            if comm.rank == 0:
                _check(output, args.out)
                source.check()
        rows = 0
        with open_llm(args, comm) as llm:
            dim = llm.model.dim
            for chunk in source.chunks(comm, args.chunk_bytes):
                values = None if chunk is None else [item.value for item in chunk]
                vectors = llm.embed(values, names=chunk and [item.where for item in chunk], layer=args.layer,
                                    pool=args.pool, normalize=not args.no_normalize)
                with comm.host.agree("writing the output"):
                    if chunk is not None:
                        output.write((b"" if rows else _header(0, dim)) + vectors.astype("<f4").tobytes())
                rows += len(vectors)
        with comm.host.agree("writing the output"):
            if comm.rank == 0:
                output.write(_header(rows, dim), at=0)
                output.finish()


def _check(output: WholeFile, name: str) -> None:
    from cutp.errors import RequestError

    output.check()
    if output.is_device:
        raise RequestError(f"the output {name} cannot be written: it is no regular file")


def _header(rows: int, dim: int) -> bytes:
    """The head of a .npy file of float32 [rows, dim]; NumPy leaves room in it for the first axis to grow."""
    import numpy as np

    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "<f4", "fortran_order": False, "shape": (rows, dim)})
    return head.getvalue()
