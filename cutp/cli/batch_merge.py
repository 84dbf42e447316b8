"""`cutp batch merge`: the results of a corpus job in one file."""

from __future__ import annotations

import argparse
import sys

HELP = "write the results of a batch job to one file, every record once"
EXAMPLE = "example: cutp batch merge out -o results.jsonl --order input"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR", help="the directory of the job")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="where the results go")
    parser.add_argument("--order", default="input", choices=("input", "done"),
                        help="the order of the input, or that in which records were done (default: input)")
    parser.add_argument("--partial", action="store_true", help="also while records are still to do")


def run(args: argparse.Namespace) -> None:
    from cutp.batch.merge import merge_results
    from cutp.comm.launch import launcher_rank

    if launcher_rank() not in (None, 0):
        return
    written, missing = merge_results(args.directory, args.output, args.order, partial=args.partial)
    note = f"; {missing} records have no result" if missing else ""
    sys.stderr.write(f"cutp: {written} results in {args.output}{note}\n")
