"""`cutp batch`: a whole corpus, resumable."""

from __future__ import annotations

import argparse
import os
import shlex
import sys

import cutp
from cutp.cli.options import MODEL_HELP, add_engine_options, open_llm, positive_int
from cutp.cli.sampling_options import add_sampling_options, sampling_params

HELP = "run a corpus of records through a model; start it again to go on where it stopped"
_TALES = os.path.join(os.path.dirname(cutp.__file__), "bundled", "tales")
EXAMPLE = ("""Input lines are OpenAI batch lines ({"custom_id", "url", "body"}), {"id", "prompt" or "messages"} with
sampling parameters, or text. Results go to DIR/part-*.jsonl, records that cannot be served to DIR/errors.*.jsonl.
Every line is written whole, and a record with a line is done. With --tp N the ranks form groups of N, which share the
work.
Exit status: 0 all done; 6 all done, but with error records; 75 stopped early by a signal or the time limit: start the
same command again, with any number of ranks.
See also: cutp batch status DIR, cutp batch merge DIR -o FILE.

example: echo '{"id": 1, "prompt": "Once upon a time"}' > prompts.jsonl && """
           f"mpirun -n 2 cutp batch {shlex.quote(_TALES)} prompts.jsonl -o out --tp 1").replace("%", "%%")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="files or patterns; .gz is read too")
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="the directory of the job")
    job = parser.add_argument_group("job")
    job.add_argument("--format", default="auto", choices=("auto", "jsonl", "text"), help="what the input lines are")
    job.add_argument("--chat", action="store_true", help="treat text prompts as user messages of a chat")
    job.add_argument("--time-limit", metavar="T",
                     help="stop after T (seconds, 90m, 12h, HH:MM:SS), or auto: before the scheduler ends the job")
    job.add_argument("--margin", metavar="T",
                     help="stop so long before the time limit (default: a tenth of the time, at most a minute)")
    job.add_argument("--max-fails", type=positive_int, default=1, metavar="N",
                     help="try records that failed in earlier runs again until they failed N times (default: 1)")
    job.add_argument("--stop-on-error", action="store_true", help="stop at the first record that cannot be served")
    job.add_argument("--accept-changes", action="store_true",
                     help="go on although input, model or parameters have changed; results that are there stay")
    job.add_argument("--interval", type=_seconds, default=30.0, metavar="S",
                     help="seconds between lines of progress and of metrics (default: 30)")
    add_sampling_options(parser, "of the job, 0 to 2**64 - 1; every record has its own, made from it and from its id "
                                 "(default: drawn when the job first starts)")
    add_engine_options(parser)


def run(args: argparse.Namespace) -> None:
    from cutp.batch.job import run_job
    from cutp.batch.progress import Progress
    from cutp.batch.stop import StopFlag
    from cutp.comm import world
    from cutp.engine.replicas import split_replicas

    with StopFlag() as stop:
        options = _options(args)
        with world() as comm:
            replicas = split_replicas(comm, args.tp)
            progress = Progress(comm.rank == 0)
            try:
                code = run_job(options, replicas, stop, progress, 
                               lambda: open_llm(args, replicas.group, quiet=replicas.index > 0))
            finally:
                progress.close()
                replicas.close()
    if code:
        sys.exit(code)


def _options(args: argparse.Namespace):
    from cutp.batch.prepare import JobOptions
    from cutp.batch.walltime import parse_duration
    from cutp.engine.sampling_params import SamplingParams

    for text in (args.margin, None if args.time_limit == "auto" else args.time_limit):
        if text is not None:
            parse_duration(text)
    args.json = True  # result lines have room for log-probabilities
    params, nothing = sampling_params(args).to_dict(), SamplingParams().to_dict()
    given = {name: value for name, value in params.items() if value != nothing[name] and name != "seed"}
    return JobOptions(args.model, args.inputs, args.output, given, args.seed, args.chat, args.format,
                      {"dtype": args.dtype, "max_len": args.max_len}, args.max_fails, args.stop_on_error,
                      args.accept_changes, args.time_limit, args.margin, args.interval)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")
    return value
