"""`cutp perplexity`: how well a model predicts documents of any length."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Iterator

import cutp
from cutp.cli.json_lines import Item, JsonLines, add_chunk_option, read_lines
from cutp.cli.options import MODEL_HELP, add_engine_options, open_llm, positive_int
from cutp.cli.score import finite

HELP = """perplexity and bits per byte of documents, each and all together

Input lines are {"text": "..."} or {"token_ids": [...]}, with an "id" or without; or one document is a text file.
A document longer than the window is scored in windows, every token once (see LLM.perplexity)."""
_TALES = os.path.join(os.path.dirname(cutp.__file__), "bundled", "tales")
EXAMPLE = ("example: echo 'Once upon a time there was a king.' > tale.txt && "
           f"mpirun -n 2 cutp perplexity {shlex.quote(_TALES)} --text tale.txt").replace("%", "%%")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    documents = parser.add_mutually_exclusive_group(required=True)
    documents.add_argument("input", nargs="?", metavar="INPUT.jsonl",
                           help="documents, one JSON object a line; .gz is read too")
    documents.add_argument("--text", metavar="FILE", help="a text file that is one document")
    parser.add_argument("--window", type=positive_int, metavar="N",
                        help="tokens the model sees at once (default: --max-len)")
    parser.add_argument("--json", action="store_true", help="one JSON line a document, and one for the total")
    add_chunk_option(parser)
    add_engine_options(parser)


def run(args: argparse.Namespace) -> None:
    from cutp.comm import world

    source = JsonLines(args.input) if args.text is None else _TextFile(args.text)
    with world() as comm:
        with comm.host.agree("reading the input"):
            if comm.rank == 0:
                source.check()
        report = _Report(args.json)
        with open_llm(args, comm) as llm:
            for chunk in source.chunks(comm, args.chunk_bytes):
                values = None if chunk is None else [item.value for item in chunk]
                outputs = llm.perplexity(values, window=args.window, names=chunk and [item.where for item in chunk])
                if chunk is not None:
                    for item, output in zip(chunk, outputs, strict=True):
                        report.add(item.id, output.logprob, output.num_tokens, output.num_bytes)
        if comm.rank == 0:
            report.total()


class _TextFile(JsonLines):
    """A text file as one item."""

    def __iter__(self) -> Iterator[Item]:
        from cutp.errors import RequestError

        data = b"".join(read_lines(self._name))
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            raise RequestError(f"the input {self._name} is not UTF-8 at byte {error.start}") from None
        if not text:
            raise RequestError(f"the input {self._name} is empty")
        yield Item(self._name, text, f"the text of {self._name}", len(data))


class _Report:
    """Prints a line a document as it comes, then the total."""

    def __init__(self, as_json: bool):
        self._as_json = as_json
        self._logprob = 0.0
        self._tokens = self._documents = 0
        self._bytes: int | None = 0

    def add(self, name, logprob: float, tokens: int, size: int | None) -> None:
        if not self._documents and not self._as_json:
            sys.stdout.write(f"{'tokens':>12} {'perplexity':>14} {'bits/byte':>10}  document\n")
        self._documents += 1
        self._logprob += logprob
        self._tokens += tokens
        self._bytes = None if self._bytes is None or size is None else self._bytes + size
        self._show({"id": name}, name if isinstance(name, str) else json.dumps(name), logprob, tokens, size)

    def total(self) -> None:
        label = f"all {self._documents}" if self._documents > 1 else "all"
        self._show({"documents": self._documents}, label, self._logprob, self._tokens, self._bytes)

    def _show(self, head: dict, label: str, logprob: float, tokens: int, size: int | None) -> None:
        from cutp.engine.outputs import PerplexityOutput

        output = PerplexityOutput(0, logprob, tokens, size)
        perplexity, bits = finite(output.perplexity), output.bits_per_byte
        if self._as_json:
            line = json.dumps({**head, "tokens": tokens, "bytes": size, "logprob": logprob, "perplexity": perplexity,
                               "bits_per_byte": bits})
        else:
            shown = ["-" if value is None else f"{value:.4f}" for value in (perplexity, bits)]
            line = f"{tokens:>12} {shown[0]:>14} {shown[1]:>10}  {label}"
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
