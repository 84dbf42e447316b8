"""The `cutp` command: finds the subcommand and runs it so that a failure ends the whole job with one message."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from cutp import __version__
from cutp.cli import batch, batch_merge, batch_status, bench, doctor, embed, generate, info, perplexity, score
from cutp.cli import eval as evaluate
from cutp.cli.failure import exit_code_of

COMMANDS = (generate, batch, batch_status, batch_merge, score, perplexity, embed, evaluate, info, bench, doctor)


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="cutp", description="LLM transformer inference as an MPI program.",
                     epilog='example: mpirun -n 2 cutp generate -p "Once upon a time"')
    parser.add_argument("--version", action="version", version=f"cutp {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    for command in COMMANDS:
        name = command.__name__.rpartition(".")[2].replace("_", " ")
        subparser = subparsers.add_parser(name, help=command.HELP, description=command.HELP, epilog=command.EXAMPLE,
                                          formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    return parser


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs one command and exits: 0 done, 2 usage or request, 3 model, 4 memory, 5 communication, 1 anything else;
    `cutp batch` also with 6 (done, with error records) and 75 (stopped early, to be started again), `cutp doctor`
    with 7 (a check failed).
    """
    args = build_parser().parse_args(_joined(sys.argv[1:] if argv is None else argv))
    sys.exit(exit_code_of(args.run, args))


def _joined(argv: Sequence[str]) -> list[str]:
    """`argv` with a command of two words, such as `batch status`, as one; `batch ./status` is a model of that name."""
    two = " ".join(argv[:2])
    names = [command.__name__.rpartition(".")[2] for command in COMMANDS]
    return [two, *argv[2:]] if len(argv) > 1 and two.replace(" ", "_") in names and " " in two else list(argv)


class _Parser(argparse.ArgumentParser):
    """Usage messages and help come from one rank only: under a launcher every rank parses the same line.

    An error is one line, like every other error.
    """

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"cutp: error: {' '.join(message.split())} (see {self.prog} --help)\n")

    def _print_message(self, message, file=None):
        from cutp.comm.launch import launcher_rank

        if message and launcher_rank() in (None, 0):
            super()._print_message(message, file)
